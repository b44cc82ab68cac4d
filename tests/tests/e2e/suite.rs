//! Runs the tests on one lab and tells their results as cargo's own runner does.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};
use futures::{FutureExt, future::LocalBoxFuture};
use libtest_mimic::{Arguments, Failed, Trial};
use spindrift_local::{Lab, component::Component, supervisor};
use spindrift_tests::{Company, Scope, Stage, journal::Mark, stage::Settings};
use tokio::runtime::Runtime;

type Body = for<'a> fn(&'a Scope) -> LocalBoxFuture<'a, anyhow::Result<()>>;

/// One test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) company: Company,
    pub(crate) body: Body,
}

/// The cases of a module: `cases![Others: a, b, c]`, each an async function.
macro_rules! cases {
    ($company:ident: $($test:ident),+ $(,)?) => {
        vec![$($crate::e2e::suite::Case {
            name: concat!(module_path!(), "::", stringify!($test)),
            company: spindrift_tests::Company::$company,
            body: |scope| Box::pin($test(scope)),
        }),+]
    };
}
pub(crate) use cases;

/// Waits dominate most tests, not work: several at once on two cores.
const AT_ONCE: usize = 4;
/// No test has a reason to take longer. One that hangs does not hang the run.
const LIMIT: Duration = Duration::from_secs(300);

pub(crate) fn run(settings: Settings, cases: Vec<Case>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let runtime = match Runtime::new() {
        Ok(runtime) => Arc::new(runtime),
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let stage = Arc::new(Stage::new(settings));
    clear_when_interrupted(&runtime, &stage);
    let trials = cases
        .into_iter()
        .map(|case| {
            let (runtime, stage) = (runtime.clone(), stage.clone());
            Trial::test(short(case.name), move || runtime.block_on(hold(&stage, &case)))
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Err(error) = runtime.block_on(stage.clear()) {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// `e2e::e2e::mesh::x` as `mesh::x`.
fn short(name: &str) -> &str {
    name.strip_prefix("e2e::e2e::").unwrap_or(name)
}

async fn hold(stage: &Stage, case: &Case) -> Result<(), Failed> {
    let (turn, lab) = stage.enter(case.company).await.map_err(told)?;
    let result = hold_on(&lab, case).await;
    if case.company == Company::Others {
        return result;
    }
    let mended = stage.mend(&lab, short(case.name)).await.map_err(told);
    drop(turn);
    // Why it failed says more than what it left.
    result.and(mended)
}

async fn hold_on(lab: &Arc<Lab>, case: &Case) -> Result<(), Failed> {
    let started = Instant::now();
    let scope = Scope::open(lab.clone(), case.name).await.map_err(told)?;
    let body = AssertUnwindSafe((case.body)(&scope)).catch_unwind();
    let result = match tokio::time::timeout(LIMIT, body).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(anyhow!("panicked: {}", words(panic.as_ref()))),
        Err(_) => Err(anyhow!("it did not end within {} s", LIMIT.as_secs())),
    };
    let result = match result {
        Ok(()) => scope.close().await.map_err(told),
        Err(error) => {
            // First the facts, then the clearing away of what they are about.
            let facts = scope.told().await;
            let mut failure = format!("{error:#}\n{facts}");
            if let Err(error) = scope.close().await {
                failure.push_str(&format!("  and then: {error:#}\n"));
            }
            Err(failure.into())
        }
    };
    eprintln!(
        "        {:5.1} s  {}",
        started.elapsed().as_secs_f64(),
        short(case.name)
    );
    result
}

fn told(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}

/// A person's Ctrl-C, or CI giving up: nothing stays behind.
fn clear_when_interrupted(runtime: &Arc<Runtime>, stage: &Arc<Stage>) {
    let (runtime, stage) = (runtime.clone(), stage.clone());
    std::thread::spawn(move || {
        runtime.block_on(async {
            interrupted().await;
            if let Err(error) = stage.clear().await {
                eprintln!("error: {error:#}");
            }
            std::process::exit(130);
        })
    });
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// What is looked at when all else is done.
pub(crate) fn tests() -> Vec<Case> {
    cases![Alone: no_component_panicked_in_the_whole_run, no_component_ended_by_itself_in_the_whole_run]
}

async fn no_component_ended_by_itself_in_the_whole_run(scope: &Scope) -> anyhow::Result<()> {
    let lab = scope.lab();
    let watching = Component::find(lab.layout(), supervisor::COMPONENT)?;
    ensure!(
        watching.process(lab.layout()).is_some(),
        "nobody supervises the lab"
    );
    let log = std::fs::read_to_string(watching.log(lab.layout()))?;
    let ended: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(supervisor::ENDED))
        .collect();
    ensure!(ended.is_empty(), "{ended:#?}");
    Ok(())
}

async fn no_component_panicked_in_the_whole_run(scope: &Scope) -> anyhow::Result<()> {
    let lines = Mark::beginning(scope.lab()).all()?;
    ensure!(!lines.is_empty(), "no component has logged anything");
    let panics: Vec<&String> = lines.iter().filter(|line| line.contains("panicked at")).collect();
    ensure!(panics.is_empty(), "{panics:#?}");
    Ok(())
}
