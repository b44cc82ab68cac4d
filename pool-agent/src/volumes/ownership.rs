//! Whose the files of a pod's volumes are, and with which modes: the one place that
//! says so. Ids are as the pod's containers see them.

use pool_agent_api::spec::{File, PodSecurity};

use crate::confined::Owned;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{id} is no user or group: that is a number from 0 to 4294967294")]
pub struct InvalidId {
    pub id: i64,
}

/// The kernel takes the greatest number for "leave it as it is".
fn id(id: i64) -> Result<u32, InvalidId> {
    u32::try_from(id)
        .ok()
        .filter(|&id| id != u32::MAX)
        .ok_or(InvalidId { id })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ownership {
    group: Option<u32>,
}

impl Ownership {
    pub fn of(security: &PodSecurity) -> Result<Self, InvalidId> {
        Ok(Self {
            group: security.fs_group.map(id).transpose()?,
        })
    }

    /// As a kubelet does for `fsGroup` on volumes that are only read: files become
    /// readable to the group, directories enterable.
    pub fn file(self, file: &File) -> Result<Owned, InvalidId> {
        let ours = Owned::ours(file.mode);
        Ok(Owned {
            uid: file.owner.map(id).transpose()?.unwrap_or(ours.uid),
            ..self.given(ours, 0o440)
        })
    }

    /// A directory that files are in.
    pub fn directory(self) -> Owned {
        self.given(Owned::ours(0o755), 0o2550)
    }

    /// Anybody in the pod may write it; what is made in it is the group's.
    pub fn empty_dir(self) -> Owned {
        self.given(Owned::ours(0o777), 0o2000)
    }

    fn given(self, owned: Owned, bits: u32) -> Owned {
        match self.group {
            Some(gid) => Owned {
                gid,
                mode: owned.mode | bits,
                ..owned
            },
            None => owned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(group: Option<i64>) -> Result<Ownership, InvalidId> {
        Ownership::of(&PodSecurity {
            fs_group: group,
            ..Default::default()
        })
    }

    fn file(mode: u32, owner: Option<i64>) -> File {
        File {
            path: "a".into(),
            content: vec![],
            mode,
            owner,
        }
    }

    #[test]
    fn the_pods_group_owns_and_reads_what_it_is_given() {
        let plain = of(None).unwrap();
        assert_eq!(plain.empty_dir(), Owned::ours(0o777));
        assert_eq!(plain.file(&file(0o400, None)).unwrap(), Owned::ours(0o400));
        let group = of(Some(2000)).unwrap();
        let owned = |uid, mode| Owned { uid, gid: 2000, mode };
        let ours = Owned::ours(0).uid;
        assert_eq!(group.empty_dir(), owned(ours, 0o2777));
        assert_eq!(group.directory(), owned(ours, 0o2755));
        assert_eq!(group.file(&file(0o600, Some(7))).unwrap(), owned(7, 0o640));
    }

    #[test]
    fn an_id_that_the_kernel_would_not_take_is_refused() {
        for wrong in [-1, 4_294_967_295, i64::MAX] {
            assert_eq!(of(Some(wrong)), Err(InvalidId { id: wrong }));
            let error = of(None).unwrap().file(&file(0o600, Some(wrong)));
            assert_eq!(error, Err(InvalidId { id: wrong }));
        }
    }
}
