//! The volumes of a running pod: what they are made of is read again from time to
//! time, and the host is told when it differs.

use std::{collections::BTreeMap, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use pool_agent_api::{
    spec::{Volume, VolumeSource},
    status::Severity,
    wire,
};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{
    super::{
        lifecycle::{Intent, Stage},
        references::{Token, TokenSlot},
        resolve::{Extent, ReadError, resolve},
        translate::{self, Untranslatable},
    },
    Driver, optional,
};
use crate::pool::CallError;

/// How often; a kubelet takes about a minute.
const EVERY: Duration = Duration::from_secs(45);

pub(super) struct Upkeep {
    refreshing: Option<BoxFuture<'static, Result<Refreshed, RefreshError>>>,
    due: Instant,
    tokens: BTreeMap<TokenSlot, Token>,
    /// Of the files the host has, to tell whether it needs others. None: not known.
    volumes: Option<Digest>,
}

pub(super) struct Refreshed {
    tokens: BTreeMap<TokenSlot, Token>,
    volumes: Digest,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum RefreshError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the pod's volumes cannot be made any more")]
    Translate(#[from] Untranslatable),
    #[error(transparent)]
    Call(#[from] CallError),
}

impl Upkeep {
    pub(super) fn new() -> Self {
        Self {
            refreshing: None,
            // Pods that are found together are not looked after together.
            due: Instant::now() + EVERY.mul_f64(rand::random_range(0.1..1.0)),
            tokens: BTreeMap::new(),
            volumes: None,
        }
    }

    /// The pod has another sandbox, of which nothing is known.
    pub(super) fn begin_anew(&mut self) {
        self.refreshing = None;
        self.volumes = None;
        self.hasten();
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    pub(super) fn hasten(&mut self) {
        self.due = Instant::now();
    }

    pub(super) fn tokens(&self) -> &BTreeMap<TokenSlot, Token> {
        &self.tokens
    }

    pub(super) fn keep_tokens(&mut self, tokens: BTreeMap<TokenSlot, Token>) {
        self.tokens = tokens;
    }

    pub(super) fn host_has(&mut self, volumes: &[Volume]) {
        self.volumes = Some(digest(&of_files(volumes.to_vec())));
    }

    /// The answer of a refresh in flight, or never.
    pub(super) async fn refreshed(&mut self) -> Result<Refreshed, RefreshError> {
        let refreshed = optional(&mut self.refreshing).await;
        self.refreshing = None;
        refreshed
    }
}

impl Driver {
    pub(super) fn housekeep(&mut self) {
        self.upkeep.due = Instant::now() + EVERY.mul_f64(rand::random_range(0.8..1.2));
        let (Some(pod), Stage::Placed { place }) = (self.object.clone(), self.lifecycle.stage()) else {
            return;
        };
        let has_files = pod
            .spec
            .iter()
            .flat_map(|s| s.volumes.iter().flatten())
            .any(|v| v.empty_dir.is_none());
        if !has_files || self.upkeep.refreshing.is_some() || self.lifecycle.intent() != Intent::Run {
            return;
        }
        let (key, host) = (self.key(place), place.host.clone());
        let (tools, held, current) = (
            self.tools.clone(),
            self.upkeep.tokens.clone(),
            self.upkeep.volumes,
        );
        let refreshing = async move {
            let resolved = resolve(&tools.client, &pod, &held, Extent::Volumes, Timestamp::now()).await?;
            let facts = tools.facts.borrow().clone();
            let volumes = of_files(translate::volumes(&pod, &resolved, &facts)?);
            let new = digest(&volumes);
            if current != Some(new)
                && let Some(host) = tools.pool.host(&host)
            {
                host.update(&key, volumes).await?;
                debug!("the pod's volumes were brought up to date");
            }
            Ok(Refreshed {
                tokens: resolved.tokens,
                volumes: new,
            })
        };
        self.upkeep.refreshing = Some(refreshing.boxed());
    }

    pub(super) fn take_refreshed(&mut self, refreshed: Result<Refreshed, RefreshError>) {
        match refreshed {
            Ok(refreshed) => {
                self.upkeep.tokens = refreshed.tokens;
                self.upkeep.volumes = Some(refreshed.volumes);
            }
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot bring a pod's volumes up to date"
                );
                if let RefreshError::Translate(why) = &error {
                    self.happened(Severity::Warning, "FailedMount", &why.to_string());
                }
            }
        }
    }
}

/// SHA-256 of file volumes: their contents are not kept.
type Digest = [u8; 32];

fn digest(volumes: &[Volume]) -> Digest {
    use prost::Message;
    use sha2::Digest as _;
    let mut hash = sha2::Sha256::new();
    for volume in volumes {
        hash.update(wire::Volume::from(volume.clone()).encode_length_delimited_to_vec());
    }
    hash.finalize().into()
}

fn of_files(volumes: Vec<Volume>) -> Vec<Volume> {
    volumes
        .into_iter()
        .filter(|v| matches!(v.source, VolumeSource::Files(_)))
        .collect()
}
