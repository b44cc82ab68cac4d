//! Runs the tests on one host and tells their results as cargo's own runner does.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::anyhow;
use futures::{FutureExt, future::LocalBoxFuture};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::{
    runtime::Runtime,
    sync::{OnceCell, RwLock},
};

use super::host::{self, Host};

type Body = for<'a> fn(&'a Host) -> LocalBoxFuture<'a, anyhow::Result<()>>;

/// One test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) company: Company,
    pub(crate) body: Body,
}

/// Whom a test bears beside it on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    /// It disturbs nobody.
    Others,
    /// It kills the agent, or containerd.
    Alone,
}

/// The cases of a module: `cases![Others: a, b, c]`, each an async function.
macro_rules! cases {
    ($company:ident: $($test:ident),+ $(,)?) => {
        vec![$($crate::containerd::suite::Case {
            name: concat!(module_path!(), "::", stringify!($test)),
            company: $crate::containerd::suite::Company::$company,
            body: |host| Box::pin($test(host)),
        }),+]
    };
}
pub(crate) use cases;

/// Most tests wait rather than work.
const AT_ONCE: usize = 8;
/// No test has a reason to take longer. One that hangs does not hang the run.
const LIMIT: Duration = Duration::from_secs(120);

/// The host of this process: made by the test that needs it first.
#[derive(Default)]
struct Stage {
    host: OnceCell<Result<Host, String>>,
    turns: RwLock<()>,
}

pub(crate) fn run(cases: Vec<Case>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let runtime = match Runtime::new() {
        Ok(runtime) => Arc::new(runtime),
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let stage = Arc::new(Stage::default());
    clear_when_interrupted(&runtime);
    let trials = cases
        .into_iter()
        .map(|case| {
            let (runtime, stage) = (runtime.clone(), stage.clone());
            Trial::test(short(case.name), move || runtime.block_on(hold(&stage, &case)))
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if stage.host.initialized()
        && let Err(error) = runtime.block_on(host::remove())
    {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// `containerd::containerd::images::x` as `images::x`.
fn short(name: &str) -> &str {
    name.strip_prefix("containerd::containerd::").unwrap_or(name)
}

async fn hold(stage: &Stage, case: &Case) -> Result<(), Failed> {
    let (_shared, _alone) = match case.company {
        Company::Others => (Some(stage.turns.read().await), None),
        Company::Alone => (None, Some(stage.turns.write().await)),
    };
    let made = stage
        .host
        .get_or_init(|| async { Host::up().await.map_err(|error| format!("{error:#}")) })
        .await;
    let host = match made {
        Ok(host) => host,
        Err(reason) => return Err(format!("the host did not come up: {reason}").into()),
    };
    let (begun, mark) = (Instant::now(), host.mark());
    let body = AssertUnwindSafe((case.body)(host)).catch_unwind();
    let result = match tokio::time::timeout(LIMIT, body).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(anyhow!("panicked: {}", words(panic.as_ref()))),
        Err(_) => Err(anyhow!("it did not end within {} s", LIMIT.as_secs())),
    };
    eprintln!(
        "        {:5.1} s  {}",
        begun.elapsed().as_secs_f64(),
        short(case.name)
    );
    result.map_err(|error| format!("{error:#}\n{}", host.told(mark)).into())
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}

/// A person's Ctrl-C, or CI giving up: nothing stays behind.
fn clear_when_interrupted(runtime: &Arc<Runtime>) {
    let runtime = runtime.clone();
    std::thread::spawn(move || {
        runtime.block_on(async {
            interrupted().await;
            if let Err(error) = host::remove().await {
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
