//! Long work on trees in short turns. A tree may be a million entries wide: each turn
//! takes a thread for some of them, and whoever waits for a turn gets one before the
//! same tree has its next.

use std::{
    io,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;

/// Entries of a turn: some tens of milliseconds.
const ENTRIES: usize = 4096;
/// Turns at a time on a host, in the order in which they are asked for. The disk is
/// the pods'.
static TURNS: Semaphore = Semaphore::const_new(2);

/// Work that may be left and taken up again.
pub trait Work: Send + 'static {
    type Output: Send + 'static;

    /// Goes on for that many entries at most.
    fn go_on(&mut self, entries: usize) -> ControlFlow<Self::Output>;
}

/// Works turn by turn until it is done. Dropped, it ends with the turn it is in; what
/// was done stays.
pub async fn in_slices<W: Work>(work: W) -> io::Result<W::Output> {
    in_slices_timed(work).await.map(|(output, _)| output)
}

/// The same, with the time that its own turns took.
pub async fn in_slices_timed<W: Work>(mut work: W) -> io::Result<(W::Output, Duration)> {
    let mut worked = Duration::ZERO;
    loop {
        let turn = TURNS.acquire().await.map_err(io::Error::other)?;
        let (outcome, same, took) = tokio::task::spawn_blocking(move || {
            // The turn ends with the work, not with whoever waits for it.
            let _turn = turn;
            let begun = Instant::now();
            let outcome = work.go_on(ENTRIES);
            (outcome, work, begun.elapsed())
        })
        .await
        .map_err(io::Error::other)?;
        worked += took;
        match outcome {
            ControlFlow::Break(output) => return Ok((output, worked)),
            ControlFlow::Continue(()) => work = same,
        }
    }
}

/// The same without a pause, on a thread that may block: for tests, and for what is
/// known to be small.
pub fn at_once<W: Work>(mut work: W) -> W::Output {
    loop {
        if let ControlFlow::Break(output) = work.go_on(ENTRIES) {
            return output;
        }
    }
}
