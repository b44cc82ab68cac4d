//! The CNI plugin: what containerd runs to join a pod to its network. It passes
//! its environment and its standard input to the pool agent over a unix socket
//! and prints the answer. All that is decided is decided there.
//!
//! Protocol: the CNI specification 1.0.0; an error is JSON on standard output
//! and a non-zero exit.

use std::{
    env,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::ExitCode,
    time::Duration,
};

use serde_json::{Value, json};

/// Of the specification: "I/O failure", "failed to decode content", "try again later".
const IO_FAILURE: u32 = 5;
const DECODING: u32 = 6;
const TRY_AGAIN: u32 = 11;

/// A little longer than the agent may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// More is not configuration.
const MAX_INPUT: u64 = 192 << 10;

#[derive(Debug, thiserror::Error)]
enum ShimError {
    #[error("reading the network configuration: {0}")]
    Input(io::Error),
    #[error("the network configuration is not JSON: {0}")]
    Configuration(serde_json::Error),
    #[error("the network configuration has no `socket`")]
    NoSocket,
    #[error("reaching the pool agent at {socket}: {source}")]
    Agent { socket: String, source: io::Error },
    #[error("the pool agent's answer does not read: {0}")]
    Answer(serde_json::Error),
}

impl ShimError {
    fn code(&self) -> u32 {
        match self {
            Self::Input(_) => IO_FAILURE,
            Self::Configuration(_) | Self::NoSocket => DECODING,
            // It is being restarted; containerd's caller tries again.
            Self::Agent { .. } => TRY_AGAIN,
            Self::Answer(_) => DECODING,
        }
    }
}

fn main() -> ExitCode {
    let (ok, output) = match run() {
        Ok(answer) => answer,
        Err(error) => (
            false,
            json!({"cniVersion": "1.0.0", "code": error.code(), "msg": error.to_string()}),
        ),
    };
    if !output.is_null() && writeln!(io::stdout(), "{output}").is_err() {
        return ExitCode::FAILURE;
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run() -> Result<(bool, Value), ShimError> {
    let mut input = vec![];
    io::stdin()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .map_err(ShimError::Input)?;
    let config: Value = serde_json::from_slice(&input).map_err(ShimError::Configuration)?;
    let command = variable("CNI_COMMAND");
    let Some(socket) = config.get("socket").and_then(Value::as_str) else {
        // A runtime that asks for the version may give nothing but a version.
        if command == "VERSION" {
            return Ok((
                true,
                json!({"cniVersion": "1.0.0", "supportedVersions": ["1.0.0", "1.1.0"]}),
            ));
        }
        return Err(ShimError::NoSocket);
    };
    let request = json!({
        "command": command,
        "container_id": variable("CNI_CONTAINERID"),
        "netns": variable("CNI_NETNS"),
        "ifname": variable("CNI_IFNAME"),
        "args": variable("CNI_ARGS"),
        "config": config,
    });
    let answer = ask(socket, request.to_string().as_bytes()).map_err(|source| ShimError::Agent {
        socket: socket.to_owned(),
        source,
    });
    let answer = match answer {
        // Deleting must succeed without the agent: it sweeps when it is back.
        Err(_) if command == "DEL" => return Ok((true, Value::Null)),
        answer => answer?,
    };
    let answer: Value = serde_json::from_slice(&answer).map_err(ShimError::Answer)?;
    let ok = answer.get("ok").and_then(Value::as_bool).unwrap_or(false);
    Ok((ok, answer.get("output").cloned().unwrap_or(Value::Null)))
}

fn ask(socket: &str, request: &[u8]) -> io::Result<Vec<u8>> {
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
fn variable(name: &str) -> String {
    env::var(name).unwrap_or_default()
}
