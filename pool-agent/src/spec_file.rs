//! A sandbox's spec on disk, secrets included: a file only root reads, in the run
//! directory, which does not outlive the host's memory. Its checksum tells a torn
//! or a damaged one.

use std::path::PathBuf;

use pool_agent_api::{
    Invalid, SandboxSpec,
    spec::{SandboxParts, Volume},
    wire,
};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::{
    layout::SandboxDirs,
    volumes::{VolumeError, write_file},
};

const CHECKSUM: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum SpecFileError {
    #[error("reading {path}: {source}")]
    Read {
        path: PathBuf,
        // Shown above too: the text goes to the pod's Events, without its sources.
        source: std::io::Error,
    },
    #[error("{path} is damaged")]
    Damaged { path: PathBuf },
    #[error("{path} holds a spec that is not valid: {problem}")]
    Invalid { path: PathBuf, problem: Invalid },
    #[error(transparent)]
    Write(#[from] VolumeError),
    #[error("the work broke off")]
    BrokeOff,
}

pub fn write(dirs: &SandboxDirs, spec: SandboxSpec) -> Result<(), SpecFileError> {
    let message = wire::SandboxSpec::from(spec).encode_to_vec();
    let mut bytes = Sha256::digest(&message).to_vec();
    bytes.extend(message);
    write_file(&dirs.spec(), &bytes, 0o600)?;
    Ok(())
}

pub fn read(dirs: &SandboxDirs) -> Result<SandboxSpec, SpecFileError> {
    let path = dirs.spec();
    let bytes = std::fs::read(&path).map_err(|source| SpecFileError::Read {
        path: path.clone(),
        source,
    })?;
    let damaged = || SpecFileError::Damaged { path: path.clone() };
    let (checksum, message) = bytes.split_at_checked(CHECKSUM).ok_or_else(damaged)?;
    if Sha256::digest(message).as_slice() != checksum {
        return Err(damaged());
    }
    let message = wire::SandboxSpec::decode(message).map_err(|_| damaged())?;
    SandboxSpec::try_from(message).map_err(|problem| SpecFileError::Invalid { path, problem })
}

/// The spec with other contents of volumes. Written, a volume that is made again has
/// the newest.
pub fn with(dirs: &SandboxDirs, volumes: &[Volume]) -> Result<SandboxSpec, SpecFileError> {
    let known = read(dirs)?;
    let mut parts = SandboxParts::clone(&known);
    for volume in volumes {
        if let Some(known) = parts.volumes.iter_mut().find(|v| v.name == volume.name) {
            *known = volume.clone();
        }
    }
    SandboxSpec::new(parts).map_err(|problem| SpecFileError::Invalid {
        path: dirs.spec(),
        problem,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;

    #[test]
    fn a_spec_is_read_back_and_a_damaged_one_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path().join("s"), directory.path().join("r"));
        let spec = crate::sandbox::lifecycle::tests_support::spec("a", |_| {});
        let dirs = layout.sandbox(&spec.key);
        assert!(matches!(read(&dirs), Err(SpecFileError::Read { .. })));
        write(&dirs, spec.clone()).unwrap();
        assert_eq!(read(&dirs).unwrap(), spec);
        let whole = std::fs::read(dirs.spec()).unwrap();
        for length in [0, 10, CHECKSUM, whole.len() - 1] {
            std::fs::write(dirs.spec(), &whole[..length]).unwrap();
            assert!(read(&dirs).is_err(), "cut to {length}");
        }
        for at in [0, CHECKSUM, whole.len() - 1] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(dirs.spec(), flipped).unwrap();
            assert!(
                matches!(read(&dirs), Err(SpecFileError::Damaged { .. })),
                "flipped {at}"
            );
        }
    }
}
