//! One record: what one attempt of a pod claimed and used in one interval. The same
//! fields stand in a host's files, on the wire and in a collector's sinks.

use std::fmt;

use jiff::Timestamp;
use pool_agent_api::{
    Attempt, Invalid, Namespace, PodName, PodUid, SandboxKey, TenantId, status, usage_wire as wire,
};
use serde::{Deserialize, Serialize};

/// The longest text of a label or an id of a host's: Kubernetes' for a label's value.
const LONGEST_LABEL: usize = 63;

/// A point in time by two clocks. The wall's may be set; durations are by the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    pub wall: Timestamp,
    /// Nanoseconds since the host was booted, sleep included (CLOCK_BOOTTIME).
    pub boot: u64,
}

impl Moment {
    /// Nanoseconds from `earlier` to this; 0 if it is not earlier.
    pub fn since(self, earlier: Self) -> u64 {
        self.boot.saturating_sub(earlier.boot)
    }
}

/// Whose usage it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Named", into = "Named")]
pub struct Subject {
    pub tenant: TenantId,
    pub namespace: Namespace,
    pub pod: PodName,
    pub key: SandboxKey,
}

/// As it stands in files.
#[derive(Clone, Serialize, Deserialize)]
struct Named {
    tenant: String,
    namespace: String,
    pod: String,
    uid: String,
    attempt: u32,
}

impl From<Subject> for Named {
    fn from(s: Subject) -> Self {
        Self {
            tenant: s.tenant.into(),
            namespace: s.namespace.into(),
            pod: s.pod.into(),
            uid: s.key.pod.into(),
            attempt: s.key.attempt.get(),
        }
    }
}

impl TryFrom<Named> for Subject {
    type Error = Invalid;

    fn try_from(s: Named) -> Result<Self, Invalid> {
        Ok(Self {
            tenant: TenantId::parse("tenant", s.tenant)?,
            namespace: Namespace::parse("namespace", s.namespace)?,
            pod: PodName::parse("pod", s.pod)?,
            key: SandboxKey {
                pod: PodUid::parse("uid", s.uid)?,
                attempt: Attempt::parse("attempt", s.attempt)?,
            },
        })
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }

            /// Refused if it is none of the words; the refusal's field is `field`.
            pub fn parse(field: &str, word: &str) -> Result<Self, Invalid> {
                Self::ALL
                    .iter()
                    .copied()
                    .find(|known| known.word() == word)
                    .ok_or_else(|| Invalid::new(field, format_args!("{word:?} is none of {:?}", Self::words())))
            }

            fn words() -> Vec<&'static str> {
                Self::ALL.iter().map(|known| known.word()).collect()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

words! {
    /// Why an interval began.
    Began {
        /// The pod's first attempt was admitted.
        Started = "Started",
        /// A later attempt was admitted: the pod was elsewhere, or here, before.
        Moved = "Moved",
        /// The interval before it was over.
        Continued = "Continued",
        /// The agent had been away.
        Resumed = "Resumed",
    }
}

words! {
    /// Why an interval ended.
    Ended {
        /// It was long enough: the next one follows.
        Continues = "Continues",
        /// The attempt was asked to stop.
        Stopped = "Stopped",
        /// Its containers ended by themselves.
        Completed = "Completed",
        Evicted = "Evicted",
        DeadlineExceeded = "DeadlineExceeded",
        /// The host could not go on with it.
        Lost = "Lost",
        /// The host was booted anew. What the attempt used after the last look is unknown
        /// and on nobody's bill.
        HostRestarted = "HostRestarted",
    }
}

words! {
    /// Whether the attempt began with nothing (cold) or with a sandbox that was kept.
    Start {
        Cold = "Cold",
        Warm = "Warm",
    }
}

/// What adds up. CPU is in nanoseconds of one core.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// The claim, times the interval's length.
    pub requested_cpu_nanos: u64,
    pub requested_memory_byte_seconds: u64,
    /// What the pod's cgroup counted, also of containers that are gone.
    pub used_cpu_nanos: u64,
    /// The working set, sampled and integrated.
    pub used_memory_byte_seconds: u64,
    /// What the mesh carried from the pod, and to it.
    pub mesh_sent_bytes: u64,
    pub mesh_received_bytes: u64,
    /// How much of the interval nobody looked at: memory is a straight line there, and
    /// bytes of the mesh are missing.
    pub unsampled_nanos: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Record {
    pub subject: Subject,
    /// From 0, without a gap.
    pub sequence: u64,
    /// The host's labels in its cell; empty if it has none.
    pub class: String,
    pub zone: String,
    /// The kernel's name for the time since the host was booted.
    pub boot_id: String,
    pub from: Moment,
    pub to: Moment,
    pub began: Began,
    pub ended: Ended,
    pub start: Start,
    pub amounts: Amounts,
    /// Records that this host has lost so far, of any tenant.
    pub lost: u64,
}

/// As it stands in files, flat.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    tenant: String,
    namespace: String,
    pod: String,
    uid: String,
    attempt: u32,
    sequence: u64,
    class: String,
    zone: String,
    from: Timestamp,
    to: Timestamp,
    boot_id: String,
    from_boot_nanos: u64,
    to_boot_nanos: u64,
    began: Began,
    ended: Ended,
    start: Start,
    #[serde(flatten)]
    amounts: Amounts,
    lost: u64,
}

impl From<Record> for Stored {
    fn from(r: Record) -> Self {
        Self {
            tenant: r.subject.tenant.into(),
            namespace: r.subject.namespace.into(),
            pod: r.subject.pod.into(),
            uid: r.subject.key.pod.into(),
            attempt: r.subject.key.attempt.get(),
            sequence: r.sequence,
            class: r.class,
            zone: r.zone,
            from: r.from.wall,
            to: r.to.wall,
            boot_id: r.boot_id,
            from_boot_nanos: r.from.boot,
            to_boot_nanos: r.to.boot,
            began: r.began,
            ended: r.ended,
            start: r.start,
            amounts: r.amounts,
            lost: r.lost,
        }
    }
}

impl TryFrom<Stored> for Record {
    type Error = Invalid;

    fn try_from(r: Stored) -> Result<Self, Invalid> {
        let label = |field: &str, text: String| {
            let plain = text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            if text.len() > LONGEST_LABEL || !plain {
                return Err(Invalid::new(
                    field,
                    "must be at most 63 letters, digits, '-', '_' and '.'",
                ));
            }
            Ok(text)
        };
        // What a sink's integers hold: 292 years of a core.
        let amounts = [
            ("sequence", r.sequence),
            ("to_boot_nanos", r.to_boot_nanos),
            ("requested_cpu_nanos", r.amounts.requested_cpu_nanos),
            (
                "requested_memory_byte_seconds",
                r.amounts.requested_memory_byte_seconds,
            ),
            ("used_cpu_nanos", r.amounts.used_cpu_nanos),
            ("used_memory_byte_seconds", r.amounts.used_memory_byte_seconds),
            ("mesh_sent_bytes", r.amounts.mesh_sent_bytes),
            ("mesh_received_bytes", r.amounts.mesh_received_bytes),
            ("lost", r.lost),
        ];
        for (field, amount) in amounts {
            if i64::try_from(amount).is_err() {
                return Err(Invalid::new(field, "must be less than 2^63"));
            }
        }
        if r.to_boot_nanos < r.from_boot_nanos {
            return Err(Invalid::new(
                "to_boot_nanos",
                "must not be before from_boot_nanos",
            ));
        }
        if r.amounts.unsampled_nanos > r.to_boot_nanos - r.from_boot_nanos {
            return Err(Invalid::new(
                "unsampled_nanos",
                "must not be longer than the interval",
            ));
        }
        Ok(Self {
            subject: Named {
                tenant: r.tenant,
                namespace: r.namespace,
                pod: r.pod,
                uid: r.uid,
                attempt: r.attempt,
            }
            .try_into()?,
            sequence: r.sequence,
            class: label("class", r.class)?,
            zone: label("zone", r.zone)?,
            boot_id: label("boot_id", r.boot_id)?,
            from: Moment {
                wall: r.from,
                boot: r.from_boot_nanos,
            },
            to: Moment {
                wall: r.to,
                boot: r.to_boot_nanos,
            },
            began: r.began,
            ended: r.ended,
            start: r.start,
            amounts: r.amounts,
            lost: r.lost,
        })
    }
}

impl From<&Record> for wire::Record {
    fn from(record: &Record) -> Self {
        let r = Stored::from(record.clone());
        Self {
            tenant: r.tenant,
            namespace: r.namespace,
            pod: r.pod,
            pod_uid: r.uid,
            attempt: r.attempt,
            sequence: r.sequence,
            class: r.class,
            zone: r.zone,
            from: Some(status::wire_timestamp(r.from)),
            to: Some(status::wire_timestamp(r.to)),
            boot_id: r.boot_id,
            from_boot_nanos: r.from_boot_nanos,
            to_boot_nanos: r.to_boot_nanos,
            began: r.began.word().into(),
            ended: r.ended.word().into(),
            start: r.start.word().into(),
            requested_cpu_nanos: r.amounts.requested_cpu_nanos,
            requested_memory_byte_seconds: r.amounts.requested_memory_byte_seconds,
            used_cpu_nanos: r.amounts.used_cpu_nanos,
            used_memory_byte_seconds: r.amounts.used_memory_byte_seconds,
            mesh_sent_bytes: r.amounts.mesh_sent_bytes,
            mesh_received_bytes: r.amounts.mesh_received_bytes,
            unsampled_nanos: r.amounts.unsampled_nanos,
            lost: r.lost,
        }
    }
}

impl TryFrom<wire::Record> for Record {
    type Error = Invalid;

    fn try_from(r: wire::Record) -> Result<Self, Invalid> {
        let at = |field: &str, at: Option<_>| match at {
            Some(at) => status::timestamp(field, at),
            None => Err(Invalid::new(field, "is required")),
        };
        Stored {
            from: at("from", r.from)?,
            to: at("to", r.to)?,
            began: Began::parse("began", &r.began)?,
            ended: Ended::parse("ended", &r.ended)?,
            start: Start::parse("start", &r.start)?,
            tenant: r.tenant,
            namespace: r.namespace,
            pod: r.pod,
            uid: r.pod_uid,
            attempt: r.attempt,
            sequence: r.sequence,
            class: r.class,
            zone: r.zone,
            boot_id: r.boot_id,
            from_boot_nanos: r.from_boot_nanos,
            to_boot_nanos: r.to_boot_nanos,
            amounts: Amounts {
                requested_cpu_nanos: r.requested_cpu_nanos,
                requested_memory_byte_seconds: r.requested_memory_byte_seconds,
                used_cpu_nanos: r.used_cpu_nanos,
                used_memory_byte_seconds: r.used_memory_byte_seconds,
                mesh_sent_bytes: r.mesh_sent_bytes,
                mesh_received_bytes: r.mesh_received_bytes,
                unsampled_nanos: r.unsampled_nanos,
            },
            lost: r.lost,
        }
        .try_into()
    }
}

/// A record of no particular pod.
#[cfg(test)]
pub(crate) fn sample(tenant: &str, uid: &str, sequence: u64) -> Record {
    let stored = Stored {
        tenant: tenant.into(),
        namespace: "shop".into(),
        pod: "web".into(),
        uid: uid.into(),
        attempt: 1,
        sequence,
        class: "standard".into(),
        zone: "z1".into(),
        from: Timestamp::UNIX_EPOCH,
        to: Timestamp::UNIX_EPOCH,
        boot_id: "b".into(),
        from_boot_nanos: 0,
        to_boot_nanos: 60_000_000_000,
        began: Began::Started,
        ended: Ended::Continues,
        start: Start::Cold,
        amounts: Amounts {
            requested_cpu_nanos: 6_000_000_000,
            requested_memory_byte_seconds: 60 << 20,
            used_cpu_nanos: 1_000_000_000,
            used_memory_byte_seconds: 30 << 20,
            mesh_sent_bytes: 10,
            mesh_received_bytes: 20,
            unsampled_nanos: 0,
        },
        lost: 0,
    };
    Record::try_from(stored).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_the_same_in_a_file_and_on_the_wire() {
        let record = sample("acme", "u-1", 7);
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert!(text.contains("\"used_cpu_nanos\":1000000000"), "{text}");
        assert_eq!(Record::try_from(wire::Record::from(&record)).unwrap(), record);
    }

    #[test]
    fn what_no_host_of_ours_says_is_refused_by_its_field() {
        type Spoil = fn(&mut wire::Record);
        let spoilt: [(&str, Spoil); 10] = [
            ("used_cpu_nanos", |r| r.used_cpu_nanos = u64::MAX),
            ("tenant", |r| r.tenant = "../x".into()),
            ("uid", |r| r.pod_uid = "a/b".into()),
            ("attempt", |r| r.attempt = 0),
            ("class", |r| r.class = "a\nb".into()),
            ("boot_id", |r| r.boot_id = "x".repeat(64)),
            ("from", |r| r.from = None),
            ("began", |r| r.began = "Began".into()),
            ("to_boot_nanos", |r| (r.from_boot_nanos, r.to_boot_nanos) = (2, 1)),
            ("unsampled_nanos", |r| r.unsampled_nanos = u64::MAX),
        ];
        for (field, spoil) in spoilt {
            let mut record = wire::Record::from(&sample("acme", "u-1", 7));
            spoil(&mut record);
            assert_eq!(Record::try_from(record).unwrap_err().field, field);
        }
    }
}
