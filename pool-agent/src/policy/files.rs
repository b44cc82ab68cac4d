//! How much a pod may have the host itself hold for it: contents that the agent writes
//! are in no cgroup of the pod's.

use pool_agent_api::{
    Invalid, SandboxSpec,
    spec::{Files as Contents, VolumeSource},
    wire,
};
use prost::Message;
use serde::{Deserialize, Deserializer, de::Error};

use crate::admission::slim;

/// What a file takes at least, as a directory does.
pub const PAGE: u64 = 4096;
const LEAST: u64 = 64 << 10;

/// `[policy.files]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Files {
    /// What a pod's file volumes (ConfigMaps, Secrets, tokens) may hold together, in
    /// bytes, whole pages counted; a change needs as much again for a moment.
    #[serde(deserialize_with = "enough")]
    pub contents_bytes: u64,
    /// What the rest of a pod's spec may take (commands, environment, probes, …), in
    /// bytes as it is sent: it is kept in memory for as long as the pod is here.
    #[serde(deserialize_with = "enough")]
    pub spec_bytes: u64,
    /// What a pod's containers may write to /etc/hosts, /etc/hostname, /etc/resolv.conf
    /// and as their last words, together, in bytes.
    #[serde(deserialize_with = "enough")]
    pub given_bytes: u64,
    /// File systems that a pod may have mounted on the host: sub-paths of its volumes,
    /// and emptyDirs in memory. The kernel has 100,000 for all (fs.mount-max).
    pub mounts: usize,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            // A ConfigMap or a Secret is at most 1 MiB.
            contents_bytes: 16 << 20,
            // A Pod is at most 1.5 MiB; its environment may be of ConfigMaps too.
            spec_bytes: 4 << 20,
            given_bytes: 1 << 20,
            mounts: 256,
        }
    }
}

fn enough<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let bytes = u64::deserialize(from)?;
    if bytes < LEAST {
        return Err(D::Error::custom(format_args!(
            "{bytes} is too little for any pod: at least {LEAST}"
        )));
    }
    Ok(bytes)
}

impl Files {
    /// Refuses a spec that would have the host hold more.
    pub fn check(&self, spec: &SandboxSpec) -> Result<(), Invalid> {
        let held: u64 = spec
            .volumes
            .iter()
            .map(|volume| match &volume.source {
                VolumeSource::Files(files) => PAGE + taken(files),
                VolumeSource::EmptyDir(_) => PAGE,
            })
            .fold(0, u64::saturating_add);
        if held > self.contents_bytes {
            return Err(Invalid::new(
                "volumes",
                format_args!(
                    "hold {held} bytes of files, whole pages counted, over the {} a pod may have on this host: \
                     mount fewer or smaller ConfigMaps and Secrets",
                    self.contents_bytes
                ),
            ));
        }
        let rest = sent(&slim(spec.clone()));
        if rest > self.spec_bytes {
            return Err(Invalid::new(
                "containers",
                format_args!(
                    "and the rest of the spec take {rest} bytes, over the {} a pod may have on this host: \
                     shorten commands and environments",
                    self.spec_bytes
                ),
            ));
        }
        let sub_paths = spec
            .all_containers()
            .flat_map(|container| &container.mounts)
            .filter(|mount| mount.sub_path.is_some());
        let in_memory = spec
            .volumes
            .iter()
            .filter(|volume| matches!(&volume.source, VolumeSource::EmptyDir(empty) if empty.memory));
        let mounts = sub_paths.count() + in_memory.count();
        if mounts > self.mounts {
            return Err(Invalid::new(
                "volumes",
                format_args!(
                    "need {mounts} mounts on the host for sub-paths and emptyDirs in memory, over the {} a pod \
                     may have",
                    self.mounts
                ),
            ));
        }
        Ok(())
    }
}

/// The length of a spec as it is sent.
fn sent(spec: &SandboxSpec) -> u64 {
    let length = wire::SandboxSpec::from(spec.clone()).encoded_len();
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// In whole pages, with the directories. Paths are read as often as they have parts, so
/// that files that share a directory count it again: an upper bound.
fn taken(files: &Contents) -> u64 {
    files
        .iter()
        .map(|file| {
            let length = u64::try_from(file.content.len()).unwrap_or(u64::MAX);
            let parts = u64::try_from(file.path.split('/').count()).unwrap_or(u64::MAX);
            // The file itself is one of the parts.
            let pages = length.div_ceil(PAGE).max(1).saturating_add(parts - 1);
            pages.saturating_mul(PAGE)
        })
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use pool_agent_api::spec::{EmptyDir, File, Mount, Volume};

    use super::*;
    use crate::sandbox::lifecycle::tests_support::spec;

    fn parsed(text: &str) -> Result<Files, toml::de::Error> {
        toml::from_str(text)
    }

    fn volume(name: &str, files: Vec<(String, usize)>) -> Volume {
        let file = |(path, length)| File {
            path,
            content: vec![0; length],
            mode: 0o644,
            owner: None,
        };
        Volume {
            name: name.parse().unwrap(),
            source: VolumeSource::Files(Contents::new(files.into_iter().map(file).collect(), false).unwrap()),
        }
    }

    #[test]
    fn bounds_have_defaults_and_nonsense_is_refused() {
        assert_eq!(parsed("").unwrap(), Files::default());
        assert_eq!(parsed("mounts = 3").unwrap().mounts, 3);
        for wrong in [
            "given_bytes = 0",
            "contents_bytes = 5",
            "mounts = -1",
            "content = 1",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn contents_are_bounded_by_bytes_by_number_and_by_depth() {
        let bounds = Files {
            contents_bytes: 1 << 20,
            ..Files::default()
        };
        let check = |volumes: Vec<Volume>| bounds.check(&spec("a", |parts| parts.volumes = volumes));
        let fits = volume("a", vec![("x".into(), 900 << 10)]);
        check(vec![fits.clone()]).unwrap();
        let many = (0..300).map(|i| (format!("f{i}"), 0)).collect();
        let deep = "d/".repeat(300) + "f";
        for volumes in [
            vec![fits, volume("b", vec![("x".into(), 200 << 10)])],
            vec![volume("a", many)],
            vec![volume("a", vec![(deep, 0)])],
            (0..300).map(|i| volume(&format!("v{i}"), vec![])).collect(),
        ] {
            let error = check(volumes).unwrap_err();
            assert_eq!(error.field, "volumes");
        }
    }

    #[test]
    fn the_rest_of_a_spec_is_bounded_apart_from_its_contents() {
        let with = |argument: usize, contents: usize| {
            spec("a", |parts| {
                parts.containers[0].args = vec![pool_agent_api::spec::Text::literal("x".repeat(argument))];
                parts.volumes = vec![volume("a", vec![("x".into(), contents)])];
            })
        };
        let bounds = Files::default();
        bounds.check(&with(3 << 20, 8 << 20)).unwrap();
        assert_eq!(bounds.check(&with(5 << 20, 0)).unwrap_err().field, "containers");
    }

    #[test]
    fn mounts_on_the_host_are_bounded() {
        let bounds = Files {
            mounts: 2,
            ..Files::default()
        };
        let check = |sub_paths: usize, in_memory: usize| {
            bounds.check(&spec("a", |parts| {
                parts.volumes = (0..in_memory.max(1))
                    .map(|i| Volume {
                        name: format!("v{i}").parse().unwrap(),
                        source: VolumeSource::EmptyDir(EmptyDir {
                            memory: i < in_memory,
                            size_limit_bytes: None,
                        }),
                    })
                    .collect();
                parts.containers[0].mounts = (0..sub_paths)
                    .map(|i| Mount {
                        volume: "v0".parse().unwrap(),
                        mount_path: format!("/m{i}"),
                        read_only: false,
                        sub_path: Some("a".into()),
                    })
                    .collect();
            }))
        };
        check(2, 0).unwrap();
        check(1, 1).unwrap();
        assert!(check(2, 1).is_err() && check(0, 3).is_err());
    }
}
