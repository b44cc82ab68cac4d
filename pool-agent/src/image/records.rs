//! The proofs of access on disk: a file for each image that was pulled through this
//! agent, so that a restart asks no registry again.
//!
//! ```text
//! state_dir/images/<hex of the image's id>     its proofs, in JSON
//! state_dir/images/pulling/<number>            the name of an image that is being pulled
//! ```
//!
//! It fails closed: a file that is lost or does not read is a proof less, and the
//! tenant's registry is asked once more. A name left in `pulling` tells the next
//! agent that an image of that name, if it is there, came by a pull and is not the
//! operator's.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use pool_agent_api::TenantId;

use super::access::{Access, ImageId, Proofs};
use crate::volumes::write_file;

#[derive(Debug)]
pub struct Records {
    directory: PathBuf,
    access: Mutex<Access>,
    /// Held while files change, so that they follow `access` in its order.
    writing: Mutex<()>,
    intents: AtomicU64,
}

/// Marks an image's name as being pulled, until it is dropped.
#[derive(Debug)]
pub struct Intent {
    path: PathBuf,
}

impl Drop for Intent {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(error = %error, "the mark of a pull stays until the next start");
        }
    }
}

impl Records {
    /// Reads what an earlier agent left, and the names it was pulling.
    pub fn open(directory: &Path) -> io::Result<(Self, Vec<String>)> {
        let pulling = directory.join("pulling");
        fs::create_dir_all(&pulling)?;
        let mut access = Access::default();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let image = name
                .to_str()
                .and_then(|hex| ImageId::parse(&format!("sha256:{hex}")));
            let Some(image) = image else { continue };
            let proofs = fs::read(entry.path())
                .map_err(|e| e.to_string())
                .and_then(|bytes| serde_json::from_slice::<Proofs>(&bytes).map_err(|e| e.to_string()));
            let proofs = proofs.unwrap_or_else(|error| {
                tracing::warn!(
                    image = image.hex(),
                    error,
                    "who may use an image is not known any more: it has to be proven again"
                );
                Proofs::default()
            });
            access.restore(image, proofs);
        }
        let mut interrupted = vec![];
        for entry in fs::read_dir(&pulling)? {
            let path = entry?.path();
            match fs::read_to_string(&path) {
                Ok(name) => interrupted.push(name),
                Err(error) => tracing::debug!(error = %error, "the mark of a pull does not read"),
            }
            fs::remove_file(&path)?;
        }
        let records = Self {
            directory: directory.to_owned(),
            access: Mutex::new(access),
            writing: Mutex::default(),
            intents: AtomicU64::new(0),
        };
        Ok((records, interrupted))
    }

    pub fn proven(&self, tenant: &TenantId, image: &ImageId, repository: &str) -> bool {
        self.access().proven(tenant, image, repository)
    }

    pub fn pulled_here(&self, image: &ImageId) -> bool {
        self.access().pulled_here(image)
    }

    /// Writes to the disk: for a thread that may wait.
    pub fn intend(&self, canonical: &str) -> io::Result<Intent> {
        let number = self.intents.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.join("pulling").join(number.to_string());
        fs::write(&path, canonical)?;
        Ok(Intent { path })
    }

    /// Writes to the disk. What cannot be written still holds until the agent ends.
    pub fn prove(&self, tenant: &TenantId, image: &ImageId, repository: &str) {
        self.change(image, |access| access.prove(tenant, image, repository));
    }

    /// Writes to the disk: the image came by a pull that nobody saw the end of.
    pub fn note(&self, image: &ImageId) {
        self.change(image, |access| access.note(image));
    }

    fn change(&self, image: &ImageId, change: impl FnOnce(&mut Access) -> bool) {
        let _in_order = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let content = {
            let mut access = self.access();
            if !change(&mut access) {
                return;
            }
            access.of(image).map(serde_json::to_vec)
        };
        let path = self.directory.join(image.hex());
        let written = match content {
            Some(Ok(bytes)) => write_file(&path, &bytes, 0o600).map_err(|e| e.to_string()),
            Some(Err(error)) => Err(error.to_string()),
            None => Ok(()),
        };
        if let Err(error) = written {
            tracing::warn!(
                image = image.hex(),
                error,
                "who may use an image is forgotten when the agent ends"
            );
        }
    }

    pub fn images(&self) -> Vec<ImageId> {
        self.access().images().cloned().collect()
    }

    /// Forgets an image that is not there any more. Writes to the disk.
    pub fn forget(&self, image: &ImageId) {
        let _in_order = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.access().forget(image);
        if let Err(error) = fs::remove_file(self.directory.join(image.hex()))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(image = %image, error = %error, "the proofs for an image that has gone stay on disk");
        }
    }

    fn access(&self) -> MutexGuard<'_, Access> {
        // Every change is made whole before the guard goes.
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(digit: char) -> ImageId {
        ImageId::parse(&format!("sha256:{}", digit.to_string().repeat(64))).unwrap()
    }

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    #[test]
    fn proofs_outlive_the_agent_and_go_with_their_image() {
        let dir = tempfile::tempdir().unwrap();
        let (records, interrupted) = Records::open(dir.path()).unwrap();
        assert!(interrupted.is_empty());
        records.prove(&tenant("a"), &image('1'), "x.io/app");
        records.prove(&tenant("a"), &image('2'), "x.io/app");
        records.forget(&image('2'));
        assert_eq!(records.images(), [image('1')]);
        drop(records);
        let (again, _) = Records::open(dir.path()).unwrap();
        assert!(again.proven(&tenant("a"), &image('1'), "x.io/app"));
        assert!(!again.proven(&tenant("b"), &image('1'), "x.io/app"));
        assert!(!again.proven(&tenant("a"), &image('2'), "x.io/app"));
        assert!(!again.pulled_here(&image('2')));
    }

    #[test]
    fn a_damaged_record_proves_nothing_and_its_image_stays_one_that_was_pulled() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        records.prove(&tenant("a"), &image('1'), "x.io/app");
        for damage in ["", "{", "{\"tenants\":{\"a\":[\"x.io/app\"]}"] {
            fs::write(dir.path().join(image('1').hex()), damage).unwrap();
            let (again, _) = Records::open(dir.path()).unwrap();
            assert!(!again.proven(&tenant("a"), &image('1'), "x.io/app"), "{damage:?}");
            assert!(again.pulled_here(&image('1')), "{damage:?}");
        }
    }

    #[test]
    fn a_pull_that_was_cut_off_is_told_once_to_the_next_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        drop(records.intend("x.io/done:1").unwrap());
        std::mem::forget(records.intend("x.io/cut:1").unwrap());
        let (_, interrupted) = Records::open(dir.path()).unwrap();
        assert_eq!(interrupted, ["x.io/cut:1"]);
        assert!(Records::open(dir.path()).unwrap().1.is_empty());
    }

    #[test]
    fn a_full_disk_costs_no_proof_while_the_agent_lives() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _) = Records::open(dir.path()).unwrap();
        // A directory stands where the file would be.
        fs::create_dir(dir.path().join(image('1').hex())).unwrap();
        records.prove(&tenant("a"), &image('1'), "x.io/app");
        assert!(records.proven(&tenant("a"), &image('1'), "x.io/app"));
    }
}
