//! Ports of virtual nodes, at the address that the replicas share.
//!
//! A slot is two ports, for the kubelet API and for the mesh. Who has slot 17 is the
//! Lease `slot-17` in the process's namespace: that no two objects have one name is
//! what keeps two virtual nodes from one port, whichever replicas give them. It stays
//! the virtual node's until that is gone.

use std::{collections::BTreeSet, ops::RangeInclusive};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Error,
    api::{DeleteParams, PostParams, Preconditions},
};
use tracing::info;

use super::{
    leases::KIND,
    resource::{Key, Ports, VirtualNode},
};
use crate::api_server::answered;

const OF_SLOT: &str = "slot";
/// Slots that are tried: what is seen to be taken is left out before.
const TRIES: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SlotError {
    #[error("no port is left for another virtual node: give the process a longer range")]
    Full,
    #[error("the cell does not give a port")]
    Api(#[from] Error),
}

/// The ports to give: two for each slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    first: u16,
    slots: u16,
}

impl std::str::FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text
            .split_once('-')
            .and_then(|(first, last)| Some((first.parse::<u16>().ok()?, last.parse::<u16>().ok()?)));
        match parsed {
            Some((first, last)) if first > 0 && last > first => Ok(Self {
                first,
                slots: (last - first).div_ceil(2),
            }),
            _ => Err(format!(
                "{text:?} is no range of at least two ports such as 20000-29999"
            )),
        }
    }
}

impl Range {
    pub(crate) fn ports(&self, slot: u16) -> Ports {
        let kubelet = self.first + 2 * slot;
        Ports {
            kubelet,
            mesh: kubelet + 1,
        }
    }

    fn slot(&self, ports: Ports) -> Option<u16> {
        let offset = ports.kubelet.checked_sub(self.first)?;
        (offset % 2 == 0 && offset / 2 < self.slots).then_some(offset / 2)
    }

    fn all(&self) -> RangeInclusive<u16> {
        0..=self.slots.saturating_sub(1)
    }

    pub(crate) fn has(&self, ports: Ports) -> bool {
        self.slot(ports).is_some_and(|slot| self.ports(slot) == ports)
    }
}

fn name_of(slot: u16) -> String {
    format!("slot-{slot}")
}

/// Ports that nobody else has; `taken` are those that are seen to be somebody's.
pub(crate) async fn take(
    client: Client,
    namespace: &str,
    range: &Range,
    key: &Key,
    node: &VirtualNode,
    taken: &BTreeSet<u16>,
) -> Result<Ports, SlotError> {
    let api = Api::<Lease>::namespaced(client.clone(), namespace);
    let me = format!("{key}/{}", node.uid());
    let free = range
        .all()
        .filter(|slot| !taken.contains(&range.ports(*slot).kubelet));
    for slot in free.take(TRIES) {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name_of(slot)),
                labels: Some([(KIND.into(), OF_SLOT.into())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(me.clone()),
                ..LeaseSpec::default()
            }),
        };
        match answered(api.create(&PostParams::default(), &lease)).await {
            Ok(_) => return Ok(range.ports(slot)),
            Err(Error::Api(refused)) if refused.code == 409 => {
                let Some(found) = answered(api.get_opt(&name_of(slot))).await? else {
                    continue;
                };
                let holder = found.spec.as_ref().and_then(|s| s.holder_identity.as_deref());
                // Taken by whoever had this virtual node and died before saying so.
                if holder == Some(me.as_str()) {
                    return Ok(range.ports(slot));
                }
                sweep(&client, &api, found).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(SlotError::Full)
}

/// Removes a slot whose virtual node is gone.
async fn sweep(client: &Client, api: &Api<Lease>, slot: Lease) -> Result<(), Error> {
    let holder = slot
        .spec
        .as_ref()
        .and_then(|s| s.holder_identity.clone())
        .unwrap_or_default();
    let parts: Vec<&str> = holder.split('/').collect();
    if let [namespace, name, uid] = parts[..] {
        let nodes = Api::<VirtualNode>::namespaced(client.clone(), namespace);
        let found = answered(nodes.get_opt(name)).await?;
        if found.is_some_and(|node| node.uid() == uid) {
            return Ok(());
        }
    }
    let Some(name) = slot.metadata.name else {
        return Ok(());
    };
    let unchanged = DeleteParams::default().preconditions(Preconditions {
        resource_version: slot.metadata.resource_version,
        uid: slot.metadata.uid,
    });
    answered(api.delete(&name, &unchanged)).await?;
    info!(
        slot = name,
        "the ports of a virtual node that is gone are free again"
    );
    Ok(())
}

/// Gives ports back. What is not there is fine.
pub(crate) async fn give(client: Client, namespace: &str, range: &Range, ports: Ports) -> Result<(), Error> {
    let Some(slot) = range.slot(ports) else {
        return Ok(());
    };
    let api = Api::<Lease>::namespaced(client, namespace);
    match answered(api.delete(&name_of(slot), &DeleteParams::default())).await {
        Err(Error::Api(refused)) if refused.code == 404 => Ok(()),
        given => given.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_slots_share_a_port_and_all_are_in_the_range() {
        let range: Range = "20000-20006".parse().unwrap();
        let ports: Vec<Ports> = range.all().map(|slot| range.ports(slot)).collect();
        let each: BTreeSet<u16> = ports.iter().flat_map(|p| [p.kubelet, p.mesh]).collect();
        assert_eq!(each.len(), 2 * ports.len());
        assert!(each.iter().all(|port| (20000..=20006).contains(port)), "{each:?}");
        assert!(
            ports
                .iter()
                .enumerate()
                .all(|(i, p)| range.slot(*p) == u16::try_from(i).ok())
        );
        assert!(!range.has(Ports {
            kubelet: 20001,
            mesh: 20002
        }));
        for wrong in ["20000", "2-1", "a-b", "0-9", "1-70000"] {
            assert!(wrong.parse::<Range>().is_err(), "{wrong}");
        }
    }
}
