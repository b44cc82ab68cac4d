//! Which instances there are, and whether one more may be. Pure: the owner writes down
//! what is said here before anybody hears of it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::contract::{Bootstrap, Code, Instance, Order, Refusal, Shape, Taint};

/// Machines that there are, by shape and zone: `{"small": {"zone-a": 0}}`. A shape or
/// zone that is not in it has no limit.
pub type Stock = BTreeMap<String, BTreeMap<String, usize>>;

/// The host's name in a lab begins so: `down` knows its hosts by it.
const PREFIX: &str = "host-";
/// A device in the lab's namespace is named like its host, and so is a process.
const LONGEST: usize = 15;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub provider_id: String,
    pub class: String,
    pub shape: String,
    pub zone: String,
    pub capacity_type: String,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<Taint>,
    pub bootstrap: Bootstrap,
    /// Of the lab's addresses. No two have the same.
    pub slot: u8,
    pub state: State,
    pub created_at: Timestamp,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Starting,
    Running,
    Stopping,
    Failed,
}

impl Record {
    pub fn told(&self) -> Instance {
        Instance {
            name: self.name.clone(),
            provider_id: self.provider_id.clone(),
            class: self.class.clone(),
            shape: self.shape.clone(),
            zone: self.zone.clone(),
            capacity_type: self.capacity_type.clone(),
            labels: self.labels.clone(),
            state: match self.state {
                State::Starting => "starting",
                State::Running => "running",
                State::Stopping => "stopping",
                State::Failed => "failed",
            },
            created_at: self.created_at.to_string(),
            message: self.message.clone(),
        }
    }

    fn is_of(&self, order: &Order) -> bool {
        (&self.class, &self.shape, &self.zone, &self.capacity_type)
            == (&order.class.name, &order.shape, &order.zone, &order.capacity_type)
    }
}

pub struct Inventory {
    /// Names the instance in provider ids.
    lab: String,
    shapes: Vec<Shape>,
    most: usize,
    records: BTreeMap<String, Record>,
    /// Where the search for a free slot begins: one that was let go of is the last to
    /// be taken again, so that nobody takes a new host for the old.
    next_slot: u8,
}

impl Inventory {
    pub fn new(lab: &str, shapes: Vec<Shape>, most: usize) -> Self {
        Self {
            lab: lab.to_owned(),
            shapes,
            most,
            records: BTreeMap::new(),
            next_slot: 0,
        }
    }

    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    pub fn restore(&mut self, record: Record) {
        self.next_slot = self.next_slot.max(record.slot.saturating_add(1)) % SLOTS;
        self.records.insert(record.name.clone(), record);
    }

    pub fn list(&self) -> Vec<Instance> {
        self.records.values().map(Record::told).collect()
    }

    /// The instance of the order, which may be there already.
    pub fn order(
        &mut self,
        name: &str,
        order: Order,
        stock: &Stock,
        now: Timestamp,
    ) -> Result<&Record, Refusal> {
        check_name(name)?;
        if let Some(there) = self.records.get(name) {
            if there.state == State::Stopping || !there.is_of(&order) {
                return Err(Code::Conflict.because(format_args!(
                    "{name} is a {} in {}, {}",
                    there.shape,
                    there.zone,
                    there.told().state
                )));
            }
        } else {
            let record = self.admit(name, order, stock, now)?;
            self.records.insert(name.to_owned(), record);
        }
        self.records.get(name).ok_or_else(|| Code::NotFound.because(name))
    }

    fn admit(&mut self, name: &str, order: Order, stock: &Stock, now: Timestamp) -> Result<Record, Refusal> {
        let Some(shape) = self.shapes.iter().find(|shape| shape.name == order.shape) else {
            return Err(Code::Invalid.because(format_args!("shape: there is no {}", order.shape)));
        };
        let offered = shape
            .offerings
            .iter()
            .any(|offering| offering.zone == order.zone && offering.capacity_type == order.capacity_type);
        if !offered {
            return Err(Code::Invalid.because(format_args!(
                "zone: there is no {} {} in {}",
                order.capacity_type, order.shape, order.zone
            )));
        }
        if self.records.len() >= self.most {
            return Err(Code::OutOfCapacity.because(format_args!(
                "{} hosts are all that this machine bears",
                self.most
            )));
        }
        let has = |record: &&Record| record.shape == order.shape && record.zone == order.zone;
        let left = stock.get(&order.shape).and_then(|zones| zones.get(&order.zone));
        if left.is_some_and(|&most| self.records.values().filter(has).count() >= most) {
            return Err(
                Code::OutOfCapacity.because(format_args!("no {} is left in {}", order.shape, order.zone))
            );
        }
        let free = |slot: &u8| self.records.values().all(|record| record.slot != *slot);
        let slot = (0..SLOTS).map(|step| (self.next_slot + step) % SLOTS).find(free);
        let slot = slot.ok_or_else(|| Code::OutOfCapacity.because("no address is left"))?;
        self.next_slot = (slot + 1) % SLOTS;
        Ok(Record {
            name: name.to_owned(),
            provider_id: format!("lab://{}/{name}", self.lab),
            class: order.class.name,
            shape: order.shape,
            zone: order.zone,
            capacity_type: order.capacity_type,
            labels: order.labels,
            taints: order.taints,
            bootstrap: order.bootstrap,
            slot,
            state: State::Starting,
            created_at: now,
            message: String::new(),
        })
    }

    pub fn delete(&mut self, name: &str) -> Result<&Record, Refusal> {
        let record = self.records.get_mut(name);
        let record = record.ok_or_else(|| Code::NotFound.because(format_args!("there is no {name}")))?;
        record.state = State::Stopping;
        Ok(record)
    }

    /// What became of one that was starting. None: it is no longer to run. A token that
    /// was used, or never will be, is forgotten.
    pub fn settle(&mut self, name: &str, state: State, message: String) -> Option<&Record> {
        let record = self.records.get_mut(name)?;
        if record.state != State::Starting {
            return None;
        }
        record.state = state;
        record.message = message;
        record.bootstrap.token.clear();
        Some(record)
    }

    pub fn forget(&mut self, name: &str) {
        self.records.remove(name);
    }
}

/// As many as [`Topology`](crate::topology::Topology) has addresses for.
const SLOTS: u8 = crate::topology::Topology::MOST_HOSTS as u8;

/// It becomes part of paths, of a namespace's name and of a device's.
fn check_name(name: &str) -> Result<(), Refusal> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let rest = name.strip_prefix(PREFIX).unwrap_or_default();
    if rest.is_empty() || name.len() > LONGEST || !name.bytes().all(inner) || name.ends_with('-') {
        return Err(Code::Invalid.because(format_args!(
            "name: a lab's host is named {PREFIX} and up to {} of a-z, 0-9 and '-': name the NodePool \"host\"",
            LONGEST - PREFIX.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::contract::{Class, Offering};

    fn inventory(most: usize) -> Inventory {
        let shape = |name: &str| Shape {
            name: name.into(),
            arch: "amd64".into(),
            capacity: [("cpu".to_owned(), "2".to_owned())].into(),
            allocatable: [("cpu".to_owned(), "1900m".to_owned())].into(),
            offerings: ["zone-a", "zone-b"]
                .map(|zone| Offering {
                    zone: zone.into(),
                    capacity_type: "on-demand".into(),
                    price: 0.1,
                    available: true,
                })
                .into(),
        };
        Inventory::new("demo", vec![shape("small"), shape("medium")], most)
    }

    fn order(shape: &str, zone: &str) -> Order {
        Order {
            class: Class {
                name: "standard".into(),
                parameters: BTreeMap::new(),
            },
            shape: shape.into(),
            zone: zone.into(),
            capacity_type: "on-demand".into(),
            labels: BTreeMap::new(),
            taints: vec![],
            bootstrap: Bootstrap {
                token: "abcdef.0123456789abcdef".into(),
                ..Bootstrap::default()
            },
        }
    }

    fn now() -> Timestamp {
        Timestamp::from_second(5).unwrap()
    }

    fn make(inventory: &mut Inventory, name: &str, order: Order) -> Result<Record, Code> {
        inventory
            .order(name, order, &Stock::new(), now())
            .cloned()
            .map_err(|refusal| refusal.code)
    }

    #[test]
    fn an_order_that_is_repeated_is_the_same_instance_and_another_of_its_name_is_refused() {
        let mut inventory = inventory(4);
        let first = make(&mut inventory, "host-a", order("small", "zone-a")).unwrap();
        assert_eq!(first.provider_id, "lab://demo/host-a");
        assert_eq!(
            make(&mut inventory, "host-a", order("small", "zone-a")),
            Ok(first)
        );
        assert_eq!(
            make(&mut inventory, "host-a", order("medium", "zone-a")),
            Err(Code::Conflict)
        );
        inventory.delete("host-a").unwrap();
        assert_eq!(
            make(&mut inventory, "host-a", order("small", "zone-a")),
            Err(Code::Conflict)
        );
        assert_eq!(inventory.list()[0].state, "stopping");
        inventory.forget("host-a");
        assert!(make(&mut inventory, "host-a", order("small", "zone-a")).is_ok());
    }

    #[test]
    fn more_hosts_than_the_machine_bears_or_the_stock_has_are_out_of_capacity() {
        let mut hosts = inventory(2);
        make(&mut hosts, "host-a", order("small", "zone-a")).unwrap();
        let stock = Stock::from([("small".to_owned(), [("zone-a".to_owned(), 1)].into())]);
        let refused = hosts.order("host-b", order("small", "zone-a"), &stock, now());
        assert_eq!(refused.unwrap_err().code, Code::OutOfCapacity);
        // Elsewhere there is one.
        assert!(
            hosts
                .order("host-b", order("small", "zone-b"), &stock, now())
                .is_ok()
        );
        assert_eq!(
            make(&mut hosts, "host-c", order("medium", "zone-a")),
            Err(Code::OutOfCapacity)
        );
    }

    #[test]
    fn no_two_hosts_have_one_slot_and_the_one_last_let_go_of_is_not_the_next() {
        let mut inventory = inventory(26);
        let slot = |inventory: &mut Inventory, name: &str| {
            make(inventory, name, order("small", "zone-a")).unwrap().slot
        };
        assert_eq!(slot(&mut inventory, "host-a"), 0);
        inventory.forget("host-a");
        assert_eq!(slot(&mut inventory, "host-b"), 1);
        for number in 0..25 {
            slot(&mut inventory, &format!("host-n{number}"));
        }
        let mut slots: Vec<u8> = inventory.records.values().map(|record| record.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), 26);
    }

    #[test]
    fn a_name_that_could_leave_its_directory_or_not_be_a_device_is_invalid() {
        let mut inventory = inventory(4);
        for name in [
            "host-",
            "x",
            "host-../x",
            "host-a/b",
            "host-A",
            "host-0123456789a",
            "host-a-",
            "",
        ] {
            assert_eq!(
                make(&mut inventory, name, order("small", "zone-a")),
                Err(Code::Invalid),
                "{name:?}"
            );
        }
        assert_eq!(
            make(&mut inventory, "host-a", order("huge", "zone-a")),
            Err(Code::Invalid)
        );
        assert_eq!(
            make(&mut inventory, "host-a", order("small", "zone-z")),
            Err(Code::Invalid)
        );
    }

    #[test]
    fn a_token_that_was_used_is_not_kept_and_one_that_was_told_to_go_does_not_run() {
        let mut inventory = inventory(4);
        make(&mut inventory, "host-a", order("small", "zone-a")).unwrap();
        make(&mut inventory, "host-b", order("small", "zone-a")).unwrap();
        let running = inventory.settle("host-a", State::Running, String::new()).unwrap();
        assert_eq!(
            (running.state, running.bootstrap.token.as_str()),
            (State::Running, "")
        );
        inventory.delete("host-b").unwrap();
        assert_eq!(inventory.settle("host-b", State::Running, String::new()), None);
        assert_eq!(inventory.delete("host-c").unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn a_driver_that_starts_again_knows_which_slots_are_taken() {
        let mut first = inventory(4);
        let record = make(&mut first, "host-a", order("small", "zone-a")).unwrap();
        let text = serde_json::to_string(&record).unwrap();
        let mut second = inventory(4);
        second.restore(serde_json::from_str(&text).unwrap());
        assert_eq!(
            make(&mut second, "host-b", order("small", "zone-a"))
                .unwrap()
                .slot,
            1
        );
        assert_eq!(make(&mut second, "host-a", order("small", "zone-a")), Ok(record));
    }
}
