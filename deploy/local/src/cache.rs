//! Things that take long to build, kept between runs under a hash of what they
//! were made from.
//!
//! A second run finds the hash and does nothing; a changed input has another
//! hash and is built beside the old. Two runs at once take turns.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::{file, progress::Step};

#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("neither SPINDRIFT_CACHE nor XDG_CACHE_HOME nor HOME is set: nowhere to keep builds")]
    NoHome,
    #[error("cannot use the cache directory {}", .path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read {}, which goes into a build", .path.display())]
    Input {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// `$SPINDRIFT_CACHE`, else `$XDG_CACHE_HOME/spindrift`, else
/// `~/.cache/spindrift`: for programs without a command line, as tests are.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that reads this environment outside a command line"
)]
pub fn standard() -> Result<PathBuf, CacheError> {
    let set = |name: &str| {
        std::env::var(name)
            .ok()
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || {
        Some(
            set("XDG_CACHE_HOME")
                .or_else(|| Some(set("HOME")?.join(".cache")))?
                .join("spindrift"),
        )
    };
    set("SPINDRIFT_CACHE").or_else(home).ok_or(CacheError::NoHome)
}

/// How many versions of a thing are kept, the newest first: going back and
/// forth between two branches rebuilds nothing.
const KEPT: usize = 3;

impl Cache {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of the thing `name` made from what `key` hashed; `build`
    /// fills it if it is not there. A build that fails or is killed leaves
    /// nothing that a later run would take for whole.
    pub async fn ensure<E: From<CacheError>>(
        &self,
        name: &str,
        key: Key,
        step: &Step,
        build: impl AsyncFnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let shelf = self.root.join(name);
        let at = |path: &Path, source| CacheError::Directory {
            path: path.to_owned(),
            source,
        };
        std::fs::create_dir_all(&shelf).map_err(|e| at(&shelf, e))?;
        let wanted = shelf.join(key.finish());
        if !wanted.exists() {
            let _turn = lock(&shelf.join(".lock"), step)
                .await
                .map_err(|e| at(&shelf, e))?;
            // Another run may have built it while this one waited.
            if !wanted.exists() {
                let building = shelf.join(".building");
                file::remove_tree(&building).map_err(|e| at(&building, e))?;
                step.note("building");
                std::fs::create_dir(&building).map_err(|e| at(&building, e))?;
                build(&building).await?;
                std::fs::rename(&building, &wanted).map_err(|e| at(&wanted, e))?;
                forget_old(&shelf, &wanted).map_err(|e| at(&shelf, e))?;
            }
        }
        Ok(wanted)
    }
}

/// A hash of everything a build depends on.
#[derive(Clone, Debug, Default)]
pub struct Key {
    hash: Sha256,
}

impl Key {
    /// A version, a flag: anything that is text.
    pub fn text(mut self, text: &str) -> Self {
        self.hash.update(text.len().to_le_bytes());
        self.hash.update(text);
        self
    }

    /// The content of a file.
    pub fn file(mut self, path: &Path) -> Result<Self, CacheError> {
        let mut content = File::open(path).map_err(|source| CacheError::Input {
            path: path.to_owned(),
            source,
        })?;
        io::copy(&mut content, &mut HashWriter(&mut self.hash)).map_err(|source| CacheError::Input {
            path: path.to_owned(),
            source,
        })?;
        Ok(self)
    }

    fn finish(self) -> String {
        file::hex(&self.hash.finalize()[..10])
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for the lock and says so meanwhile. It is let go with the value, and
/// by the kernel if the process dies. Whoever holds it may remove the file.
pub async fn lock(path: &Path, step: &Step) -> io::Result<Flock<File>> {
    loop {
        let file = File::options().create(true).append(true).open(path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // A holder may have removed what was opened here: then somebody
            // else can hold a lock on a new file of that name.
            Ok(lock) if same_file(&lock, path)? => return Ok(lock),
            Ok(_) => {}
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                step.note("another run is at it: waiting for its end");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            Err((_, error)) => return Err(error.into()),
        }
    }
}

fn same_file(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn forget_old(shelf: &Path, newest: &Path) -> io::Result<()> {
    let mut versions = Vec::new();
    for entry in std::fs::read_dir(shelf)? {
        let entry = entry?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !hidden && entry.path() != newest {
            versions.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    versions.sort();
    let excess = (versions.len() + 1).saturating_sub(KEPT);
    for (_, path) in &versions[..excess] {
        file::remove_tree(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    async fn ensure(cache: &Cache, input: &str, content: &str) -> Result<String, CacheError> {
        let progress = Progress::silent();
        let built = cache
            .ensure(
                "thing",
                Key::default().text(input),
                &progress.step("thing"),
                async |directory: &Path| {
                    if content == "fail" {
                        let source = io::Error::other("asked to");
                        return Err(CacheError::Input {
                            path: directory.to_owned(),
                            source,
                        });
                    }
                    std::fs::write(directory.join("out"), content).unwrap();
                    Ok(())
                },
            )
            .await?;
        Ok(std::fs::read_to_string(built.join("out")).unwrap())
    }

    #[tokio::test]
    async fn the_same_input_is_built_once_and_another_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().join("cache"));
        assert_eq!(ensure(&cache, "a", "first").await.unwrap(), "first");
        assert_eq!(ensure(&cache, "a", "never built").await.unwrap(), "first");
        assert_eq!(ensure(&cache, "b", "second").await.unwrap(), "second");
        assert_eq!(ensure(&cache, "a", "never built").await.unwrap(), "first");
    }

    #[tokio::test]
    async fn a_failed_build_is_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().to_owned());
        assert!(ensure(&cache, "a", "fail").await.is_err());
        assert_eq!(ensure(&cache, "a", "works").await.unwrap(), "works");
    }

    #[tokio::test]
    async fn only_the_newest_versions_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().to_owned());
        for input in ["a", "b", "c", "d", "e"] {
            ensure(&cache, input, input).await.unwrap();
        }
        let kept = std::fs::read_dir(directory.path().join("thing")).unwrap();
        assert_eq!(
            kept.filter(|e| !e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'))
                .count(),
            KEPT
        );
    }

    #[tokio::test]
    async fn a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let progress = Progress::silent();
        let step = progress.step("lock");
        let first = lock(&path, &step).await.unwrap();
        let waiting = lock(&path, &step);
        let removing = async {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            std::fs::remove_file(&path).unwrap();
            drop(first);
        };
        let (second, ()) = tokio::join!(waiting, removing);
        assert!(same_file(&second.unwrap(), &path).unwrap());
    }

    #[test]
    fn texts_that_join_to_the_same_are_told_apart() {
        assert_ne!(
            Key::default().text("ab").text("c").finish(),
            Key::default().text("a").text("bc").finish()
        );
    }
}
