use std::collections::BTreeMap;

use pool_agent_api::spec::{EmptyDir, File, Files};

use super::*;
use crate::{layout::Layout, sandbox::lifecycle::tests_support::spec};

fn file(path: &str, content: &str) -> File {
    File {
        path: path.into(),
        content: content.into(),
        mode: 0o640,
        owner: None,
    }
}

fn volume(files: Vec<File>) -> Volume {
    Volume {
        name: "config".parse().unwrap(),
        // Not sensitive: a tmpfs takes root, which unit tests need not be.
        source: VolumeSource::Files(Files::new(files, false).unwrap()),
    }
}

struct Place {
    _directory: tempfile::TempDir,
    dirs: SandboxDirs,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::new(directory.path().join("s"), directory.path().join("r"));
    let dirs = layout.sandbox(&spec("a", |_| {}).key);
    Place {
        _directory: directory,
        dirs,
    }
}

/// What a program sees: names and contents, links followed.
fn tree(root: &Path, below: &str, into: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with("..") {
            continue;
        }
        let path = format!("{below}{name}");
        if root.join(&path).is_dir() {
            tree(root, &format!("{path}/"), into);
        } else {
            into.insert(path.clone(), fs::read_to_string(root.join(&path)).unwrap());
        }
    }
}

fn seen(root: &Path) -> Vec<(String, String)> {
    let mut all = BTreeMap::new();
    tree(root, "", &mut all);
    all.into_iter().collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect()
}

#[test]
fn files_are_replaced_all_at_once_and_what_is_gone_is_gone() {
    let place = place();
    let security = PodSecurity::default();
    let root = place.dirs.disk_volume(&"config".parse().unwrap());
    let write = |files| update(&[volume(files)], &security, &place.dirs).unwrap();
    write(vec![file("a", "1"), file("deep/er/b", "2")]);
    assert_eq!(seen(&root), pairs(&[("a", "1"), ("deep/er/b", "2")]));
    let version = fs::read_link(root.join("..data")).unwrap();
    write(vec![file("a", "1"), file("deep/er/b", "2")]);
    assert_eq!(
        fs::read_link(root.join("..data")).unwrap(),
        version,
        "nothing changed"
    );
    // A program that holds the old version open keeps it.
    let held = fs::File::open(root.join("a")).unwrap();
    write(vec![file("deep/er/b", "3"), file("c", "4")]);
    assert_eq!(seen(&root), pairs(&[("c", "4"), ("deep/er/b", "3")]));
    assert_ne!(fs::read_link(root.join("..data")).unwrap(), version);
    assert!(!root.join(version).exists());
    assert_eq!(std::io::read_to_string(held).unwrap(), "1");
    let mode = fs::metadata(root.join("c")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    write(vec![]);
    assert_eq!(seen(&root), pairs(&[]));
}

#[test]
fn a_swap_that_broke_off_half_way_is_done_again() {
    let place = place();
    let security = PodSecurity::default();
    let root = place.dirs.disk_volume(&"config".parse().unwrap());
    let write = |files| update(&[volume(files)], &security, &place.dirs).unwrap();
    write(vec![file("a", "1")]);
    // As a crash leaves it: the next version begun, the link beside.
    fs::create_dir(root.join("..v2")).unwrap();
    fs::write(root.join("..v2/junk"), "x").unwrap();
    std::os::unix::fs::symlink("..v2", root.join("..data_tmp")).unwrap();
    write(vec![file("a", "2")]);
    assert_eq!(seen(&root), pairs(&[("a", "2")]));
}

#[test]
fn a_sub_path_cannot_leave_its_volume() {
    let place = place();
    let root = place.dirs.disk().join("volumes/data");
    fs::create_dir_all(root.join("inside")).unwrap();
    std::os::unix::fs::symlink("inside", root.join("link")).unwrap();
    std::os::unix::fs::symlink("/etc", root.join("absolute")).unwrap();
    std::os::unix::fs::symlink("../../..", root.join("up")).unwrap();
    for (path, opens) in [
        ("inside", true),
        ("link", true),
        ("new/deep", true),
        ("absolute", false),
        ("up", false),
        ("up/x", false),
        ("absolute/passwd", false),
    ] {
        assert_eq!(
            mounts::open_beneath(&root, Path::new(path)).is_ok(),
            opens,
            "{path}"
        );
    }
    assert!(root.join("new/deep").is_dir());
}

#[test]
fn a_container_mounts_its_volumes_its_hosts_file_and_a_place_for_last_words() {
    let place = place();
    let spec = spec("a", |parts| {
        parts.volumes = vec![
            volume(vec![file("a", "1")]),
            Volume {
                name: "scratch".parse().unwrap(),
                source: VolumeSource::EmptyDir(EmptyDir::default()),
            },
        ];
        let mount = |volume: &str, path: &str| Mount {
            volume: volume.parse().unwrap(),
            mount_path: path.into(),
            read_only: false,
            sub_path: None,
        };
        parts.containers[0].mounts = vec![mount("config", "/etc/config"), mount("scratch", "/scratch")];
    });
    prepare(&spec, &place.dirs).unwrap();
    let pod = "10.77.1.2".parse().unwrap();
    let host = "192.0.2.1".parse().unwrap();
    let all = mounts(&spec, &spec.containers[0], 0, &place.dirs, pod, host).unwrap();
    let list: Vec<_> = all
        .iter()
        .map(|m| (m.container_path.as_str(), m.read_only))
        .collect();
    assert_eq!(
        list,
        [
            ("/etc/config", true),
            ("/scratch", false),
            ("/etc/hosts", false),
            ("/dev/termination-log", false)
        ]
    );
    assert!(all.iter().all(|m| m.host_path.exists()));
    let hosts = fs::read_to_string(place.dirs.hosts()).unwrap();
    assert!(hosts.ends_with("10.77.1.2\tweb-0\n"), "{hosts}");
    let mode = fs::metadata(&all[1].host_path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o777);
    fs::write(all[1].host_path.join("kept"), "x").unwrap();
    prepare(&spec, &place.dirs).unwrap();
    assert!(
        all[1].host_path.join("kept").exists(),
        "an emptyDir in use is left alone"
    );
    remove(&place.dirs).unwrap();
    assert!(!place.dirs.disk().exists() && !place.dirs.run().exists());
    remove(&place.dirs).unwrap();
}
