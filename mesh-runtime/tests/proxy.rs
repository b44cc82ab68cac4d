//! Tests of the data path between two hosts, as they are in use: real
//! namespaces, the real redirection, and a control plane that a test can tell
//! what to say. They need root and end loudly without it.

#[path = "proxy/control.rs"]
mod control;
#[path = "proxy/lab.rs"]
mod lab;

#[path = "proxy/traffic.rs"]
mod traffic;
