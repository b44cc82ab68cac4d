//! The phase of a pod, from the states of its containers.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodSpec};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    pub(crate) fn parse(text: Option<&str>) -> Self {
        match text {
            Some("Running") => Self::Running,
            Some("Succeeded") => Self::Succeeded,
            Some("Failed") => Self::Failed,
            _ => Self::Pending,
        }
    }

    /// As the object has it.
    pub(crate) fn of(pod: &Pod) -> Self {
        Self::parse(pod.status.as_ref().and_then(|status| status.phase.as_deref()))
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }

    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }

    /// What may follow: never another phase than a final one, never back.
    pub(super) fn advance(self, computed: Self) -> Self {
        if self.is_final() { self } else { self.max(computed) }
    }
}

/// What a container's state says of the phase.
enum Standing {
    Waiting,
    Running,
    Succeeded,
    Failed,
}

fn standing(container: &ContainerStatus) -> Standing {
    let state = container.state.clone().unwrap_or_default();
    let exit = |code| {
        if code == 0 {
            Standing::Succeeded
        } else {
            Standing::Failed
        }
    };
    if state.running.is_some() {
        return Standing::Running;
    }
    if let Some(t) = state.terminated {
        return exit(t.exit_code);
    }
    // Between restarts a container counts as what it was last.
    match container.last_state.as_ref().and_then(|s| s.terminated.as_ref()) {
        Some(t) => exit(t.exit_code),
        None => Standing::Waiting,
    }
}

/// `ended`: nothing of the pod runs and nothing will.
pub(super) fn phase(spec: &PodSpec, init: &[ContainerStatus], app: &[ContainerStatus], ended: bool) -> Phase {
    let policy = spec.restart_policy.as_deref().unwrap_or("Always");
    let mut initializing = false;
    let specs = spec.init_containers.iter().flatten();
    for (spec, status) in specs.zip(init) {
        let sidecar = spec.restart_policy.as_deref() == Some("Always");
        match standing(status) {
            Standing::Failed if !sidecar && policy == "Never" => return Phase::Failed,
            Standing::Succeeded if !sidecar => {}
            Standing::Running if sidecar && status.started == Some(true) => {}
            // A sidecar that stopped after the app containers did.
            Standing::Succeeded | Standing::Failed if sidecar => {}
            _ => initializing = true,
        }
    }
    let (mut waiting, mut running, mut succeeded, mut failed) = (0, 0, 0, 0);
    for container in app {
        match standing(container) {
            Standing::Waiting => waiting += 1,
            Standing::Running => running += 1,
            Standing::Succeeded => succeeded += 1,
            Standing::Failed => failed += 1,
        }
    }
    if ended {
        return if waiting == 0 && running == 0 && failed == 0 && succeeded > 0 {
            Phase::Succeeded
        } else {
            Phase::Failed
        };
    }
    let started = running + succeeded + failed > 0;
    if initializing && !started || waiting > 0 {
        return Phase::Pending;
    }
    if running > 0 {
        return Phase::Running;
    }
    match (policy, failed) {
        ("Always", _) => Phase::Running,
        (_, 0) => Phase::Succeeded,
        ("Never", _) => Phase::Failed,
        // OnFailure: what failed is started again.
        _ => Phase::Running,
    }
}
