//! `spindrift.usage.v1.UsageCollector`: who hands over, what, and the answer.

use pool_agent_api::{
    HostName, Invalid, Peer, PeerId,
    usage_wire::{Batch, Taken, usage_collector_server::UsageCollector},
};
use pool_usage::Record;
use tonic::{Request, Response, Status};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::sink::{Handed, Sinks};

/// A spool's name is a UUID, or a number.
const LONGEST_SPOOL: usize = 64;

pub(crate) struct Service {
    sinks: Sinks,
    trust_domain: String,
}

impl Service {
    pub(crate) fn new(sinks: Sinks, trust_domain: String) -> Self {
        Self { sinks, trust_domain }
    }

    /// The host whose certificate it is. The handshake has verified the chain.
    fn host(&self, certificate: &[u8]) -> Result<HostName, String> {
        let (_, certificate) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| e.to_string())?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        let [uri] = uris[..] else {
            return Err(format!("it has {} URI names, not one", uris.len()));
        };
        let peer: PeerId = uri.parse().map_err(|e: Invalid| e.to_string())?;
        match &peer.peer {
            Peer::Host(host) if peer.trust_domain == self.trust_domain => Ok(host.clone()),
            _ => Err(format!("{peer} is no host of {}", self.trust_domain)),
        }
    }
}

fn parse(batch: Batch) -> Result<(String, u64, Vec<Record>), Invalid> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if batch.spool.is_empty() || batch.spool.len() > LONGEST_SPOOL || !batch.spool.chars().all(plain) {
        return Err(Invalid::new("spool", "must be 1 to 64 letters, digits and '-'"));
    }
    let records = batch.records.into_iter().enumerate();
    let records = records
        .map(|(i, record)| Record::try_from(record).map_err(|e| e.within(format_args!("records[{i}]"))))
        .collect::<Result<_, _>>()?;
    Ok((batch.spool, batch.number, records))
}

#[tonic::async_trait]
impl UsageCollector for Service {
    async fn hand(&self, request: Request<Batch>) -> Result<Response<Taken>, Status> {
        let certificates = request.peer_certs();
        let leaf = certificates.as_ref().and_then(|chain| chain.first());
        let leaf = leaf.ok_or_else(|| Status::unauthenticated("the connection has no certificate"))?;
        let host = self.host(leaf).map_err(|problem| {
            tracing::warn!(problem, "somebody who is no host hands over records");
            Status::permission_denied(problem)
        })?;
        let (spool, batch, records) = parse(request.into_inner()).map_err(|invalid| {
            tracing::error!(host = %host, problem = %invalid, "a host hands over what is no record");
            Status::from(invalid)
        })?;
        let handed = Handed {
            host,
            spool,
            batch,
            records,
        };
        let host = handed.host.clone();
        self.sinks.put(handed).await.map_err(|error| {
            let error = format!("{error:#}");
            tracing::error!(host = %host, error, "a batch is not taken: its host keeps it");
            Status::unavailable(error)
        })?;
        Ok(Response::new(Taken {}))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;
    use crate::sink::Sinks;

    fn certificate(uris: &[&str]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params
            .self_signed(&KeyPair::generate().unwrap())
            .unwrap()
            .der()
            .to_vec()
    }

    #[test]
    fn only_a_host_of_this_pool_hands_over_and_for_itself() {
        let service = Service::new(Sinks::none(), "pool".into());
        let host = |uris: &[&str]| service.host(&certificate(uris)).map(String::from);
        assert_eq!(host(&["spiffe://pool/host/host-a"]), Ok("host-a".into()));
        for uris in [
            &[][..],
            &["spiffe://pool/tenant/acme/virtual-node"],
            &["spiffe://pool/usage-collector"],
            &["spiffe://other/host/host-a"],
            &["spiffe://pool/host/host-a", "spiffe://pool/host/host-b"],
        ] {
            assert!(host(uris).is_err(), "{uris:?}");
        }
    }

    #[test]
    fn a_batch_with_one_bad_record_is_refused_whole_and_by_its_field() {
        let batch = Batch {
            spool: "s".into(),
            number: 1,
            records: vec![Default::default()],
        };
        let error = parse(batch.clone()).unwrap_err();
        assert_eq!(error.field, "records[0].from");
        let nameless = Batch {
            spool: "../x".into(),
            records: vec![],
            ..batch
        };
        assert_eq!(parse(nameless).unwrap_err().field, "spool");
    }
}
