//! Sums of records: by tenant and day, and finer where asked.

use std::{collections::BTreeMap, ops::AddAssign};

use jiff::{civil::Date, tz::TimeZone};
use serde::Serialize;

use crate::record::{Amounts, Ended, Record};

/// What sums are told apart by, beside tenant and day.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Grain {
    #[default]
    Tenant,
    Namespace,
    Pod,
}

/// What a sum is of. A record belongs to the day, in UTC, on which its interval began.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Group {
    pub tenant: String,
    pub day: Date,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

impl Group {
    pub fn of(record: &Record, grain: Grain) -> Self {
        let subject = &record.subject;
        let namespace = (grain != Grain::Tenant).then(|| subject.namespace.to_string());
        Self {
            tenant: subject.tenant.to_string(),
            day: record.from.wall.to_zoned(TimeZone::UTC).date(),
            namespace,
            pod: (grain == Grain::Pod).then(|| subject.pod.to_string()),
        }
    }
}

/// In the records' units; years of a large pool fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    pub records: u64,
    /// Attempts that ended.
    pub ended: u64,
    pub requested_cpu_nanos: u128,
    pub requested_memory_byte_seconds: u128,
    pub used_cpu_nanos: u128,
    pub used_memory_byte_seconds: u128,
    pub mesh_sent_bytes: u128,
    pub mesh_received_bytes: u128,
    pub unsampled_nanos: u128,
}

impl AddAssign<&Record> for Sum {
    fn add_assign(&mut self, record: &Record) {
        let Amounts {
            requested_cpu_nanos,
            requested_memory_byte_seconds,
            used_cpu_nanos,
            used_memory_byte_seconds,
            mesh_sent_bytes,
            mesh_received_bytes,
            unsampled_nanos,
        } = record.amounts;
        self.records += 1;
        self.ended += u64::from(record.ended != Ended::Continues);
        self.requested_cpu_nanos += u128::from(requested_cpu_nanos);
        self.requested_memory_byte_seconds += u128::from(requested_memory_byte_seconds);
        self.used_cpu_nanos += u128::from(used_cpu_nanos);
        self.used_memory_byte_seconds += u128::from(used_memory_byte_seconds);
        self.mesh_sent_bytes += u128::from(mesh_sent_bytes);
        self.mesh_received_bytes += u128::from(mesh_received_bytes);
        self.unsampled_nanos += u128::from(unsampled_nanos);
    }
}

pub type Sums = BTreeMap<Group, Sum>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::sample;

    #[test]
    fn records_add_up_by_tenant_and_day_and_finer_where_asked() {
        let mut late = sample("acme", "u-2", 0);
        late.from.wall = "1970-01-01T23:59:59Z".parse().unwrap();
        late.to.wall = "1970-01-02T00:00:59Z".parse().unwrap();
        late.subject.pod = "other".parse().unwrap();
        let records = [sample("acme", "u-1", 0), late, sample("zeta", "u-3", 0)];
        let sums = |grain| {
            let mut sums = Sums::new();
            for record in &records {
                *sums.entry(Group::of(record, grain)).or_default() += record;
            }
            sums
        };
        let by_tenant: Vec<_> = sums(Grain::Tenant)
            .into_iter()
            .map(|(group, sum)| {
                (
                    group.tenant,
                    group.day.to_string(),
                    sum.records,
                    sum.used_cpu_nanos,
                )
            })
            .collect();
        assert_eq!(
            by_tenant,
            [
                ("acme".into(), "1970-01-01".into(), 2, 2_000_000_000),
                ("zeta".into(), "1970-01-01".into(), 1, 1_000_000_000)
            ]
        );
        assert_eq!(sums(Grain::Pod).len(), 3);
    }
}
