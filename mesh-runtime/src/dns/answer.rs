//! What is answered from the mesh's state. Pure.
//!
//! | Name | Records |
//! |---|---|
//! | a service's host name | A: its addresses; headless: its endpoints' |
//! | `<pod name or dashed address>.<headless service>` | A: that endpoint |
//! | `<dashed address>.<namespace>.pod.<domain>` | A: the address, if a pod has it |
//! | an address under `in-addr.arpa` | PTR: the service that has it |
//! | another name of the cluster's domain | none: NXDOMAIN |
//! | any other name | not ours |
//!
//! A name that is known has other types too, with nothing in them. SRV records
//! of named ports are not among what the mesh's control plane tells.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use hickory_proto::{
    op::{Edns, Message, Metadata, OpCode, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SOA},
    },
};
use ipnet::IpNet;

use crate::state::{Health, ServiceView, Snapshot, UnhealthyEndpoints};

/// Seconds that an answer may be kept, as in Istio.
const TTL: u32 = 30;
/// A name that is not there yet may be there soon (CoreDNS' default).
const NEGATIVE_TTL: u32 = 5;
/// Records in one answer; a client has no use for more.
const MAX_RECORDS: usize = 100;
/// What our own UDP takes, told in EDNS.
const MAX_PAYLOAD: u16 = 1232;

/// The part of the name space that is ours.
#[derive(Debug, Clone)]
pub struct Zone {
    /// E.g. `cluster.local`, in lower case, without dots around it.
    pub domain: Arc<str>,
    pub network: Arc<str>,
    pub cluster_pods: IpNet,
}

/// Who asks.
#[derive(Debug, Clone)]
pub struct Client {
    pub namespace: Arc<str>,
}

#[derive(Debug)]
pub enum Answer {
    Reply(Message),
    /// A name server knows.
    PassOn,
}

/// What is known of a name.
enum Found {
    /// Addresses to choose from, in any order.
    Addresses(Vec<IpAddr>),
    Name(Arc<str>),
    /// It exists, with nothing of the wanted kind.
    Empty,
    Nothing,
    NotOurs,
}

impl Zone {
    /// Whether a question is about a name that no other name server may see.
    pub fn owns(&self, question: &Message) -> bool {
        question
            .queries
            .first()
            .is_some_and(|query| self.within(&text(&query.name)).is_some())
    }

    /// The name relative to the domain; empty for the domain itself.
    fn within<'a>(&self, name: &'a str) -> Option<&'a str> {
        let rest = name.strip_suffix(&*self.domain)?;
        match rest.strip_suffix('.') {
            Some(labels) => Some(labels),
            None => rest.is_empty().then_some(""),
        }
    }
}

/// In lower case, without the last dot.
fn text(name: &Name) -> String {
    let mut text = name.to_ascii();
    text.make_ascii_lowercase();
    if text.len() > 1 && text.ends_with('.') {
        text.pop();
    }
    text
}

/// Answers a query. `shuffle` is any number: equal clients should not all take
/// the first address.
pub fn answer(question: &Message, zone: &Zone, state: &Snapshot, client: &Client, shuffle: u64) -> Answer {
    if question.metadata.op_code != OpCode::Query {
        return Answer::Reply(response(question, ResponseCode::NotImp));
    }
    let [query] = &question.queries[..] else {
        return Answer::Reply(response(question, ResponseCode::FormErr));
    };
    let name = text(&query.name);
    let found = if query.query_class != DNSClass::IN {
        match zone.within(&name) {
            Some(_) => Found::Nothing,
            None => Found::NotOurs,
        }
    } else if query.query_type == RecordType::PTR {
        reverse(zone, state, client, &query.name)
    } else {
        forward(zone, state, client, &name)
    };

    let mut reply = response(question, ResponseCode::NoError);
    reply.metadata.authoritative = true;
    let mut records = Vec::new();
    match found {
        Found::NotOurs => return Answer::PassOn,
        Found::Nothing => reply.metadata.response_code = ResponseCode::NXDomain,
        Found::Empty => {}
        Found::Name(target) => {
            if let Ok(target) = Name::from_ascii(format!("{target}.")) {
                records.push(RData::PTR(PTR(target)));
            }
        }
        Found::Addresses(addresses) => {
            records.extend(addresses.into_iter().filter_map(|a| match (a, query.query_type) {
                (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => Some(RData::A(A(v4))),
                (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(v6))),
                _ => None,
            }));
            rotate(&mut records, shuffle);
            records.truncate(MAX_RECORDS);
        }
    }
    if records.is_empty() {
        // Says how long there being nothing may be believed (RFC 2308).
        if let Some(soa) = soa(zone) {
            if query.query_type == RecordType::SOA && name == *zone.domain {
                reply.answers.push(soa);
            } else {
                reply.authorities.push(soa);
            }
        }
    }
    let records = records
        .into_iter()
        .map(|data| Record::from_rdata(query.name.clone(), TTL, data));
    reply.answers.extend(records);
    Answer::Reply(reply)
}

/// Every address comes first for as many clients as any other.
fn rotate(records: &mut [RData], shuffle: u64) {
    if let Some(by) = shuffle.checked_rem(records.len() as u64) {
        records.rotate_left(by as usize);
    }
}

/// An answer to `question` with nothing in it.
pub(super) fn response(question: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(question.metadata.id, question.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&question.metadata);
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.queries = question.queries.clone();
    if question.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_PAYLOAD);
        reply.edns = Some(edns);
    }
    reply
}

fn soa(zone: &Zone) -> Option<Record> {
    let name = Name::from_ascii(format!("{}.", zone.domain)).ok()?;
    let server = Name::from_ascii(format!("ns.dns.{}.", zone.domain)).ok()?;
    let contact = Name::from_ascii(format!("hostmaster.{}.", zone.domain)).ok()?;
    let soa = SOA::new(server, contact, 1, 7200, 1800, 86400, NEGATIVE_TTL);
    Some(Record::from_rdata(name, NEGATIVE_TTL, RData::SOA(soa)))
}

fn forward(zone: &Zone, state: &Snapshot, client: &Client, name: &str) -> Found {
    if let Some(view) = state.service_named(name, &client.namespace) {
        return Found::Addresses(addresses(zone, view));
    }
    let Some(relative) = zone.within(name) else {
        return Found::NotOurs;
    };
    if matches!(relative, "" | "svc" | "pod") {
        return Found::Empty;
    }
    if let Some(pod) = relative.strip_suffix(".pod") {
        return pod_address(zone, state, pod);
    }
    // One label before a service: one of its endpoints. Two with underscores: a
    // named port.
    if let Some((label, service)) = name.split_once('.') {
        if let Some(view) = state.service_named(service, &client.namespace) {
            return endpoint(view, label);
        }
        let port = |label: &str| label.starts_with('_');
        if let Some((protocol, service)) = service.split_once('.')
            && port(label)
            && port(protocol)
            && state.service_named(service, &client.namespace).is_some()
        {
            return Found::Empty;
        }
    }
    Found::Nothing
}

fn addresses(zone: &Zone, view: &ServiceView) -> Vec<IpAddr> {
    let service = &view.service;
    if !service.vips.is_empty() {
        return service
            .vips
            .iter()
            .filter(|vip| vip.network == zone.network)
            .filter_map(|vip| vip.single())
            .collect();
    }
    view.endpoints
        .iter()
        .filter(|w| w.health == Health::Healthy || service.balance.unhealthy == UnhealthyEndpoints::Taken)
        .flat_map(|w| w.addresses.iter().copied())
        .collect()
}

fn endpoint(view: &ServiceView, label: &str) -> Found {
    if !view.service.vips.is_empty() {
        return Found::Nothing;
    }
    let dashed = dashed(label);
    let found: Vec<IpAddr> = view
        .endpoints
        .iter()
        .filter(|w| *w.name == *label || dashed.is_some_and(|ip| w.addresses.contains(&ip)))
        .flat_map(|w| w.addresses.iter().copied())
        .collect();
    if found.is_empty() {
        Found::Nothing
    } else {
        Found::Addresses(found)
    }
}

/// `10-77-1-2` is 10.77.1.2.
fn dashed(label: &str) -> Option<IpAddr> {
    label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::V4)
}

fn pod_address(zone: &Zone, state: &Snapshot, name: &str) -> Found {
    let found = name.split_once('.').and_then(|(label, namespace)| {
        let ip = dashed(label)?;
        let workload = state.workload_at(&zone.network, ip)?;
        (*workload.namespace == *namespace).then_some(ip)
    });
    match found {
        Some(ip) => Found::Addresses(vec![ip]),
        None => Found::Nothing,
    }
}

fn reverse(zone: &Zone, state: &Snapshot, client: &Client, name: &Name) -> Found {
    let whole = name
        .parse_arpa_name()
        .ok()
        .filter(|net| net.prefix_len() == net.max_prefix_len());
    let Some(address) = whole.map(|net| net.addr()) else {
        return match zone.within(&text(name)) {
            Some(_) => forward_exists(zone, state, client, name),
            None => Found::NotOurs,
        };
    };
    match state.service_at(&zone.network, address, &client.namespace) {
        Some(view) => Found::Name(view.service.key.hostname.clone()),
        None if zone.cluster_pods.contains(&address) => Found::Nothing,
        None => Found::NotOurs,
    }
}

/// A name of ours that was asked for a PTR record, which it has not.
fn forward_exists(zone: &Zone, state: &Snapshot, client: &Client, name: &Name) -> Found {
    match forward(zone, state, client, &text(name)) {
        Found::Nothing => Found::Nothing,
        _ => Found::Empty,
    }
}

#[cfg(test)]
mod tests;
