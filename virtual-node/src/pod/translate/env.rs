//! A container's environment, in Kubernetes' order of precedence: `env` over
//! `envFrom` over the variables that tell of Services.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod};
use pool_agent_api::spec::{EnvVar, Text};

use super::{NodeFacts, Untranslatable, downward, expansion::expand};
use crate::pod::references::{Resolved, ServiceLink};

/// A container's variables, in order of definition.
#[derive(Default)]
pub(super) struct Environment {
    order: Vec<String>,
    values: BTreeMap<String, Text>,
    /// Keys of ConfigMaps and Secrets that cannot be names of variables, by source.
    pub(super) skipped: Vec<String>,
}

impl Environment {
    pub(super) fn get(&self, name: &str) -> Option<&Text> {
        self.values.get(name)
    }

    fn set(&mut self, name: &str, value: Text) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.order.push(name.to_owned());
        }
    }

    pub(super) fn into_vars(mut self) -> Vec<EnvVar> {
        self.order
            .into_iter()
            .filter_map(|name| {
                let value = self.values.remove(&name)?;
                Some(EnvVar { name, value })
            })
            .collect()
    }
}

/// Names that the API server accepts: printable ASCII without `=`.
fn valid_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|c| (b' '..=b'~').contains(&c) && c != b'=')
}

pub(super) fn environment(
    pod: &Pod,
    container: &Container,
    resolved: &Resolved,
    facts: &NodeFacts,
    at: &str,
) -> Result<Environment, Untranslatable> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let links = service_variables(&resolved.services);
    let mut env = Environment::default();
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let (source, data) = if let Some(map) = &from.config_map_ref {
            let found = resolved.config_maps.get(&map.name).and_then(Option::as_ref);
            let Some(found) = found else {
                if map.optional == Some(true) {
                    continue;
                }
                return Err(missing(container, format!("configmap {:?} not found", map.name)));
            };
            let data = found.data.clone().unwrap_or_default();
            (format!("ConfigMap {namespace}/{}", map.name), data)
        } else if let Some(secret) = &from.secret_ref {
            let found = resolved.secrets.get(&secret.name).and_then(Option::as_ref);
            let Some(found) = found else {
                if secret.optional == Some(true) {
                    continue;
                }
                return Err(missing(container, format!("secret {:?} not found", secret.name)));
            };
            let data = found
                .data
                .iter()
                .flatten()
                .map(|(k, v)| (k.clone(), String::from_utf8_lossy(&v.0).into_owned()))
                .collect();
            (format!("Secret {namespace}/{}", secret.name), data)
        } else {
            continue;
        };
        let mut skipped = vec![];
        for (key, value) in data {
            let name = format!("{prefix}{key}");
            if valid_name(&name) {
                env.set(&name, literal(value));
            } else {
                skipped.push(name);
            }
        }
        if !skipped.is_empty() {
            env.skipped.push(format!(
                "Keys [{}] from the EnvFrom {source} were skipped since they are considered invalid environment variable names.",
                skipped.join(", ")
            ));
        }
    }
    for (i, var) in container.env.iter().flatten().enumerate() {
        let at = format!("{at}.env[{i}]");
        let written = var.value.as_deref().unwrap_or_default();
        let value = match &var.value_from {
            Some(from) if written.is_empty() => {
                match source(pod, container, resolved, facts, from, &format!("{at}.valueFrom"))? {
                    Some(value) => value,
                    // Optional, and not there: the variable is not set.
                    None => continue,
                }
            }
            _ => expand(written, |name| env.get(name).or_else(|| links.get(name))),
        };
        env.set(&var.name, value);
    }
    for (name, value) in links {
        if env.get(&name).is_none() {
            env.set(&name, value);
        }
    }
    Ok(env)
}

fn source(
    pod: &Pod,
    container: &Container,
    resolved: &Resolved,
    facts: &NodeFacts,
    from: &EnvVarSource,
    at: &str,
) -> Result<Option<Text>, Untranslatable> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    if let Some(field) = &from.field_ref {
        return downward::field(pod, facts, field, &format!("{at}.fieldRef")).map(Some);
    }
    if let Some(resource) = &from.resource_field_ref {
        let at = format!("{at}.resourceFieldRef");
        return downward::resource(pod, Some(container), facts, resource, &at).map(|v| Some(literal(v)));
    }
    if let Some(key) = &from.config_map_key_ref {
        let optional = key.optional == Some(true);
        let Some(map) = resolved.config_maps.get(&key.name).and_then(Option::as_ref) else {
            return absent(optional, container, format!("configmap {:?} not found", key.name));
        };
        return match map.data.as_ref().and_then(|d| d.get(&key.key)) {
            Some(value) => Ok(Some(literal(value.clone()))),
            None => absent(
                optional,
                container,
                format!(
                    "couldn't find key {} in ConfigMap {namespace}/{}",
                    key.key, key.name
                ),
            ),
        };
    }
    if let Some(key) = &from.secret_key_ref {
        let optional = key.optional == Some(true);
        let Some(secret) = resolved.secrets.get(&key.name).and_then(Option::as_ref) else {
            return absent(optional, container, format!("secret {:?} not found", key.name));
        };
        return match secret.data.as_ref().and_then(|d| d.get(&key.key)) {
            Some(value) => Ok(Some(literal(String::from_utf8_lossy(&value.0).into_owned()))),
            None => absent(
                optional,
                container,
                format!("couldn't find key {} in Secret {namespace}/{}", key.key, key.name),
            ),
        };
    }
    if from.file_key_ref.is_some() {
        return Err(Untranslatable::unsupported(
            format!("{at}.fileKeyRef"),
            "environment from files is not supported",
        ));
    }
    Ok(Some(Text::default()))
}

fn absent(optional: bool, container: &Container, message: String) -> Result<Option<Text>, Untranslatable> {
    if optional {
        Ok(None)
    } else {
        Err(missing(container, message))
    }
}

fn missing(container: &Container, message: String) -> Untranslatable {
    Untranslatable::MissingForContainer {
        container: container.name.clone(),
        message,
    }
}

fn literal(text: String) -> Text {
    if text.is_empty() {
        Text::default()
    } else {
        Text::literal(text)
    }
}

/// The variables of old container links, which Kubernetes still sets.
fn service_variables(services: &[ServiceLink]) -> BTreeMap<String, Text> {
    let shout = |name: &str| name.to_ascii_uppercase().replace('-', "_");
    let mut out = BTreeMap::new();
    for service in services {
        let (name, ip) = (shout(&service.name), &service.cluster_ip);
        // An IPv6 address is bracketed where a port follows.
        let host = if ip.contains(':') {
            format!("[{ip}]")
        } else {
            ip.clone()
        };
        let mut set = |key: String, value: String| out.insert(key, literal(value));
        set(format!("{name}_SERVICE_HOST"), ip.clone());
        for (i, port) in service.ports.iter().enumerate() {
            let number = port.port;
            if i == 0 {
                set(format!("{name}_SERVICE_PORT"), number.to_string());
            }
            if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
                set(
                    format!("{name}_SERVICE_PORT_{}", shout(port_name)),
                    number.to_string(),
                );
            }
            let protocol = port.protocol.to_ascii_lowercase();
            let url = format!("{protocol}://{host}:{number}");
            if i == 0 {
                set(format!("{name}_PORT"), url.clone());
            }
            let prefix = format!("{name}_PORT_{number}_{}", port.protocol.to_ascii_uppercase());
            set(prefix.clone(), url);
            set(format!("{prefix}_PROTO"), protocol);
            set(format!("{prefix}_PORT"), number.to_string());
            set(format!("{prefix}_ADDR"), ip.clone());
        }
    }
    out
}
