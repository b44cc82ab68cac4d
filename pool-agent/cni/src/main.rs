//! The CNI plugin: what containerd runs to join a pod to its network. It passes
//! its environment and its standard input to the pool agent over a unix socket
//! and prints the answer. All that is decided is decided there.
//!
//! Protocol: the CNI specification 1.1; an error is JSON on standard output and a
//! non-zero exit; a command without a result prints nothing.

mod call;

use std::{
    env,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::ExitCode,
    time::Duration,
};

use serde_json::{Value, json};

use call::{Call, Command, InvalidEnvironment};

/// Error codes of the specification.
mod code {
    pub(super) const INVALID_ENVIRONMENT: u32 = 4;
    pub(super) const IO_FAILURE: u32 = 5;
    pub(super) const DECODING: u32 = 6;
    pub(super) const INVALID_CONFIGURATION: u32 = 7;
    pub(super) const TRY_AGAIN: u32 = 11;
    /// To STATUS: not available, and running containers may be cut off. Without its
    /// agent a pod's new connections are dropped.
    pub(super) const UNAVAILABLE_AND_LIMITED: u32 = 51;
}

/// Those of the agent's answers, the oldest first.
const VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];
/// A little longer than the agent may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// More is not configuration.
const MAX_INPUT: u64 = 192 << 10;

#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error(transparent)]
    Environment(#[from] InvalidEnvironment),
    #[error("reading the network configuration: {0}")]
    Input(io::Error),
    #[error("the network configuration is not JSON: {0}")]
    Configuration(serde_json::Error),
    #[error("the network configuration has more than {MAX_INPUT} bytes")]
    TooLarge,
    #[error("the network configuration has no `socket`: the path on which pool-agent listens")]
    NoSocket,
    #[error("reaching the pool agent at {socket}: {source}")]
    Agent { socket: String, source: io::Error },
    #[error("the pool agent's answer does not read: {0}")]
    Answer(serde_json::Error),
}

impl ShimError {
    fn code(&self, command: Option<Command>) -> u32 {
        match self {
            Self::Environment(_) => code::INVALID_ENVIRONMENT,
            Self::Input(_) => code::IO_FAILURE,
            Self::Configuration(_) | Self::TooLarge | Self::Answer(_) => code::DECODING,
            Self::NoSocket => code::INVALID_CONFIGURATION,
            Self::Agent { .. } if command == Some(Command::Status) => code::UNAVAILABLE_AND_LIMITED,
            // It is being restarted; containerd's caller tries again.
            Self::Agent { .. } => code::TRY_AGAIN,
        }
    }
}

/// What goes to standard output (null: nothing), and whether it went well.
struct Outcome {
    ok: bool,
    output: Value,
}

fn main() -> ExitCode {
    let call = Call::read(variable);
    let command = call.as_ref().ok().map(|call| call.command);
    let mut version = VERSIONS[0].to_owned();
    let Outcome { ok, output } = run(call, &mut version).unwrap_or_else(|error| Outcome {
        ok: false,
        output: json!({
            "cniVersion": version,
            "code": error.code(command),
            "msg": error.to_string(),
        }),
    });
    if !output.is_null() && writeln!(io::stdout(), "{output}").is_err() {
        return ExitCode::FAILURE;
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `version` becomes the one that the configuration asks for, also for an error.
fn run(call: Result<Call, InvalidEnvironment>, version: &mut String) -> Result<Outcome, ShimError> {
    let call = call?;
    let config = configuration(call.command)?;
    if let Some(asked) = config.get("cniVersion").and_then(Value::as_str) {
        *version = asked.chars().take(16).collect();
    }
    if call.command == Command::Version {
        return Ok(Outcome {
            ok: true,
            output: json!({"cniVersion": version, "supportedVersions": VERSIONS}),
        });
    }
    let socket = config.get("socket").and_then(Value::as_str);
    let socket = socket.ok_or(ShimError::NoSocket)?;
    match ask(socket, &call.request(&config)) {
        // Deleting must succeed without the agent: it sweeps when it is back.
        Err(ShimError::Agent { .. }) if call.command == Command::Del => Ok(Outcome {
            ok: true,
            output: Value::Null,
        }),
        outcome => outcome,
    }
}

fn configuration(command: Command) -> Result<Value, ShimError> {
    let mut input = vec![];
    io::stdin()
        .take(MAX_INPUT + 1)
        .read_to_end(&mut input)
        .map_err(ShimError::Input)?;
    if input.len() as u64 > MAX_INPUT {
        return Err(ShimError::TooLarge);
    }
    // A person who asks for the version pipes nothing in.
    if command == Command::Version && input.trim_ascii().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&input).map_err(ShimError::Configuration)
}

fn ask(socket: &str, request: &Value) -> Result<Outcome, ShimError> {
    let answer = exchange(socket, request.to_string().as_bytes()).and_then(|answer| {
        // It takes the connection before it ends, if it ends now.
        if answer.is_empty() {
            Err(io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(answer)
        }
    });
    let answer = answer.map_err(|source| ShimError::Agent {
        socket: socket.to_owned(),
        source,
    })?;
    let mut answer: Value = serde_json::from_slice(&answer).map_err(ShimError::Answer)?;
    Ok(Outcome {
        ok: answer["ok"].as_bool().unwrap_or(false),
        output: answer["output"].take(),
    })
}

fn exchange(socket: &str, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = vec![];
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// The protocol is in the environment; this program has no other configuration.
#[expect(
    clippy::disallowed_methods,
    reason = "CNI passes its arguments in the environment"
)]
fn variable(name: &str) -> Option<String> {
    env::var(name).ok()
}
