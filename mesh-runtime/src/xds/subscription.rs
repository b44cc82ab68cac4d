//! What is held of each resource type, and the answer to each response. Pure.
//!
//! A resource that cannot be taken is refused by itself: the rest of the
//! response is applied, and the answer (a NACK) carries the reasons. A refused
//! resource counts as held only in the version that was taken before.
//!
//! What is held has a bound: resources beyond it are refused like those that cannot be
//! read. A host has one for all its tenants, of which each has a share.

use std::{collections::HashMap, sync::Arc};

use bounds::{Holding, Level};
use envoy_types::pb::{
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    google::rpc::Status,
};
use mesh_api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE,
    istio::{
        security::Authorization,
        workload::{Address, address::Type},
    },
};
use prost::Message;

use crate::{
    limits::{Account, STATE_PAGE},
    policy::{InvalidPolicy, Policy},
    state::{Change, Interner, InvalidService, InvalidWorkload, Service, Workload},
};

/// gRPC's INVALID_ARGUMENT, as Envoy's protocol wants in a NACK.
const INVALID_ARGUMENT: i32 = 3;
/// Reasons in one NACK; the rest is counted.
const MAX_REASONS: usize = 10;
/// Bytes of the longest name in a reason, and of a reason.
const MAX_REASON_BYTES: usize = 256;
/// What a resource takes beside its bytes: as parsed, and in the indices by name,
/// address and service.
const OVERHEAD: usize = 1024;

#[derive(Debug)]
pub struct Subscriptions {
    addresses: Held,
    authorizations: Held,
    room: Room,
    strings: Interner,
}

/// What all that is held takes, of what it may.
#[derive(Debug)]
struct Room {
    pages: Holding<Account>,
    bytes: usize,
}

impl Room {
    /// Gives back what `old` took, and takes `new`; or changes nothing.
    fn exchange(&mut self, old: usize, new: usize) -> Result<(), InvalidResource> {
        let bytes = self.bytes.saturating_sub(old).saturating_add(new);
        self.pages
            .resize(bytes.div_ceil(STATE_PAGE))
            .map_err(|level| InvalidResource::NoRoom { level })?;
        self.bytes = bytes;
        Ok(())
    }

    /// To no more than it was, which cannot be refused.
    fn shrink(&mut self, old: usize, new: usize) {
        let _given_back = self.exchange(old, new).is_ok();
    }
}

/// The resources of one type, by name.
#[derive(Debug)]
struct Held {
    type_url: &'static str,
    resources: HashMap<Arc<str>, Taken>,
    /// Whether any response of the type was taken, in this life of the process.
    told: bool,
}

#[derive(Debug)]
struct Taken {
    /// That was taken; None for what only stands for a policy that cannot be read.
    version: Option<Box<str>>,
    bytes: usize,
}

impl Held {
    fn new(type_url: &'static str) -> Self {
        Self {
            type_url,
            resources: HashMap::new(),
            told: false,
        }
    }

    /// The wildcard subscription, with what need not be sent again.
    fn open(&self) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: self.type_url.to_owned(),
            initial_resource_versions: self
                .resources
                .iter()
                .filter_map(|(name, taken)| Some((name.to_string(), taken.version.as_ref()?.to_string())))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// Of a resource, parsed and indexed.
fn size(resource: &Resource) -> usize {
    let value = resource.resource.as_ref().map_or(0, |any| any.value.len());
    OVERHEAD + 2 * (resource.name.len() + value) + resource.version.len()
}

/// What a response amounts to.
#[derive(Debug)]
pub struct Received {
    pub changes: Vec<Change>,
    pub rejected: Vec<Rejected>,
    pub answer: DeltaDiscoveryRequest,
    /// Both types have been told of.
    pub synced: bool,
}

#[derive(Debug)]
pub struct Rejected {
    pub name: String,
    pub reason: InvalidResource,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidResource {
    #[error("the resource is missing")]
    Missing,
    #[error("its type is {found:?}")]
    OtherType { found: String },
    #[error("it cannot be decoded: {0}")]
    Undecodable(prost::DecodeError),
    #[error("it is neither a workload nor a service")]
    Neither,
    #[error("it is named {inside:?} inside")]
    OtherName { inside: String },
    #[error("the {level}'s share of room for mesh state is used up")]
    NoRoom { level: Level },
    #[error("{0}")]
    Workload(InvalidWorkload),
    #[error("{0}")]
    Service(InvalidService),
    #[error("{0}")]
    Policy(InvalidPolicy),
    /// Something stands for the most that it could refuse.
    #[error("{0}")]
    Closed(InvalidPolicy),
}

#[derive(Debug, thiserror::Error)]
#[error("the mesh control plane sent the type {type_url:?}, which was not asked for")]
pub struct UnknownType {
    type_url: String,
}

impl Subscriptions {
    /// That hold no more than `room` gives them, in [`STATE_PAGE`]s.
    pub fn within(room: Holding<Account>) -> Self {
        Self {
            addresses: Held::new(ADDRESS_TYPE),
            authorizations: Held::new(AUTHORIZATION_TYPE),
            room: Room {
                pages: room,
                bytes: 0,
            },
            strings: Interner::default(),
        }
    }

    /// The first requests of a new stream.
    pub fn open(&self) -> [DeltaDiscoveryRequest; 2] {
        [self.addresses.open(), self.authorizations.open()]
    }

    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Result<Received, UnknownType> {
        let Self {
            addresses,
            authorizations,
            room,
            strings,
        } = self;
        let held = match response.type_url.as_str() {
            ADDRESS_TYPE => &mut *addresses,
            AUTHORIZATION_TYPE => &mut *authorizations,
            _ => {
                return Err(UnknownType {
                    type_url: response.type_url,
                });
            }
        };
        let mut changes = Vec::with_capacity(response.resources.len() + response.removed_resources.len());
        let mut rejected = Vec::new();
        // Removals first: a name that is in both is then there, as the newer.
        for name in response.removed_resources {
            if let Some(taken) = held.resources.remove(&*name) {
                room.shrink(taken.bytes, 0);
            }
            changes.push(match held.type_url {
                ADDRESS_TYPE => Change::RemoveAddress(name.into()),
                _ => Change::RemovePolicy(name.into()),
            });
        }
        // Until all policies are held that were told of, no pod comes into the mesh.
        let mut all_held = true;
        for resource in response.resources {
            let known = held.resources.get(&*resource.name);
            let (before, version) = known.map_or((0, None), |taken| (taken.bytes, taken.version.clone()));
            let bytes = size(&resource);
            // Of the larger until it is known which stays.
            let parsed = room
                .exchange(before, bytes.max(before))
                .and_then(|()| match held.type_url {
                    ADDRESS_TYPE => parse_address(&resource, strings),
                    _ => parse_policy(&resource, version.is_some(), &mut changes),
                });
            let stays = match &parsed {
                Ok(_) => Some(Some(resource.version.into())),
                Err(InvalidResource::Closed(_)) => Some(version),
                Err(_) => None,
            };
            if let Err(InvalidResource::NoRoom { .. }) = parsed {
                all_held = false;
            } else {
                let after = if stays.is_some() { bytes } else { before };
                room.shrink(bytes.max(before), after);
            }
            if let Some(version) = stays {
                let name = resource.name.as_str().into();
                held.resources.insert(name, Taken { version, bytes });
            }
            match parsed {
                Ok(change) => changes.push(change),
                Err(reason) => rejected.push(Rejected {
                    name: resource.name,
                    reason,
                }),
            }
        }
        held.told |= all_held || held.type_url == ADDRESS_TYPE;
        let answer = DeltaDiscoveryRequest {
            type_url: held.type_url.to_owned(),
            response_nonce: response.nonce,
            error_detail: nack(&rejected),
            ..DeltaDiscoveryRequest::default()
        };
        Ok(Received {
            changes,
            rejected,
            answer,
            synced: addresses.told && authorizations.told,
        })
    }
}

fn nack(rejected: &[Rejected]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let mut message = String::new();
    for Rejected { name, reason } in rejected.iter().take(MAX_REASONS) {
        let (name, reason) = (shortened(name), shortened(&reason.to_string()));
        message.push_str(&format!("{name}: {reason}; "));
    }
    if let Some(more @ 1..) = rejected.len().checked_sub(MAX_REASONS) {
        message.push_str(&format!("and {more} more"));
    }
    Some(Status {
        code: INVALID_ARGUMENT,
        message: message.trim_end_matches("; ").to_owned(),
        details: vec![],
    })
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_REASON_BYTES) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn decode<M: Message + Default>(resource: &Resource, type_url: &str) -> Result<M, InvalidResource> {
    let any = resource.resource.as_ref().ok_or(InvalidResource::Missing)?;
    if any.type_url != type_url {
        return Err(InvalidResource::OtherType {
            found: any.type_url.clone(),
        });
    }
    M::decode(&any.value[..]).map_err(InvalidResource::Undecodable)
}

/// A resource is removed by the name around it, so the name inside has to agree.
fn same_name(resource: &Resource, inside: &str) -> Result<(), InvalidResource> {
    if resource.name == inside {
        Ok(())
    } else {
        Err(InvalidResource::OtherName {
            inside: inside.to_owned(),
        })
    }
}

fn parse_address(resource: &Resource, strings: &mut Interner) -> Result<Change, InvalidResource> {
    match decode::<Address>(resource, ADDRESS_TYPE)?.r#type {
        Some(Type::Workload(w)) => {
            same_name(resource, &w.uid)?;
            let workload = Workload::parse(&w, strings).map_err(InvalidResource::Workload)?;
            Ok(Change::Workload(Arc::new(workload)))
        }
        Some(Type::Service(s)) => {
            same_name(resource, &format!("{}/{}", s.namespace, s.hostname))?;
            let service = Service::parse(&s, strings).map_err(InvalidResource::Service)?;
            Ok(Change::Service(Arc::new(service)))
        }
        None => Err(InvalidResource::Neither),
    }
}

/// A policy that cannot be read leaves the version before it in force; if there
/// is none, it stands for the most that it could refuse.
fn parse_policy(
    resource: &Resource,
    known: bool,
    changes: &mut Vec<Change>,
) -> Result<Change, InvalidResource> {
    let policy: Authorization = decode(resource, AUTHORIZATION_TYPE)?;
    same_name(resource, &format!("{}/{}", policy.namespace, policy.name))?;
    match Policy::parse(&policy) {
        Ok(policy) => Ok(Change::Policy(Arc::new(policy))),
        Err(reason) => {
            if !known && let Ok(closed) = Policy::unreadable(&policy) {
                changes.push(Change::Policy(Arc::new(closed)));
                return Err(InvalidResource::Closed(reason));
            }
            Err(InvalidResource::Policy(reason))
        }
    }
}

#[cfg(test)]
mod tests;
