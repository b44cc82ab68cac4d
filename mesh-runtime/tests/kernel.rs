//! Tests of redirection in a real kernel: namespaces, devices, packets. They
//! need root and end loudly without it.
#![allow(unsafe_code, reason = "packet sockets")]

#[path = "kernel/frame.rs"]
mod frame;
#[path = "kernel/lab.rs"]
mod lab;

#[path = "kernel/capture.rs"]
mod capture;
#[path = "kernel/inbound.rs"]
mod inbound;
#[path = "kernel/lifetime.rs"]
mod lifetime;
#[path = "kernel/refusal.rs"]
mod refusal;
#[path = "kernel/unmeshed.rs"]
mod unmeshed;
