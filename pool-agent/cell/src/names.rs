//! Names, labels and annotations in the cell.

use k8s_openapi::api::core::v1::Pod;
use pool_agent_api::{Attempt, Invalid, Namespace, PodUid, SandboxKey, TenantId};

/// Keeps pods away from the pool's hosts that are no claims.
pub const POOL_TAINT: &str = "spindrift.dev/pool";
/// Of a claim: the UID of the pod in its tenant's cluster.
pub const POD_UID: &str = "spindrift.dev/pod-uid";
/// Of a claim: the attempt, in decimal digits.
pub const ATTEMPT: &str = "spindrift.dev/attempt";
/// Of a claim: the UID of the pod's controller, which its siblings share.
pub const OWNER: &str = "spindrift.dev/owner";
/// Annotation of a claim: `namespace/name` of the pod in its tenant's cluster.
pub const POD: &str = "spindrift.dev/pod";
/// Annotation of a claim: the virtual node that the pod is bound to.
pub const NODE: &str = "spindrift.dev/node";
/// Annotation of a claim, written by the host's agent: `ADDRESS:PORT`, where it
/// serves.
pub const AGENT: &str = "spindrift.dev/agent";
/// Condition of a claim that is being deleted: its host's Lease has lapsed.
pub const HOST_LAPSED: &str = "spindrift.dev/HostLapsed";
/// Label of a Node: what kind of host it is, in the operator's words.
pub const CLASS: &str = "spindrift.dev/class";
pub const ZONE: &str = "topology.kubernetes.io/zone";
pub const REGION: &str = "topology.kubernetes.io/region";
pub const HOSTNAME: &str = "kubernetes.io/hostname";
pub const ARCH: &str = "kubernetes.io/arch";
pub const OS: &str = "kubernetes.io/os";

/// Annotation of a bootstrap token's Secret: the host whose it is.
pub const HOST: &str = "spindrift.dev/host";
/// Annotation of a bootstrap token's Secret: the UID of the one request that it was
/// good for.
pub const USED_BY: &str = "spindrift.dev/used-by";
/// Annotation of a host's request for a certificate: which machine it is.
pub const MACHINE: &str = "spindrift.dev/machine-id";
/// Group of the bootstrap tokens of hosts.
pub const BOOTSTRAPPERS: &str = "system:bootstrappers:spindrift";
/// Group of the hosts' own identities.
pub const NODES: &str = "system:nodes";
/// Signer of the hosts' client certificates.
pub const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Signer of the certificates with which the pool's members know each other: hosts and
/// tenants' virtual nodes.
pub const MEMBER_SIGNER: &str = "spindrift.dev/pool-member";
/// What a member has to know of its pool: a ConfigMap, for everybody to read.
pub const POOL_NAMESPACE: &str = "spindrift-system";
pub const POOL: &str = "spindrift-pool";
/// Its keys: the roots as PEM, and the trust domain.
pub const POOL_CA: &str = "ca.crt";
pub const POOL_TRUST_DOMAIN: &str = "trust-domain";
/// Where the hosts' Leases are.
pub const LEASES: &str = "kube-node-lease";

const TENANT_PREFIX: &str = "tenant-";

/// The identity of a host in the cell, as its Node.
pub fn host_user(host: &pool_agent_api::HostName) -> String {
    format!("system:node:{host}")
}

const VIRTUAL_NODE_USER: &str = "spindrift:virtual-node:";

/// The identity of a tenant's virtual node in the cell.
pub fn virtual_node_user(tenant: &TenantId) -> String {
    format!("{VIRTUAL_NODE_USER}{tenant}")
}

/// Whose virtual node a user is; None if it is none's.
pub fn tenant_of_user(user: &str) -> Option<TenantId> {
    TenantId::parse("user", user.strip_prefix(VIRTUAL_NODE_USER)?).ok()
}

/// The namespace of a tenant's claims. Refused for a tenant whose id is too long to
/// have one.
pub fn namespace_of(tenant: &TenantId) -> Result<Namespace, Invalid> {
    Namespace::parse("tenant", format!("{TENANT_PREFIX}{tenant}")).map_err(|_| {
        Invalid::new(
            "tenant",
            format_args!(
                "{tenant} is too long for a namespace of its own in the cell: at most {} characters",
                63 - TENANT_PREFIX.len()
            ),
        )
    })
}

/// Whose claims a namespace holds; None if it is no tenant's.
pub fn tenant_of(namespace: &str) -> Option<TenantId> {
    TenantId::parse("namespace", namespace.strip_prefix(TENANT_PREFIX)?).ok()
}

/// The name of the claim for one attempt of one pod.
pub fn claim_name(key: &SandboxKey) -> String {
    format!("{}-{}", key.pod, key.attempt)
}

/// Whose claim a Pod is by its name, which cannot change, whatever else it says: one of
/// another release may say what this one does not know. None if it is no claim's name.
pub fn subject(pod: &Pod) -> Option<(TenantId, SandboxKey)> {
    let tenant = tenant_of(pod.metadata.namespace.as_deref()?)?;
    let name = pod.metadata.name.as_deref()?;
    let (pod, attempt) = name.rsplit_once('-')?;
    let key = SandboxKey {
        pod: PodUid::parse("metadata.name", pod).ok()?,
        attempt: Attempt::parse("metadata.name", attempt.parse().ok()?).ok()?,
    };
    (claim_name(&key) == name).then_some((tenant, key))
}

/// Whether one version of an object is newer than another. Kubernetes promises that
/// versions of one resource are numbers that grow; what is none says nothing, and the
/// object that comes later is taken for the newer.
pub fn is_newer(new: Option<&str>, old: Option<&str>) -> bool {
    let number = |version: Option<&str>| version.and_then(|v| v.parse::<u64>().ok());
    match (number(new), number(old)) {
        (Some(new), Some(old)) => new > old,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_is_found_again_from_its_namespace_and_nobody_elses() {
        let tenant: TenantId = "acme".parse().unwrap();
        let namespace = namespace_of(&tenant).unwrap();
        assert_eq!(namespace.as_str(), "tenant-acme");
        assert_eq!(tenant_of(namespace.as_str()), Some(tenant));
        for other in ["acme", "kube-system", "tenant-", "tenant--", "tenant-a_b"] {
            assert_eq!(tenant_of(other), None, "{other}");
        }
        assert_eq!(
            tenant_of_user("spindrift:virtual-node:acme").unwrap().as_str(),
            "acme"
        );
        for other in [
            "acme",
            "spindrift:virtual-node:",
            "spindrift:virtual-node:a/b",
            "system:node:a",
        ] {
            assert_eq!(tenant_of_user(other), None, "{other}");
        }
        let of = |namespace: &str, name: &str| {
            let mut pod = Pod::default();
            pod.metadata.namespace = Some(namespace.into());
            pod.metadata.name = Some(name.into());
            subject(&pod).map(|(tenant, key)| (tenant.to_string(), key.to_string()))
        };
        assert_eq!(
            of("tenant-acme", "a-b-12"),
            Some(("acme".into(), "a-b/12".into()))
        );
        for (namespace, name) in [
            ("acme", "a-1"),
            ("tenant-acme", "a"),
            ("tenant-acme", "a-0"),
            ("tenant-acme", "a-01"),
            ("tenant-acme", "a-x"),
            ("tenant-acme", "-1"),
        ] {
            assert_eq!(of(namespace, name), None, "{namespace}/{name}");
        }
        let long: TenantId = "x".repeat(57).parse().unwrap();
        assert!(namespace_of(&long).unwrap_err().problem.contains("56"));
    }
}
