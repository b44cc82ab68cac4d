//! Tells a waiting person what is being done and for how long.
//!
//! A step says nothing for its first two seconds; then a terminal shows one
//! line that is kept up to date, and a log file gets a line now and then. A
//! finished step leaves one line behind.

use std::{
    io::{IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Cheap to clone: all clones write to the same place.
#[derive(Clone, Debug)]
pub struct Progress {
    screen: Option<Arc<Screen>>,
}

#[derive(Debug)]
struct Screen {
    terminal: bool,
    /// Steps under way, oldest first. Held while writing, so lines stay whole.
    under_way: Mutex<Vec<Arc<Running>>>,
}

#[derive(Debug)]
struct Running {
    what: String,
    since: Instant,
    note: Mutex<String>,
    /// For a log file: when its last line was written.
    told: Mutex<Option<Instant>>,
}

/// One thing being done. Dropped without [`Step::done`] it has failed.
#[derive(Debug)]
pub struct Step {
    screen: Option<Arc<Screen>>,
    running: Arc<Running>,
    ended: bool,
}

const QUIET: Duration = Duration::from_secs(2);
const LOG_EVERY: Duration = Duration::from_secs(10);
/// A terminal line longer than this would wrap and leave rubbish behind.
const WIDTH: usize = 78;

impl Progress {
    /// On standard error, which leaves standard output to results.
    pub fn stderr() -> Self {
        let screen = Arc::new(Screen {
            terminal: std::io::stderr().is_terminal(),
            under_way: Mutex::default(),
        });
        let weak = Arc::downgrade(&screen);
        // Ends with the last clone. A thread, not a task: it must go on while
        // the runtime is busy or blocked.
        std::thread::spawn(move || {
            while let Some(screen) = weak.upgrade() {
                screen.refresh();
                drop(screen);
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        Self { screen: Some(screen) }
    }

    pub fn silent() -> Self {
        Self { screen: None }
    }

    pub fn step(&self, what: impl Into<String>) -> Step {
        let running = Arc::new(Running {
            what: what.into(),
            since: Instant::now(),
            note: Mutex::default(),
            told: Mutex::default(),
        });
        if let Some(screen) = &self.screen {
            lock(&screen.under_way).push(running.clone());
        }
        Step {
            screen: self.screen.clone(),
            running,
            ended: false,
        }
    }

    /// A line for people that is no step.
    pub fn say(&self, line: &str) {
        if let Some(screen) = &self.screen {
            let _held = lock(&screen.under_way);
            screen.write(line, Ending::Kept);
        }
    }
}

impl Step {
    /// What the step is at right now.
    pub fn note(&self, note: &str) {
        note.clone_into(&mut lock(&self.running.note));
    }

    pub fn done(mut self) {
        self.end("ok    ");
    }

    /// Done, with something to add.
    pub fn done_with(mut self, remark: &str) {
        self.note(remark);
        self.ended = true;
        let line = format!(
            "ok      {}: {remark}{}",
            self.running.what,
            took(self.running.since)
        );
        self.leave(&line);
    }

    /// Done, and worth a line only if somebody had to wait for it.
    pub fn done_quietly(mut self) {
        if self.running.since.elapsed() > QUIET {
            return self.done();
        }
        self.ended = true;
        if let Some(screen) = &self.screen {
            lock(&screen.under_way).retain(|step| !Arc::ptr_eq(step, &self.running));
        }
    }

    fn end(&mut self, how: &str) {
        self.ended = true;
        let line = format!("{how}  {}{}", self.running.what, took(self.running.since));
        self.leave(&line);
    }

    fn leave(&self, line: &str) {
        if let Some(screen) = &self.screen {
            let mut under_way = lock(&screen.under_way);
            under_way.retain(|step| !Arc::ptr_eq(step, &self.running));
            screen.write(line, Ending::Kept);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.ended {
            self.end("failed");
        }
    }
}

enum Ending {
    /// Stays on the screen.
    Kept,
    /// The next line overwrites it.
    Overwritten,
}

impl Screen {
    fn refresh(&self) {
        let under_way = lock(&self.under_way);
        let Some(step) = under_way.iter().find(|step| step.since.elapsed() > QUIET) else {
            return;
        };
        let note = lock(&step.note);
        let line = format!(
            "...     {} {} s  {note}",
            step.what,
            step.since.elapsed().as_secs()
        );
        if self.terminal {
            self.write(&line.chars().take(WIDTH).collect::<String>(), Ending::Overwritten);
            return;
        }
        for step in under_way.iter().filter(|step| step.since.elapsed() > QUIET) {
            let mut told = lock(&step.told);
            if told.is_none_or(|at| at.elapsed() > LOG_EVERY) {
                *told = Some(Instant::now());
                let remark = if Arc::ptr_eq(step, &under_way[0]) {
                    note.as_str()
                } else {
                    ""
                };
                self.write(
                    &format!(
                        "...     {} {} s  {remark}",
                        step.what,
                        step.since.elapsed().as_secs()
                    ),
                    Ending::Kept,
                );
            }
        }
    }

    fn write(&self, line: &str, ending: Ending) {
        let text = match (self.terminal, ending) {
            (true, Ending::Kept) => format!("\r\x1b[K{line}\n"),
            (true, Ending::Overwritten) => format!("\r\x1b[K{line}"),
            (false, _) => format!("{line}\n"),
        };
        // Nobody to tell if standard error is closed.
        std::io::stderr().write_all(text.as_bytes()).ok();
    }
}

fn took(since: Instant) -> String {
    let seconds = since.elapsed().as_secs_f64();
    if seconds < 1.0 {
        String::new()
    } else {
        format!("  {seconds:.1} s")
    }
}

/// What is behind these locks is plain text: a panic elsewhere cannot have
/// left it half done.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
