//! Tests of redirection in a real kernel: namespaces, devices, packets. They
//! need root and end loudly without it.
#![allow(unsafe_code, reason = "packet sockets and the kernel's own structures")]
#![allow(clippy::unwrap_used, reason = "a test may end so")]

mod frame;
mod lab;

mod capture;
mod inbound;
mod lifetime;
mod off_limits;
mod refusal;
mod right;
mod runtime;
mod unmeshed;
