//! pool-agent on a real containerd and runc, asked as a virtual node asks it: by
//! its gRPC service, over the pool's mutual TLS. No cluster, no virtual node: what
//! a test wants of a host is in its spec, and what becomes of it in the statuses.
//!
//! All tests share one host; those that kill something of it run alone. A test is
//! an `async fn(&Host) -> Result`, listed in its module's `tests()`.

// Where a test has to end with a failure, it may do so in a word.
#![allow(clippy::unwrap_used)]

mod containerd {
    mod control;
    mod host;
    mod pod;
    mod seen;
    pub(crate) mod suite;

    pub(crate) mod calls;
    pub(crate) mod containers;
    pub(crate) mod faults;
    pub(crate) mod files;
    pub(crate) mod images;
    pub(crate) mod logs;
    pub(crate) mod network;
    pub(crate) mod privilege;
    pub(crate) mod probes;
    pub(crate) mod right;
    pub(crate) mod room;
    pub(crate) mod usage;
    pub(crate) mod volumes;
}

use std::process::ExitCode;

use containerd::suite;

fn main() -> ExitCode {
    let modules = [
        containerd::images::tests(),
        containerd::calls::tests(),
        containerd::containers::tests(),
        containerd::volumes::tests(),
        containerd::files::tests(),
        containerd::probes::tests(),
        containerd::room::tests(),
        containerd::logs::tests(),
        containerd::network::tests(),
        containerd::right::tests(),
        containerd::privilege::tests(),
        containerd::privilege::alone(),
        containerd::images::tests_alone(),
        containerd::usage::tests(),
        containerd::right::tests_alone(),
        containerd::faults::tests(),
    ];
    suite::run(modules.into_iter().flatten().collect())
}
