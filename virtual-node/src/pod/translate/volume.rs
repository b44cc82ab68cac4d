//! One volume: an empty directory, or files with contents that are in hand.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, EmptyDirVolumeSource, KeyToPath, Pod, PodSpec, ProjectedVolumeSource,
    Secret, Volume as PodVolume,
};
use pool_agent_api::{
    VolumeName,
    spec::{EmptyDir, File, Files, Volume, VolumeSource},
};

use super::{NodeFacts, Untranslatable, downward, security};
use crate::{
    pod::references::{Resolved, TokenSlot},
    quantity,
};

/// Kubernetes' default for files of volumes.
const DEFAULT_MODE: i32 = 0o644;

pub(super) fn volume(
    pod: &Pod,
    spec: &PodSpec,
    volume: &PodVolume,
    resolved: &Resolved,
    facts: &NodeFacts,
    at: &str,
) -> Result<Volume, Untranslatable> {
    let building = Building {
        pod,
        spec,
        volume,
        resolved,
        facts,
    };
    let source = if let Some(dir) = &volume.empty_dir {
        VolumeSource::EmptyDir(empty_dir(dir, &format!("{at}.emptyDir"))?)
    } else if let Some(map) = &volume.config_map {
        let modes = Modes::of(map.default_mode, map.default_user);
        let files = building.config_map(&map.name, map.items.as_deref(), map.optional, modes)?;
        VolumeSource::Files(Files::new(files, false)?)
    } else if let Some(secret) = &volume.secret {
        let name = secret.secret_name.as_deref().unwrap_or_default();
        let modes = Modes::of(secret.default_mode, secret.default_user);
        let files = building.secret(name, secret.items.as_deref(), secret.optional, modes)?;
        VolumeSource::Files(Files::new(files, true)?)
    } else if let Some(downward) = &volume.downward_api {
        let modes = Modes::of(downward.default_mode, None);
        let at = format!("{at}.downwardAPI.items");
        let files = building.downward(downward.items.as_deref().unwrap_or_default(), modes, &at)?;
        VolumeSource::Files(Files::new(files, false)?)
    } else if let Some(projected) = &volume.projected {
        building.projected(projected, &format!("{at}.projected"))?
    } else {
        return Err(Untranslatable::unsupported(
            at,
            format_args!(
                "volume {:?} is of a kind that is not supported{}; emptyDir, configMap, secret, downwardAPI \
                 and projected are",
                volume.name,
                kind(volume).map(|k| format!(": {k}")).unwrap_or_default(),
            ),
        ));
    };
    Ok(Volume {
        name: VolumeName::parse(&format!("{at}.name"), volume.name.clone())?,
        source,
    })
}

/// What the volume is, as its writer called it.
fn kind(volume: &PodVolume) -> Option<String> {
    let json = serde_json::to_value(volume).ok()?;
    json.as_object()?.keys().find(|key| *key != "name").cloned()
}

fn empty_dir(dir: &EmptyDirVolumeSource, at: &str) -> Result<EmptyDir, Untranslatable> {
    let memory = match dir.medium.as_deref() {
        None | Some("") => false,
        Some("Memory") => true,
        Some(other) => {
            return Err(Untranslatable::unsupported(
                format!("{at}.medium"),
                format_args!("{other:?} is not supported"),
            ));
        }
    };
    if dir.mode.is_some() {
        return Err(Untranslatable::unsupported(
            format!("{at}.mode"),
            "is not supported",
        ));
    }
    let size_limit_bytes = match &dir.size_limit {
        Some(limit) => Some(
            quantity::whole(&limit.0)
                .map_err(|e| Untranslatable::unsupported(format!("{at}.sizeLimit"), e))?,
        )
        .filter(|bytes| *bytes > 0),
        None => None,
    };
    Ok(EmptyDir {
        memory,
        size_limit_bytes,
    })
}

/// What a file gets unless its item says otherwise.
#[derive(Clone, Copy)]
struct Modes {
    mode: i32,
    owner: Option<i64>,
}

impl Modes {
    fn of(mode: Option<i32>, owner: Option<i64>) -> Self {
        Self {
            mode: mode.unwrap_or(DEFAULT_MODE),
            owner,
        }
    }

    fn file(self, path: &str, content: Vec<u8>, mode: Option<i32>, owner: Option<i64>) -> File {
        File {
            path: path.to_owned(),
            content,
            // Bits beyond permission bits were refused by the API server, if they matter.
            mode: u32::try_from(mode.unwrap_or(self.mode)).unwrap_or(0) & 0o777,
            owner: owner.or(self.owner),
        }
    }
}

struct Building<'a> {
    pod: &'a Pod,
    spec: &'a PodSpec,
    volume: &'a PodVolume,
    resolved: &'a Resolved,
    facts: &'a NodeFacts,
}

impl Building<'_> {
    fn missing(&self, message: String) -> Untranslatable {
        Untranslatable::MissingForVolume {
            volume: self.volume.name.clone(),
            message,
        }
    }

    fn config_map(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        modes: Modes,
    ) -> Result<Vec<File>, Untranslatable> {
        let found = self.resolved.config_maps.get(name).and_then(Option::as_deref);
        let Some(map) = found else {
            return self.absent(optional, format!("configmap {name:?} not found"));
        };
        self.pick(&config_map_files(map), items, optional, modes)
    }

    fn secret(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        modes: Modes,
    ) -> Result<Vec<File>, Untranslatable> {
        let found = self.resolved.secrets.get(name).and_then(Option::as_deref);
        let Some(secret) = found else {
            return self.absent(optional, format!("secret {name:?} not found"));
        };
        self.pick(&secret_files(secret), items, optional, modes)
    }

    fn absent(&self, optional: Option<bool>, message: String) -> Result<Vec<File>, Untranslatable> {
        if optional == Some(true) {
            Ok(vec![])
        } else {
            Err(self.missing(message))
        }
    }

    /// All keys, or the items that are asked for.
    fn pick(
        &self,
        data: &BTreeMap<&str, &[u8]>,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        modes: Modes,
    ) -> Result<Vec<File>, Untranslatable> {
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            return Ok(data
                .iter()
                .map(|(key, content)| modes.file(key, content.to_vec(), None, None))
                .collect());
        };
        let mut files = vec![];
        for item in items {
            match data.get(item.key.as_str()) {
                Some(content) => {
                    files.push(modes.file(&tidy(&item.path), content.to_vec(), item.mode, item.user));
                }
                None if optional == Some(true) => {}
                None => return Err(self.missing(format!("references non-existent key: {}", item.key))),
            }
        }
        Ok(files)
    }

    fn downward(
        &self,
        items: &[DownwardAPIVolumeFile],
        modes: Modes,
        at: &str,
    ) -> Result<Vec<File>, Untranslatable> {
        items
            .iter()
            .enumerate()
            .map(|(i, item)| {
                let at = format!("{at}[{i}]");
                let content = if let Some(field) = &item.field_ref {
                    downward::known_field(self.pod, self.facts, field, &format!("{at}.fieldRef"))?
                } else if let Some(resource) = &item.resource_field_ref {
                    let at = format!("{at}.resourceFieldRef");
                    downward::resource(self.pod, None, self.facts, resource, &at)?
                } else {
                    return Err(Untranslatable::unsupported(
                        at,
                        "names neither a field nor a resource",
                    ));
                };
                Ok(modes.file(&tidy(&item.path), content.into_bytes(), item.mode, item.user))
            })
            .collect()
    }

    /// Sources in order; a later file replaces an earlier one of the same path,
    /// as a kubelet does.
    fn projected(&self, projected: &ProjectedVolumeSource, at: &str) -> Result<VolumeSource, Untranslatable> {
        let modes = Modes::of(projected.default_mode, projected.default_user);
        let mut files = BTreeMap::new();
        let mut sensitive = false;
        for (i, source) in projected.sources.iter().flatten().enumerate() {
            let at = format!("{at}.sources[{i}]");
            let found = if let Some(map) = &source.config_map {
                self.config_map(&map.name, map.items.as_deref(), map.optional, modes)?
            } else if let Some(secret) = &source.secret {
                sensitive = true;
                self.secret(&secret.name, secret.items.as_deref(), secret.optional, modes)?
            } else if let Some(downward) = &source.downward_api {
                let at = format!("{at}.downwardAPI.items");
                self.downward(downward.items.as_deref().unwrap_or_default(), modes, &at)?
            } else if let Some(token) = &source.service_account_token {
                sensitive = true;
                let slot = TokenSlot {
                    volume: self.volume.name.clone(),
                    source: i,
                };
                let held = self.resolved.tokens.get(&slot);
                let held = held.ok_or_else(|| self.missing("token was not issued".into()))?;
                let content = held.text.clone().into_bytes();
                vec![self.token_file(modes, &tidy(&token.path), content, token.user)]
            } else {
                return Err(Untranslatable::unsupported(
                    at,
                    "is of a kind that is not supported; configMap, secret, downwardAPI and \
                     serviceAccountToken are",
                ));
            };
            files.extend(found.into_iter().map(|f| (f.path.clone(), f)));
        }
        let files = Files::new(files.into_values().collect(), sensitive)?;
        Ok(VolumeSource::Files(files))
    }

    /// A token is private to the user that all containers run as, if there is
    /// one, and to the pod's group, if it has one.
    fn token_file(&self, modes: Modes, path: &str, content: Vec<u8>, user: Option<i64>) -> File {
        let mut users = self
            .spec
            .init_containers
            .iter()
            .flatten()
            .chain(&self.spec.containers)
            .map(|c| security::run_as_user(self.spec, c));
        let first = users.next().flatten();
        let common = first.filter(|first| users.all(|user| user == Some(*first)));
        let group = self.spec.security_context.as_ref().and_then(|c| c.fs_group);
        let mode = match (common, group) {
            (None, None) => None,
            (Some(_), None) => Some(0o600),
            (_, Some(_)) => Some(0o640),
        };
        modes.file(path, content, mode, user.or(common))
    }
}

/// `a/./b//c` as `a/b/c`: what Kubernetes lets pass and means the same.
fn tidy(path: &str) -> String {
    path.split('/')
        .filter(|s| !s.is_empty() && *s != ".")
        .collect::<Vec<_>>()
        .join("/")
}

fn config_map_files(map: &ConfigMap) -> BTreeMap<&str, &[u8]> {
    let text = map.data.iter().flatten().map(|(k, v)| (k.as_str(), v.as_bytes()));
    let binary = map
        .binary_data
        .iter()
        .flatten()
        .map(|(k, v)| (k.as_str(), v.0.as_slice()));
    text.chain(binary).collect()
}

fn secret_files(secret: &Secret) -> BTreeMap<&str, &[u8]> {
    secret
        .data
        .iter()
        .flatten()
        .map(|(k, v)| (k.as_str(), v.0.as_slice()))
        .collect()
}
