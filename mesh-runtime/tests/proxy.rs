//! Tests of the data path between two hosts, as they are in use: real
//! namespaces, the real redirection, and a control plane that a test can tell
//! what to say. They need root and end loudly without it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[path = "proxy/control.rs"]
mod control;
#[path = "proxy/lab.rs"]
mod lab;

#[path = "proxy/dns.rs"]
mod dns;
#[path = "proxy/hostile.rs"]
mod hostile;
#[path = "proxy/lifetime.rs"]
mod lifetime;
#[path = "proxy/off_limits.rs"]
mod off_limits;
#[path = "proxy/policy.rs"]
mod policy;
#[path = "proxy/reach.rs"]
mod reach;
#[path = "proxy/shares.rs"]
mod shares;
#[path = "proxy/traffic.rs"]
mod traffic;
