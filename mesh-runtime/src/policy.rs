//! Who may connect to whom: Istio's L4 authorization, decided at the
//! destination. Pure; `proxy` asks for each connection it delivers, and again
//! for each live one when policies change.
//!
//! A DENY that matches refuses. Else, if there is any ALLOW policy for the
//! destination, one of them has to match. Dry-run policies decide nothing; what
//! they would have done is reported. A policy that cannot be read refuses
//! whatever it could have refused ([`Policy::unreadable`]).

mod matching;

pub use matching::{InvalidPolicy, Match};

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_api::{Identity, istio::security as wire};
use rpds::HashTrieMapSync;

/// What a policy can look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Verified by TLS; None for plaintext.
    pub source: Option<Identity>,
    pub source_address: IpAddr,
    /// The pod's address and the port its application listens on.
    pub destination: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Every workload of the mesh.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// Workloads that list it.
    Workload,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enforcement {
    Enforced,
    DryRun,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `<namespace>/<name>`.
    pub key: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    pub enforcement: Enforcement,
    rules: Rules,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rules {
    /// Of these one has to match.
    Any(Box<[Rule]>),
    /// Its rules could not be read: what it allows is unknown, so nothing; what
    /// it denies is unknown, so everything.
    Unreadable,
}

/// All of these have to match; none does always.
type Rule = Box<[Clause]>;
/// One of these has to match; none does always.
type Clause = Box<[Match]>;

impl Policy {
    pub fn parse(p: &wire::Authorization) -> Result<Self, InvalidPolicy> {
        let rules = p
            .groups
            .iter()
            .map(|group| {
                group
                    .rules
                    .iter()
                    .map(|clause| clause.matches.iter().map(Match::parse).collect())
                    .collect()
            })
            .collect::<Result<_, _>>()?;
        if let Some(extension) = p.extensions.first() {
            return Err(InvalidPolicy::Extension {
                name: extension.name.clone(),
            });
        }
        Ok(Self {
            rules: Rules::Any(rules),
            ..Self::unreadable(p)?
        })
    }

    /// The policy without its rules: it refuses whatever it could have refused.
    /// An error, if not even whom it is for can be read.
    pub fn unreadable(p: &wire::Authorization) -> Result<Self, InvalidPolicy> {
        if p.namespace.is_empty() || p.name.is_empty() {
            return Err(InvalidPolicy::NoName);
        }
        Ok(Self {
            key: format!("{}/{}", p.namespace, p.name).into(),
            namespace: p.namespace.as_str().into(),
            scope: match wire::Scope::try_from(p.scope) {
                Ok(wire::Scope::Global) => Scope::Global,
                Ok(wire::Scope::Namespace) => Scope::Namespace,
                Ok(wire::Scope::WorkloadSelector) => Scope::Workload,
                Err(e) => return Err(InvalidPolicy::Scope { value: e.0 }),
            },
            action: match wire::Action::try_from(p.action) {
                Ok(wire::Action::Allow) => Action::Allow,
                Ok(wire::Action::Deny) => Action::Deny,
                Err(e) => return Err(InvalidPolicy::Action { value: e.0 }),
            },
            enforcement: if p.dry_run {
                Enforcement::DryRun
            } else {
                Enforcement::Enforced
            },
            rules: Rules::Unreadable,
        })
    }

    fn matches(&self, facts: &Facts) -> bool {
        match &self.rules {
            Rules::Unreadable => self.action == Action::Deny,
            Rules::Any(rules) => rules.iter().any(|rule| {
                rule.iter()
                    .all(|clause| clause.is_empty() || clause.iter().any(|m| m.matches(facts)))
            }),
        }
    }
}

/// All policies of the mesh, found by where they apply. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Set {
    all: HashTrieMapSync<Arc<str>, Arc<Policy>>,
    /// Keys of the global policies, and by namespace of those of a namespace.
    global: Arc<BTreeSet<Arc<str>>>,
    namespaces: HashTrieMapSync<Arc<str>, Arc<BTreeSet<Arc<str>>>>,
}

impl Set {
    pub fn get(&self, key: &str) -> Option<&Arc<Policy>> {
        self.all.get(key)
    }

    pub fn insert(&mut self, policy: Arc<Policy>) {
        self.remove(&policy.key.clone());
        match policy.scope {
            Scope::Global => {
                Arc::make_mut(&mut self.global).insert(policy.key.clone());
            }
            Scope::Namespace => {
                let mut keys = self
                    .namespaces
                    .get(&policy.namespace)
                    .cloned()
                    .unwrap_or_default();
                Arc::make_mut(&mut keys).insert(policy.key.clone());
                self.namespaces.insert_mut(policy.namespace.clone(), keys);
            }
            Scope::Workload => {}
        }
        self.all.insert_mut(policy.key.clone(), policy);
    }

    /// Whether there was such a policy.
    pub fn remove(&mut self, key: &str) -> bool {
        let Some(old) = self.all.get(key).cloned() else {
            return false;
        };
        self.all.remove_mut(key);
        match old.scope {
            Scope::Global => {
                Arc::make_mut(&mut self.global).remove(key);
            }
            Scope::Namespace => {
                if let Some(mut keys) = self.namespaces.get(&old.namespace).cloned() {
                    Arc::make_mut(&mut keys).remove(key);
                    if keys.is_empty() {
                        self.namespaces.remove_mut(&old.namespace);
                    } else {
                        self.namespaces.insert_mut(old.namespace.clone(), keys);
                    }
                }
            }
            Scope::Workload => {}
        }
        true
    }

    /// Decides on a connection to a workload of `namespace` that lists `listed`.
    pub fn decide(&self, namespace: &str, listed: &[Arc<str>], facts: &Facts) -> Decision {
        let mut report = Report::default();
        let mut allows = 0;
        let mut allowed = false;
        let of_namespace = self.namespaces.get(namespace);
        let keys = self
            .global
            .iter()
            .chain(of_namespace.into_iter().flat_map(|keys| keys.iter()))
            .chain(listed);
        let mut dry_run_allows = Vec::new();
        for key in keys {
            let Some(policy) = self.all.get(key) else {
                // Listed before it arrived. The push that brings it has live
                // connections decided upon anew.
                report.missing.push(key.clone());
                continue;
            };
            match (policy.enforcement, policy.action) {
                (Enforcement::Enforced, Action::Deny) => {
                    if policy.matches(facts) {
                        return Decision {
                            verdict: Verdict::Denied { by: key.clone() },
                            report,
                        };
                    }
                }
                (Enforcement::Enforced, Action::Allow) => {
                    allows += 1;
                    allowed = allowed || policy.matches(facts);
                }
                (Enforcement::DryRun, Action::Deny) => {
                    if policy.matches(facts) {
                        report.would_deny.push(key.clone());
                    }
                }
                (Enforcement::DryRun, Action::Allow) => dry_run_allows.push(policy),
            }
        }
        if !dry_run_allows.is_empty() && !allowed && !dry_run_allows.iter().any(|p| p.matches(facts)) {
            report
                .would_deny
                .extend(dry_run_allows.iter().map(|p| p.key.clone()));
        }
        Decision {
            verdict: if allows == 0 || allowed {
                Verdict::Allowed
            } else {
                Verdict::NotAllowed
            },
            report,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    pub report: Report,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Allowed,
    /// A DENY policy matches.
    Denied {
        by: Arc<str>,
    },
    /// There are ALLOW policies, and none matches.
    NotAllowed,
}

impl Verdict {
    pub fn allows(&self) -> bool {
        *self == Self::Allowed
    }
}

/// For the log: none of it decided anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Dry-run policies that would have refused the connection.
    pub would_deny: Vec<Arc<str>>,
    /// Policies that the workload lists and nobody has told of.
    pub missing: Vec<Arc<str>>,
}

#[cfg(test)]
mod tests;
