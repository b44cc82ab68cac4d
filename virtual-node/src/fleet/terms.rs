//! What a `VirtualNode` and its Secrets say, parsed: domain values or a refusal that
//! names the field. Pure. The cell's API server refuses most of it already; a schema
//! can be older than this, or written by hand.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::config::Kubeconfig;
use pool_agent_api::{Invalid, Peer, TenantId};

use super::{
    kubeconfig,
    resource::{MeshSource, VirtualNode},
};
use crate::{
    config,
    kubelet::{ClientAuthority, check_clients},
    pool_tls::{Files, Pem, PoolTls},
};

/// Why a virtual node is not taken: a condition's reason, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl From<Invalid> for Refusal {
    fn from(invalid: Invalid) -> Self {
        Self {
            reason: "InvalidSpec",
            message: invalid.to_string(),
        }
    }
}

/// What the resource itself says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) tenant: TenantId,
    pub(crate) node_name: String,
    pub(crate) address: Option<IpAddr>,
    pub(crate) kubeconfig_secret: String,
    pub(crate) pool_secret: String,
    pub(crate) claims: config::Claims,
    pub(crate) node: config::Node,
    pub(crate) cluster: config::Cluster,
    pub(crate) trust_domain: String,
    pub(crate) cluster_id: String,
    pub(crate) network: String,
}

impl Terms {
    pub(crate) fn parse(node: &VirtualNode) -> Result<Self, Refusal> {
        let namespace = node.metadata.namespace.clone().unwrap_or_default();
        let Some(tenant) = pool_cell::names::tenant_of(&namespace) else {
            return Err(Refusal {
                reason: "NotATenant",
                message: format!("metadata.namespace: {namespace} is no tenant's: it must be tenant-ID"),
            });
        };
        let spec = &node.spec;
        let MeshSource::Embedded = spec.mesh.source;
        let ip = |field: &str, text: &str| -> Result<IpAddr, Invalid> {
            text.parse()
                .map_err(|_| Invalid::new(field, format_args!("{text:?} is no IP address")))
        };
        let nonempty = |field: &str, text: &str| -> Result<String, Invalid> {
            if text.is_empty() {
                return Err(Invalid::new(field, "is required"));
            }
            Ok(text.to_owned())
        };
        let label = |field: &str, value: &Option<String>| {
            value.clone().map(|value| config::label(field, value)).transpose()
        };
        let pod_range: IpNet = spec.cluster.pod_range.parse().map_err(|_| {
            let problem = format!("{:?} is no range such as 10.77.0.0/16", spec.cluster.pod_range);
            Invalid::new("spec.cluster.podRange", problem)
        })?;
        let upstream = spec.cluster.upstream_nameservers.iter().enumerate();
        Ok(Self {
            claims: config::Claims {
                namespace: pool_cell::names::namespace_of(&tenant)?,
                priority_class: label("spec.priorityClassName", &spec.priority_class_name)?,
                zone: label("spec.zone", &spec.zone)?,
                class: label("spec.class", &spec.class)?,
                arch: label("spec.arch", &spec.arch)?,
            },
            tenant,
            node_name: config::node_name("spec.nodeName", spec.node_name.clone())?,
            address: match &spec.address {
                Some(address) => Some(ip("spec.address", address)?),
                None => None,
            },
            kubeconfig_secret: nonempty("spec.kubeconfigSecret.name", &spec.kubeconfig_secret.name)?,
            pool_secret: nonempty("spec.poolSecret.name", &spec.pool_secret.name)?,
            node: config::Node {
                labels: spec.labels.clone(),
                taints: spec
                    .taints
                    .iter()
                    .map(|taint| config::Taint {
                        key: taint.key.clone(),
                        value: taint.value.clone(),
                        effect: taint.effect,
                    })
                    .collect(),
                quota: None,
            },
            cluster: config::Cluster {
                domain: nonempty("spec.cluster.domain", &spec.cluster.domain)?,
                dns_address: ip("spec.cluster.dnsAddress", &spec.cluster.dns_address)?,
                upstream_nameservers: upstream
                    .map(|(i, server)| ip(&format!("spec.cluster.upstreamNameservers[{i}]"), server))
                    .collect::<Result<_, _>>()?,
                pod_range: config::network("spec.cluster.podRange", pod_range)?,
            },
            trust_domain: nonempty("spec.mesh.trustDomain", &spec.mesh.trust_domain)?,
            cluster_id: nonempty("spec.mesh.clusterId", &spec.mesh.cluster_id)?,
            network: spec.mesh.network.clone(),
        })
    }
}

/// What the tenant's Secrets say.
pub(crate) struct Credentials {
    pub(crate) kubeconfig: Kubeconfig,
    pub(crate) clients: ClientAuthority,
    pub(crate) pool_tls: Arc<PoolTls>,
}

impl Credentials {
    pub(crate) fn parse(
        terms: &Terms,
        trust_domain: &str,
        kubeconfig: &Secret,
        pool: &Secret,
    ) -> Result<Self, Refusal> {
        let refuse = |reason| {
            move |invalid: Invalid| Refusal {
                reason,
                message: invalid.to_string(),
            }
        };
        let tenants = |key| bytes(&terms.kubeconfig_secret, kubeconfig, key);
        let text =
            text(&terms.kubeconfig_secret, kubeconfig, "kubeconfig").map_err(refuse("InvalidKubeconfig"))?;
        let field = format!("Secret {}: kubeconfig", terms.kubeconfig_secret);
        let parsed = kubeconfig::parse(&field, text).map_err(refuse("InvalidKubeconfig"))?;
        let clients = ClientAuthority::Pem {
            called: called(&terms.kubeconfig_secret, "kubelet-client-ca.crt"),
            pem: tenants("kubelet-client-ca.crt")
                .map_err(refuse("InvalidKubeconfig"))?
                .to_vec(),
        };
        check_clients(&clients).map_err(|error| Refusal {
            reason: "InvalidKubeconfig",
            message: error.to_string(),
        })?;

        let own = |key| bytes(&terms.pool_secret, pool, key).map(<[u8]>::to_vec);
        let invalid = refuse("InvalidPoolCredentials");
        let files = Files {
            trust_domain: trust_domain.to_owned(),
            certificate: called(&terms.pool_secret, "tls.crt"),
            key: called(&terms.pool_secret, "tls.key"),
            ca: called(&terms.pool_secret, "ca.crt"),
        };
        let pem = Pem {
            certificate: own("tls.crt").map_err(invalid)?,
            key: own("tls.key").map_err(invalid)?,
            ca: own("ca.crt").map_err(invalid)?,
        };
        let unusable = |error: &dyn std::error::Error| Refusal {
            reason: "InvalidPoolCredentials",
            message: error.to_string(),
        };
        let pool_tls = PoolTls::of(files, pem).map_err(|error| unusable(&error))?;
        // Hosts read the tenant from it: another's would make this the other's node.
        let name = pool_tls.name().map_err(|error| unusable(&error))?;
        let ours = name.trust_domain == trust_domain
            && matches!(&name.peer, Peer::VirtualNode(tenant) if *tenant == terms.tenant);
        if !ours {
            return Err(Refusal {
                reason: "InvalidPoolCredentials",
                message: format!(
                    "Secret {}: tls.crt: is of {name}, not of tenant {} in {trust_domain}",
                    terms.pool_secret, terms.tenant
                ),
            });
        }
        Ok(Self {
            kubeconfig: parsed,
            clients,
            pool_tls: Arc::new(pool_tls),
        })
    }
}

/// What errors call a key of a Secret.
fn called(secret: &str, key: &str) -> PathBuf {
    PathBuf::from(format!("Secret {secret}: {key}"))
}

fn bytes<'a>(name: &str, secret: &'a Secret, key: &str) -> Result<&'a [u8], Invalid> {
    let data: Option<&BTreeMap<String, ByteString>> = secret.data.as_ref();
    data.and_then(|data| data.get(key))
        .map(|value| value.0.as_slice())
        .ok_or_else(|| Invalid::new(format!("Secret {name}: {key}"), "is missing"))
}

pub(crate) fn text<'a>(name: &str, secret: &'a Secret, key: &str) -> Result<&'a str, Invalid> {
    std::str::from_utf8(bytes(name, secret, key)?)
        .map_err(|_| Invalid::new(format!("Secret {name}: {key}"), "is no text"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{fleet::resource::tests::example, pool_tls::test_pool::TestPool};

    fn with(path: &str, value: Value) -> VirtualNode {
        let mut object = example();
        *object.pointer_mut(path).unwrap() = value;
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_good_one_is_taken_as_it_says() {
        let terms = Terms::parse(&with("/spec/zone", json!("z-1"))).unwrap();
        assert_eq!(terms.tenant.as_str(), "acme");
        assert_eq!(terms.claims.namespace.as_str(), "tenant-acme");
        assert_eq!(terms.claims.zone.as_deref(), Some("z-1"));
        assert_eq!(terms.cluster.pod_range.to_string(), "10.77.0.0/16");
    }

    #[test]
    fn what_the_schema_let_through_is_refused_by_the_name_of_its_field() {
        for (path, value, said) in [
            (
                "/metadata/namespace",
                json!("default"),
                "metadata.namespace: default is no tenant's",
            ),
            ("/spec/nodeName", json!("Acme"), "spec.nodeName:"),
            (
                "/spec/nodeName",
                json!("a".repeat(64)),
                "spec.nodeName: must have at most 63",
            ),
            ("/spec/address", json!("somewhere"), "spec.address:"),
            ("/spec/zone", json!("z 1"), "spec.zone:"),
            ("/spec/priorityClassName", json!("a/b"), "spec.priorityClassName:"),
            (
                "/spec/kubeconfigSecret/name",
                json!(""),
                "spec.kubeconfigSecret.name: is required",
            ),
            (
                "/spec/cluster/dnsAddress",
                json!("dns"),
                "spec.cluster.dnsAddress:",
            ),
            (
                "/spec/cluster/upstreamNameservers/0",
                json!("x"),
                "spec.cluster.upstreamNameservers[0]:",
            ),
            (
                "/spec/cluster/podRange",
                json!("10.77.0.1/16"),
                "spec.cluster.podRange: has host bits set",
            ),
            ("/spec/cluster/podRange", json!("all"), "spec.cluster.podRange:"),
        ] {
            let refused = Terms::parse(&with(path, value)).unwrap_err();
            assert!(refused.message.starts_with(said), "{refused:?} should say {said}");
        }
    }

    fn secret(entries: &[(&str, Vec<u8>)]) -> Secret {
        Secret {
            data: Some(
                entries
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), ByteString(value.clone())))
                    .collect(),
            ),
            ..Secret::default()
        }
    }

    #[test]
    fn a_certificate_of_another_tenant_is_refused() {
        let pool = TestPool::new();
        let kubeconfig = "
current-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: 'https://api.example', certificate-authority-data: QQ==}}]
users: [{name: u, user: {token: t}}]
";
        let files = pool.files("node", &pool.virtual_node());
        let read = |path: &PathBuf| std::fs::read(path).unwrap();
        let tenants = secret(&[
            ("kubeconfig", kubeconfig.into()),
            ("kubelet-client-ca.crt", read(&files.ca)),
        ]);
        let own = secret(&[
            ("tls.crt", read(&files.certificate)),
            ("tls.key", read(&files.key)),
            ("ca.crt", read(&files.ca)),
        ]);
        let parse = |namespace: &str, tenants: &Secret, own: &Secret| {
            let terms = Terms::parse(&with("/metadata/namespace", json!(namespace))).unwrap();
            Credentials::parse(&terms, &files.trust_domain, tenants, own).map(drop)
        };
        // The one that the test pool's certificate names.
        parse("tenant-acme", &tenants, &own).unwrap();
        let refused = parse("tenant-demo", &tenants, &own).unwrap_err();
        assert!(refused.message.contains("tls.crt: is of"), "{refused:?}");
        let refused = parse("tenant-acme", &secret(&[]), &own).unwrap_err();
        assert_eq!(refused.message, "Secret kubeconfig: kubeconfig: is missing");
        let refused = parse("tenant-acme", &tenants, &secret(&[])).unwrap_err();
        assert_eq!(refused.message, "Secret pool: tls.crt: is missing");
    }
}
