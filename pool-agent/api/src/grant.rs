//! A grant: for so long all sandboxes of one virtual node may run on a host.

use std::{fmt, time::Duration};

use crate::{Invalid, wire};

/// Shorter ones would be over before the next is there.
pub const SHORTEST: Duration = Duration::from_secs(4);
/// A node that is gone holds its pods' place for no longer than this.
pub const LONGEST: Duration = Duration::from_secs(600);

/// Which process of a virtual node speaks: a later one has a higher number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

impl Epoch {
    pub fn parse(field: &str, number: u64) -> Result<Self, Invalid> {
        match number {
            0 => Err(Invalid::new(field, "must be 1 or more")),
            _ => Ok(Self(number)),
        }
    }

    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// As the sandboxes' specs name it.
    pub node_name: String,
    pub epoch: Epoch,
    /// From the moment of receipt.
    pub duration: Duration,
    /// Comes back in the answer.
    pub sequence: u64,
}

impl TryFrom<wire::GrantRequest> for Grant {
    type Error = Invalid;

    fn try_from(grant: wire::GrantRequest) -> Result<Self, Invalid> {
        if grant.node_name.is_empty() || grant.node_name.len() > 253 {
            return Err(Invalid::new("node_name", "must have 1 to 253 characters"));
        }
        let duration = Duration::from_millis(grant.duration_millis);
        if !(SHORTEST..=LONGEST).contains(&duration) {
            return Err(Invalid::new("duration_millis", "must be 4000 to 600000"));
        }
        Ok(Self {
            node_name: grant.node_name,
            epoch: Epoch::parse("epoch", grant.epoch)?,
            duration,
            sequence: grant.sequence,
        })
    }
}

impl From<Grant> for wire::GrantRequest {
    fn from(grant: Grant) -> Self {
        Self {
            node_name: grant.node_name,
            epoch: grant.epoch.get(),
            duration_millis: u64::try_from(grant.duration.as_millis()).unwrap_or(u64::MAX),
            sequence: grant.sequence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_without_a_node_an_epoch_or_a_sensible_length_is_refused_by_field() {
        let good = wire::GrantRequest {
            node_name: "node".into(),
            epoch: 7,
            duration_millis: 30_000,
            sequence: 3,
        };
        let grant = Grant::try_from(good.clone()).unwrap();
        assert_eq!(wire::GrantRequest::from(grant), good);
        type Change = fn(&mut wire::GrantRequest);
        let cases: [(&str, Change); 5] = [
            ("node_name", |g| g.node_name = String::new()),
            ("node_name", |g| g.node_name = "x".repeat(254)),
            ("epoch", |g| g.epoch = 0),
            ("duration_millis", |g| g.duration_millis = 3999),
            ("duration_millis", |g| g.duration_millis = u64::MAX),
        ];
        for (field, change) in cases {
            let mut bad = good.clone();
            change(&mut bad);
            assert_eq!(Grant::try_from(bad).unwrap_err().field, field);
        }
    }
}
