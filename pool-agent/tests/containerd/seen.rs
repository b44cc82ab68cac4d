//! What the agent's Watch has told one tenant, kept for tests to look at.

use std::{collections::HashMap, sync::Mutex};

use pool_agent_api::{
    SandboxKey, SandboxStatus,
    status::PodEvent,
    wire::{WatchRequest, pool_agent_client::PoolAgentClient, watch_event::Event},
};
use tokio::sync::watch;
use tonic::transport::Channel;

/// Everything since the beginning; the statuses of the agent's present life.
#[derive(Default)]
pub(super) struct Told {
    /// None of an agent that has not told yet what there is.
    pub(super) statuses: HashMap<SandboxKey, SandboxStatus>,
    /// All that were told of each sandbox, oldest first.
    pub(super) history: Vec<SandboxStatus>,
    pub(super) events: Vec<PodEvent>,
    pub(super) connected: bool,
}

pub(super) struct Seen {
    told: Mutex<Told>,
    changed: watch::Sender<u64>,
}

impl Seen {
    pub(super) fn new() -> Self {
        Self {
            told: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Watches until the process ends, over the agent's deaths.
    pub(super) async fn follow(&self, mut agent: PoolAgentClient<Channel>) {
        loop {
            if let Ok(stream) = agent.watch(WatchRequest {}).await {
                let mut stream = stream.into_inner();
                while let Ok(Some(event)) = stream.message().await {
                    if let Some(event) = event.event {
                        self.with(|told| told.take(event));
                    }
                }
                self.with(|told| {
                    told.connected = false;
                    told.statuses.clear();
                });
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Told) -> T) -> T {
        let answer = f(&mut self.told.lock().unwrap());
        self.changed.send_modify(|n| *n += 1);
        answer
    }

    pub(super) fn look<T>(&self, f: impl FnOnce(&Told) -> T) -> T {
        f(&self.told.lock().unwrap())
    }

    /// Waits until there is an answer.
    pub(super) async fn until<T>(&self, answer: impl Fn(&Told) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(answer) = self.look(&answer) {
                return answer;
            }
            // The sender is ours.
            changed.changed().await.unwrap();
        }
    }
}

impl Told {
    fn take(&mut self, event: Event) {
        self.connected = true;
        match event {
            Event::Status(status) => {
                let status = SandboxStatus::try_from(status).unwrap();
                self.history.push(status.clone());
                self.statuses.insert(status.key.clone(), status);
            }
            Event::Forgotten(key) => {
                self.statuses.remove(&SandboxKey::from_wire(Some(key)).unwrap());
            }
            Event::PodEvent(event) => self.events.push(PodEvent::try_from(event).unwrap()),
            Event::Synced(_) => {}
        }
    }
}
