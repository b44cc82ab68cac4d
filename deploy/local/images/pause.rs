//! The process that holds a pod's namespaces while its containers come and go.
//! It does nothing, for ever; containerd ends it with SIGKILL.

fn main() {
    loop {
        std::thread::park();
    }
}
