//! Starts again what ends by itself, as an operator's supervisor would: systemd on a
//! host, a Deployment in a cluster. What a person, a test or `down` has stopped stays
//! stopped.

use std::{collections::HashMap, time::Duration};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::time::Instant;

use crate::{
    artifacts::{ArtifactError, Spindrift},
    component::Component,
    instance::Layout,
};

pub const COMPONENT: &str = "supervisor";
/// In its log, with the component's name: something ended that nobody had stopped.
pub const ENDED: &str = "a component has ended by itself and is started again";

const LOOK: Duration = Duration::from_millis(250);
/// A component that ends again and again is started after 0.5 s, 1 s, 2 s… and then
/// every 10 s, for as long as the instance lives.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(10);
/// One that has run for so long starts anew.
const GOOD: Duration = Duration::from_secs(60);

/// What to run as the instance's supervisor.
pub fn component(layout: &Layout, programs: &Spindrift) -> Result<Component, ArtifactError> {
    Ok(Component::new(COMPONENT, programs.program("spindrift-local")?)
        .arg("supervise")
        .flag("instance", layout.instance()))
}

/// Until its process is ended.
pub async fn run(layout: &Layout) {
    let mut failing = HashMap::<String, Failing>::new();
    loop {
        for component in Component::all(layout) {
            if component.name != COMPONENT && component.has_failed(layout) {
                let failing = failing.entry(component.name.clone()).or_insert_with(Failing::new);
                if failing.may_start(Instant::now()) {
                    start(&component, layout).await;
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn start(component: &Component, layout: &Layout) {
    match component.revive(layout).await {
        Ok(true) => tracing::warn!(component = component.name, "{ENDED}"),
        // It was stopped or started meanwhile.
        Ok(false) => {}
        Err(error) => tracing::error!(component = component.name, error = %error, "cannot start it again"),
    }
}

/// When a component may be started again.
struct Failing {
    backoff: ExponentialBackoff,
    /// When it was last allowed to start.
    started: Option<Instant>,
    /// Not before.
    next: Option<Instant>,
}

impl Failing {
    fn new() -> Self {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(FIRST)
            .with_max_delay(LONGEST)
            .without_max_times()
            .build();
        Self {
            backoff,
            started: None,
            next: None,
        }
    }

    /// Called while it has ended; true: start it now.
    fn may_start(&mut self, now: Instant) -> bool {
        if self.started.is_some_and(|started| now - started > GOOD) {
            *self = Self::new();
        }
        let next = *self
            .next
            .get_or_insert_with(|| now + self.backoff.next().unwrap_or(LONGEST));
        if now < next {
            return false;
        }
        self.started = Some(now);
        self.next = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_again_and_again_is_started_ever_more_slowly_and_one_good_minute_is_a_fresh_start() {
        let mut failing = Failing::new();
        let mut now = Instant::now();
        let mut waits = vec![];
        for _ in 0..8 {
            let ended = now;
            while !failing.may_start(now) {
                now += Duration::from_millis(100);
            }
            waits.push(now - ended);
        }
        assert!(waits.is_sorted(), "{waits:?}");
        assert_eq!((waits[0], waits[7]), (FIRST, LONGEST));
        now += GOOD + Duration::from_secs(1);
        assert!(!failing.may_start(now));
        assert!(failing.may_start(now + FIRST));
    }
}
