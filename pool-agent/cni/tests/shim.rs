//! The built plugin, run as containerd's libcni runs it: the call in the
//! environment, the configuration on standard input, the answer on standard
//! output. On the other end of the socket is the agent's own server, which hears
//! nobody but root.
#![allow(clippy::unwrap_used, reason = "a test may end so")]

use std::{
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use pool_agent::cni::{self, Desk, Joined};
use serde_json::{Value, json};

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1";

/// What libcni passes for an ADD, a DEL and a CHECK.
const POD: [(&str, &str); 4] = [
    ("CNI_CONTAINERID", "4f2b"),
    ("CNI_NETNS", "/proc/self/ns/net"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_ARGS", ARGS),
];

/// The agent's end of the socket.
struct Agent {
    directory: tempfile::TempDir,
    desk: Desk,
    runtime: tokio::runtime::Runtime,
}

impl Agent {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let desk = Desk::default();
        let _within = runtime.enter();
        let listener = cni::listen(&directory.path().join("cni.sock")).unwrap();
        runtime.spawn(cni::serve(listener, desk.clone()));
        Self {
            desk,
            runtime,
            directory,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("cni.sock")
    }
}

fn config(version: &str, socket: &Path) -> Value {
    json!({"cniVersion": version, "name": "spindrift", "type": "spindrift-cni", "socket": socket})
}

fn run(command: &str, variables: &[(&str, &str)], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_spindrift-cni"))
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_PATH", "/opt/cni/bin")
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that refuses its environment reads no input.
    child.stdin.take().unwrap().write_all(input).ok();
    child.wait_with_output().unwrap()
}

fn call(command: &str, variables: &[(&str, &str)], config: &Value) -> Output {
    run(command, variables, config.to_string().as_bytes())
}

/// The one JSON document on standard output, of a call that went well.
fn result(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The error of a call that did not, by its code.
#[track_caller]
fn refused(output: &Output, code: u64) -> String {
    assert!(!output.status.success(), "{output:?}");
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], code, "{error}");
    assert!(error["cniVersion"].is_string(), "{error}");
    error["msg"].as_str().unwrap().to_owned()
}

#[track_caller]
fn silent(output: &Output) {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
}

#[test]
fn version_is_answered_without_an_agent() {
    for version in ["1.0.0", "1.1.0", "0.4.0"] {
        let answer = result(&call("VERSION", &[], &json!({"cniVersion": version})));
        assert_eq!(answer["cniVersion"], version);
        assert_eq!(answer["supportedVersions"], json!(["1.0.0", "1.1.0"]));
    }
    assert_eq!(result(&run("VERSION", &[], b""))["cniVersion"], "1.0.0");
}

#[test]
fn an_add_prints_what_the_agent_gave_the_pod_in_the_version_that_was_asked_for() {
    let agent = Agent::start();
    for version in ["1.0.0", "1.1.0"] {
        let mut expectation = agent.desk.expect(&"u-1".parse().unwrap());
        let driver = agent.runtime.spawn(async move {
            let add = expectation.next().await.unwrap();
            let joined = Joined {
                address: "10.77.1.2".parse().unwrap(),
                gateway: "169.254.1.1".parse().unwrap(),
                mac: [2, 0, 10, 77, 1, 2],
                mtu: 1500,
            };
            add.answer.send(Ok(joined)).unwrap();
            (add.sandbox, add.netns)
        });
        let answer = result(&call("ADD", &POD, &config(version, &agent.socket())));
        assert_eq!(answer["cniVersion"], version);
        assert_eq!(answer["ips"][0]["address"], "10.77.1.2/32");
        assert_eq!(answer["interfaces"][0]["sandbox"], "/proc/self/ns/net");
        let (sandbox, netns) = agent.runtime.block_on(driver).unwrap();
        assert_eq!(
            (sandbox.as_str(), netns.to_str()),
            ("4f2b", Some("/proc/self/ns/net"))
        );
    }
}

#[test]
fn an_add_that_the_agent_refuses_tells_its_reason() {
    let agent = Agent::start();
    let config = config("1.0.0", &agent.socket());
    let message = refused(&call("ADD", &POD, &config), 100);
    assert!(message.contains("shop/web-0"), "{message}");

    let mut expectation = agent.desk.expect(&"u-1".parse().unwrap());
    agent.runtime.spawn(async move {
        let add = expectation.next().await.unwrap();
        add.answer.send(Err("no room for a device".into())).unwrap();
    });
    let message = refused(&call("ADD", &POD, &config), 101);
    assert_eq!(message, "no room for a device");
}

#[test]
fn a_variable_that_is_missing_or_wrong_is_refused_by_name() {
    let agent = Agent::start();
    let config = config("1.0.0", &agent.socket());
    for (command, needed) in [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ] {
        for &missing in needed {
            let others: Vec<_> = POD.into_iter().filter(|(name, _)| *name != missing).collect();
            let message = refused(&call(command, &others, &config), 4);
            assert!(
                message.contains(missing),
                "{command} without {missing}: {message}"
            );
        }
    }
    for (name, value) in [
        ("CNI_CONTAINERID", "../x"),
        ("CNI_CONTAINERID", ""),
        ("CNI_NETNS", "run/netns/x"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "sixteen-letters-"),
    ] {
        let mut variables = POD.to_vec();
        variables.push((name, value));
        let message = refused(&call("ADD", &variables, &config), 4);
        assert!(message.contains(name), "{name}={value:?}: {message}");
    }
    for unknown in ["", "add", "PLUG"] {
        let message = refused(&call(unknown, &POD, &config), 4);
        assert!(message.contains("CNI_COMMAND"), "{unknown:?}: {message}");
    }
    // The agent's own part of it: who the pod is.
    let others: Vec<_> = POD.into_iter().filter(|(name, _)| *name != "CNI_ARGS").collect();
    assert!(refused(&call("ADD", &others, &config), 4).contains("CNI_ARGS"));
}

#[test]
fn a_configuration_that_does_not_read_or_lacks_the_socket_is_refused() {
    for input in [&b""[..], b"{", b"\xff\xfe", &[b' '; 300 << 10]] {
        for command in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            refused(&run(command, &POD, input), 6);
        }
    }
    let message = refused(&call("ADD", &POD, &json!({"cniVersion": "1.0.0"})), 7);
    assert!(message.contains("socket"), "{message}");
}

#[test]
fn a_version_that_is_not_spoken_is_refused_by_all_but_del() {
    let agent = Agent::start();
    for version in ["0.4.0", "2.0.0", "x"] {
        let config = config(version, &agent.socket());
        for command in ["ADD", "CHECK", "STATUS", "GC"] {
            let message = refused(&call(command, &POD, &config), 1);
            assert!(message.contains(version), "{message}");
        }
        silent(&call("DEL", &POD, &config));
    }
}

#[test]
fn del_succeeds_again_and_again_with_the_agent_and_without() {
    let agent = Agent::start();
    let without_namespace: Vec<_> = POD.into_iter().filter(|(name, _)| *name != "CNI_NETNS").collect();
    for _ in 0..2 {
        silent(&call("DEL", &POD, &config("1.0.0", &agent.socket())));
        silent(&call(
            "DEL",
            &without_namespace,
            &config("1.0.0", &agent.socket()),
        ));
        silent(&call(
            "DEL",
            &POD,
            &config("1.0.0", Path::new("/nowhere/cni.sock")),
        ));
    }
}

#[test]
fn check_looks_for_the_device_and_gc_and_status_have_nothing_to_say() {
    let agent = Agent::start();
    let config = config("1.1.0", &agent.socket());
    let on = |device| {
        let mut variables = POD.to_vec();
        variables.push(("CNI_IFNAME", device));
        call("CHECK", &variables, &config)
    };
    silent(&on("lo"));
    assert!(refused(&on("none0"), 101).contains("none0"));
    silent(&call("STATUS", &[], &config));
    silent(&call("GC", &[], &config));
}

#[test]
fn an_agent_that_is_away_or_goes_away_is_to_be_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let tried = |agent: &str| {
        let config = config("1.1.0", &socket);
        for (command, code) in [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 51)] {
            let message = refused(&call(command, &POD, &config), code);
            assert!(message.contains("cni.sock"), "{agent}: {message}");
        }
        silent(&call("DEL", &POD, &config));
    };
    tried("none");
    // As a killed one leaves it: the socket without anybody who listens.
    drop(UnixListener::bind(&socket).unwrap());
    tried("killed");
    // It dies with the request in hand.
    std::fs::remove_file(&socket).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            stream.unwrap().read_to_end(&mut vec![]).unwrap();
        }
    });
    tried("killed at work");
}

#[test]
fn an_answer_that_does_not_read_is_no_result() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.read_to_end(&mut vec![]).unwrap();
            stream.write_all(b"{\"ok\": true, \"output\": {").unwrap();
        }
    });
    refused(&call("ADD", &POD, &config("1.0.0", &socket)), 6);
}
