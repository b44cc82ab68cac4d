//! Spindrift end to end: two hosts, a real control plane, real containers and
//! packets, and the faults it has to survive.
//!
//! A test is an `async fn(&Scope) -> Result`, named by the sentence it holds,
//! and listed in its module's `tests()`. All share one lab; those that kill
//! things run alone. `SPINDRIFT_TEST_CELL=true` gives the lab's pool a cell: the same
//! tests hold, and some of its own. `SPINDRIFT_TEST_ELASTIC=true` gives it no hosts but
//! those that come and go: then only the tests of `elastic` hold. `SPINDRIFT_TEST_KEEP=true` leaves the lab for the next run
//! and for a person to look at.

// Where a test has to end with a failure, it may do so in a word.
#![allow(clippy::unwrap_used)]

mod e2e {
    pub(crate) mod attacks;
    pub(crate) mod cell;
    pub(crate) mod elastic;
    pub(crate) mod faults;
    pub(crate) mod hostile;
    pub(crate) mod kubelet;
    pub(crate) mod mesh;
    pub(crate) mod node;
    pub(crate) mod pods;
    mod resolver;
    pub(crate) mod suite;
    pub(crate) mod volumes;
}

use std::process::ExitCode;

use e2e::suite;
use spindrift_tests::stage::Settings;

fn main() -> ExitCode {
    let settings = Settings::from_environment();
    let modules = [
        e2e::node::tests(),
        e2e::pods::tests(),
        e2e::volumes::tests(),
        e2e::kubelet::tests(),
        e2e::mesh::tests(),
        e2e::hostile::tests(),
        e2e::attacks::tests(),
        if settings.cell() {
            e2e::cell::tests()
        } else {
            vec![]
        },
        if settings.elastic() {
            e2e::elastic::tests()
        } else {
            vec![]
        },
        e2e::faults::tests(),
        suite::tests(),
    ];
    suite::run(settings, modules.into_iter().flatten().collect())
}
