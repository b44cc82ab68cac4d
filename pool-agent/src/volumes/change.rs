//! What of a sandbox's volumes may change while it runs: the contents of those that
//! were admitted as files. Pure.

use pool_agent_api::{
    Invalid, SandboxSpec,
    spec::{Volume, VolumeSource},
};

/// Refuses a change of anything else, by its field. `spec` is what was admitted.
pub fn check(spec: &SandboxSpec, volumes: &[Volume]) -> Result<(), Invalid> {
    for (i, volume) in volumes.iter().enumerate() {
        let name = &volume.name;
        let refuse = |field: &str, problem: &str| {
            Err(Invalid::new(
                format!("volumes[{i}].{field}"),
                format_args!("{name} {problem}"),
            ))
        };
        if volumes[..i].iter().any(|earlier| earlier.name == *name) {
            return refuse("name", "stands twice");
        }
        let Some(admitted) = spec.volumes.iter().find(|v| v.name == *name) else {
            return refuse("name", "is no volume of this sandbox");
        };
        match (&admitted.source, &volume.source) {
            (VolumeSource::Files(known), VolumeSource::Files(new)) => {
                if known.sensitive() != new.sensitive() {
                    return refuse(
                        "files.sensitive",
                        "must stay what it was when the sandbox was admitted",
                    );
                }
            }
            (VolumeSource::EmptyDir(_), _) => {
                return refuse("name", "is an emptyDir, whose contents are the pod's own");
            }
            (VolumeSource::Files(_), VolumeSource::EmptyDir(_)) => {
                return refuse("source", "is a file volume and stays one");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pool_agent_api::spec::{EmptyDir, Files};

    use super::*;
    use crate::sandbox::lifecycle::tests_support::spec;

    fn files(name: &str, sensitive: bool) -> Volume {
        Volume {
            name: name.parse().unwrap(),
            source: VolumeSource::Files(Files::new(vec![], sensitive).unwrap()),
        }
    }

    fn empty(name: &str) -> Volume {
        Volume {
            name: name.parse().unwrap(),
            source: VolumeSource::EmptyDir(EmptyDir::default()),
        }
    }

    #[test]
    fn a_volume_stays_of_the_kind_it_was_admitted_as() {
        let spec = spec("a", |parts| {
            parts.volumes = vec![files("config", false), files("secret", true), empty("scratch")];
        });
        let refused = |volumes: &[Volume]| check(&spec, volumes).unwrap_err().to_string();
        check(&spec, &[files("config", false), files("secret", true)]).unwrap();
        for (volumes, field, word) in [
            (
                vec![files("config", false), files("scratch", false)],
                "volumes[1].name",
                "emptyDir",
            ),
            (vec![files("none", false)], "volumes[0].name", "no volume"),
            (vec![files("config", true)], "volumes[0].files.sensitive", "stay"),
            (vec![files("secret", false)], "volumes[0].files.sensitive", "stay"),
            (vec![empty("config")], "volumes[0].source", "file volume"),
            (vec![empty("scratch")], "volumes[0].name", "emptyDir"),
            (
                vec![files("config", false), files("config", false)],
                "volumes[1].name",
                "twice",
            ),
        ] {
            let error = refused(&volumes);
            assert!(error.contains(field) && error.contains(word), "{error}");
        }
    }
}
