//! Volumes, of the two kinds a host has to know: an empty directory, and a
//! directory of given files.

use std::{collections::HashSet, fmt};

use crate::{
    Invalid, VolumeName,
    invalid::{each, required},
    wire,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub name: VolumeName,
    pub source: VolumeSource,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    EmptyDir(EmptyDir),
    /// A ConfigMap, Secret, downward API, token or projected volume, resolved.
    Files(Files),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EmptyDir {
    /// A tmpfs rather than the host's disk.
    pub memory: bool,
    pub size_limit_bytes: Option<u64>,
}

/// Paths are unique, and none is a directory of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    files: Vec<File>,
    sensitive: bool,
}

#[derive(Clone, PartialEq, Eq)]
pub struct File {
    /// Relative, of normal segments only.
    pub path: String,
    pub content: Vec<u8>,
    /// Permission bits (0o000 to 0o777).
    pub mode: u32,
    /// UID of the owner; None: root.
    pub owner: Option<i64>,
}

/// Contents are ConfigMaps and Secrets: they never reach a log.
impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("path", &self.path)
            .field("bytes", &self.content.len())
            .field("mode", &format_args!("{:o}", self.mode))
            .finish_non_exhaustive()
    }
}

/// A relative path that stays below where it is mounted. Names that begin with
/// ".." are kept for the atomic swap of a volume's contents.
pub(super) fn relative_path(field: &str, path: &str) -> Result<(), Invalid> {
    let refuse = |problem: &str| Err(Invalid::new(field, format_args!("{path:?} {problem}")));
    if path.is_empty() || path.len() > 4096 {
        return refuse("must have 1 to 4096 characters");
    }
    if path.starts_with('/') {
        return refuse("must be relative");
    }
    if path.bytes().any(|c| c == 0) {
        return refuse("must not hold a NUL");
    }
    for segment in path.split('/') {
        if segment.is_empty() || segment == "." {
            return refuse("must not hold an empty or '.' segment");
        }
        if segment.starts_with("..") {
            return refuse("must not hold a segment that begins with '..'");
        }
        if segment.len() > 255 {
            return refuse("must not hold a segment of over 255 bytes");
        }
    }
    Ok(())
}

impl Files {
    /// `sensitive` contents are kept in memory only.
    pub fn new(files: Vec<File>, sensitive: bool) -> Result<Self, Invalid> {
        let mut paths = HashSet::new();
        for (i, file) in files.iter().enumerate() {
            let field = format!("files[{i}].path");
            relative_path(&field, &file.path)?;
            if file.mode > 0o777 {
                return Err(Invalid::new(
                    format!("files[{i}].mode"),
                    format_args!("{:o} has more than permission bits", file.mode),
                ));
            }
            if !paths.insert(file.path.as_str()) {
                return Err(Invalid::new(field, format_args!("{:?} stands twice", file.path)));
            }
        }
        for (i, file) in files.iter().enumerate() {
            let directories = file.path.match_indices('/').map(|(at, _)| &file.path[..at]);
            if let Some(directory) = directories.into_iter().find(|d| paths.contains(d)) {
                return Err(Invalid::new(
                    format!("files[{i}].path"),
                    format_args!("{:?} lies below {directory:?}, which is a file", file.path),
                ));
            }
        }
        Ok(Self { files, sensitive })
    }

    pub fn iter(&self) -> std::slice::Iter<'_, File> {
        self.files.iter()
    }

    pub fn sensitive(&self) -> bool {
        self.sensitive
    }
}

impl TryFrom<wire::Volume> for Volume {
    type Error = Invalid;

    fn try_from(v: wire::Volume) -> Result<Self, Invalid> {
        use wire::volume::Source;
        Ok(Self {
            name: VolumeName::parse("name", v.name)?,
            source: match required("source", v.source)? {
                Source::EmptyDir(e) => VolumeSource::EmptyDir(EmptyDir {
                    memory: e.memory,
                    size_limit_bytes: e.size_limit_bytes,
                }),
                Source::Files(f) => {
                    let files = each("files", f.files, |file| {
                        Ok(File {
                            path: file.path,
                            content: file.content,
                            mode: file.mode,
                            owner: file.owner,
                        })
                    })?;
                    VolumeSource::Files(Files::new(files, f.sensitive)?)
                }
            },
        })
    }
}

impl From<Volume> for wire::Volume {
    fn from(v: Volume) -> Self {
        use wire::volume::Source;
        Self {
            name: v.name.into(),
            source: Some(match v.source {
                VolumeSource::EmptyDir(e) => Source::EmptyDir(wire::EmptyDir {
                    memory: e.memory,
                    size_limit_bytes: e.size_limit_bytes,
                }),
                VolumeSource::Files(f) => Source::Files(wire::Files {
                    sensitive: f.sensitive,
                    files: f
                        .files
                        .into_iter()
                        .map(|file| wire::File {
                            path: file.path,
                            content: file.content,
                            mode: file.mode,
                            owner: file.owner,
                        })
                        .collect(),
                }),
            }),
        }
    }
}
