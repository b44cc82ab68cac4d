use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use pool_agent_api::spec::{EmptyDir, File, Files};

use super::*;
use crate::confined::slices::at_once;
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

/// As the driver does it.
fn replace(volumes: &[Volume], dirs: &SandboxDirs) -> Result<(), VolumeError> {
    for left in Stage::set(volumes, &PodSecurity::default(), dirs)?.commit()? {
        at_once(left).map_err(at("removing", Path::new("left")))?;
    }
    Ok(())
}

#[test]
fn files_are_replaced_all_at_once_and_what_is_gone_is_gone() {
    let place = place();
    let root = place.dirs.disk_volume(&"config".parse().unwrap());
    let write = |files| replace(&[volume(files)], &place.dirs).unwrap();
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
    let root = place.dirs.disk_volume(&"config".parse().unwrap());
    let write = |files| replace(&[volume(files)], &place.dirs).unwrap();
    write(vec![file("a", "1")]);
    // As a crash leaves it: the next version begun, the link beside.
    fs::create_dir(root.join("..v2")).unwrap();
    fs::write(root.join("..v2/junk"), "x").unwrap();
    symlink("..v2", root.join("..data_tmp")).unwrap();
    write(vec![file("a", "2")]);
    assert_eq!(seen(&root), pairs(&[("a", "2")]));
}

/// What a pod that can write its file volumes, or had one taken for another, may plant.
#[test]
fn what_a_pod_plants_in_a_volume_leads_the_host_nowhere() {
    let place = place();
    let host = place.dirs.disk().join("host");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("a"), "the host's own").unwrap();
    let root = place.dirs.disk_volume(&"config".parse().unwrap());
    let write = |files| replace(&[volume(files)], &place.dirs).unwrap();
    write(vec![file("a", "1"), file("deep/b", "1")]);
    let plant = |name: &str, target: &Path| {
        at_once(Removal::of(&Directory::open(&root).unwrap(), name).unwrap()).unwrap();
        symlink(target, root.join(name)).unwrap();
    };
    let plants: [&dyn Fn(); 8] = [
        &|| plant("..data", &host),
        &|| plant("..data", Path::new("../../host")),
        &|| plant("..data", Path::new("..")),
        &|| plant("..v1", &host),
        &|| plant("a", &host.join("a")),
        &|| plant("..data_tmp", &host),
        &|| plant("other", &host),
        &|| {
            plant("a", &host);
            fs::remove_file(root.join("a")).unwrap();
            fs::create_dir_all(root.join("a/full/of/them")).unwrap();
            fs::remove_file(root.join("..data")).unwrap();
            fs::create_dir_all(root.join("..data/full")).unwrap();
            symlink(&host, root.join("..data/full/link")).unwrap();
        },
    ];
    for (i, plant) in plants.iter().enumerate() {
        plant();
        // Once with what it held, and once with something else.
        for content in ["1", &i.to_string()] {
            write(vec![file("a", content), file("deep/b", content)]);
            assert_eq!(
                seen(&root),
                pairs(&[("a", content), ("deep/b", content)]),
                "plant {i}"
            );
            assert_eq!(
                fs::read_to_string(host.join("a")).unwrap(),
                "the host's own",
                "plant {i}"
            );
            assert_eq!(fs::read_dir(&host).unwrap().count(), 1, "plant {i}");
        }
        assert!(!root.join("other").exists());
    }
    // Its files themselves for links, which are read to see whether they are the same.
    let version = root.join(fs::read_link(root.join("..data")).unwrap());
    fs::write(host.join("a"), "2").unwrap();
    fs::remove_file(version.join("a")).unwrap();
    symlink(host.join("a"), version.join("a")).unwrap();
    write(vec![file("a", "2"), file("deep/b", "7")]);
    assert!(
        !root.join("..data/a").is_symlink(),
        "a link was taken for the file"
    );
}

#[test]
fn contents_that_cannot_be_laid_out_change_no_volume() {
    let place = place();
    let named = |name: &str, files| Volume {
        name: name.parse().unwrap(),
        ..volume(files)
    };
    let both = |content: &str| {
        [
            named("a", vec![file("x", content)]),
            named("b", vec![file("x", content)]),
        ]
    };
    replace(&both("1"), &place.dirs).unwrap();
    // Where the second should go there is something else.
    let second = place.dirs.disk_volume(&"b".parse().unwrap());
    fs::rename(&second, second.with_extension("aside")).unwrap();
    fs::write(&second, "").unwrap();
    let error = replace(&both("2"), &place.dirs).unwrap_err().to_string();
    assert!(error.contains("volume b"), "{error}");
    let first = place.dirs.disk_volume(&"a".parse().unwrap());
    assert_eq!(seen(&first), pairs(&[("x", "1")]));
    assert_eq!(
        fs::read_dir(&first).unwrap().count(),
        3,
        "..data, its version, and the link"
    );
}

#[test]
fn an_empty_dir_has_its_name_only_once_it_is_whole() {
    let place = place();
    let scratch = Volume {
        name: "scratch".parse().unwrap(),
        source: VolumeSource::EmptyDir(EmptyDir::default()),
    };
    let spec = spec("a", |parts| parts.volumes = vec![scratch.clone()]);
    let make = || make_empty(&scratch, EmptyDir::default(), &spec, &place.dirs);
    let path = place.dirs.disk_volume(&scratch.name);
    // As a crash leaves it.
    fs::create_dir_all(path.with_file_name(".scratch")).unwrap();
    make().unwrap();
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(), 0o777);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(path.join("kept"), "x").unwrap();
    make().unwrap();
    assert_eq!(mode(), 0o700, "one in use is left alone");
    assert!(path.join("kept").exists());
    // A link in its place is no emptyDir.
    at_once(Removal::of(&Directory::open(&place.dirs.disk_volumes()).unwrap(), "scratch").unwrap()).unwrap();
    symlink("/", &path).unwrap();
    assert!(make().is_err());
}

#[test]
fn what_has_no_limit_in_memory_is_held_to_what_the_pod_may_use() {
    let limited = |limits: [Option<u64>; 2]| {
        let spec = spec("a", |parts| {
            let first = parts.containers[0].clone();
            parts.containers = limits
                .iter()
                .enumerate()
                .map(|(i, limit)| {
                    let mut container = first.clone();
                    container.name = format!("c{i}").parse().unwrap();
                    container.resources.memory_limit_bytes = *limit;
                    container
                })
                .collect();
        });
        memory_limit(&spec)
    };
    assert_eq!(limited([Some(1), Some(2)]), Some(3));
    assert_eq!(limited([Some(1), None]), None);
    assert_eq!(limited([Some(1), Some(0)]), None);
}

#[tokio::test]
async fn a_container_mounts_its_volumes_what_it_is_given_and_a_place_for_last_words() {
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
        parts.network.searches = vec!["a.test".into(), "b.test".into()];
        parts.network.nameservers = vec!["10.0.0.10".parse().unwrap()];
        parts.network.dns_options = vec!["ndots:5".into()];
        parts.containers[0].mounts = vec![mount("config", "/etc/config"), mount("scratch", "/scratch")];
    });
    replace(&spec.volumes, &place.dirs).unwrap();
    make_empty(&spec.volumes[1], EmptyDir::default(), &spec, &place.dirs).unwrap();
    let addresses = ("10.77.1.2".parse().unwrap(), "192.0.2.1".parse().unwrap());
    // Not mounted: that takes root, which unit tests need not be.
    let given = Directory::ensure(&place.dirs.given()).unwrap();
    let again = || mounts_beside(&given, &spec, &spec.containers[0], 0, &place.dirs, addresses).unwrap();
    let all = again();
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
            ("/etc/hostname", false),
            ("/etc/resolv.conf", false),
            ("/dev/termination-log", false)
        ]
    );
    assert!(all.iter().all(|m| m.host_path.exists()));
    let hosts = fs::read_to_string(place.dirs.hosts()).unwrap();
    assert!(hosts.ends_with("10.77.1.2\tweb-0\n"), "{hosts}");
    assert_eq!(fs::read_to_string(place.dirs.hostname()).unwrap(), "web-0\n");
    let resolver = fs::read_to_string(place.dirs.resolver()).unwrap();
    assert_eq!(
        resolver,
        "search a.test b.test\nnameserver 10.0.0.10\noptions ndots:5\n"
    );
    // What a container has written there stays.
    fs::write(place.dirs.hosts(), "mine").unwrap();
    fs::write(place.dirs.message(&spec.containers[0].name, 0), "ended").unwrap();
    assert_eq!(again(), all);
    assert_eq!(fs::read_to_string(place.dirs.hosts()).unwrap(), "mine");
    remove(&place.dirs).await.unwrap();
    assert!(!place.dirs.disk().exists() && !place.dirs.run().exists());
    remove(&place.dirs).await.unwrap();
}

#[test]
fn what_no_record_names_is_out_of_the_way_at_once() {
    let place = place();
    replace(&[volume(vec![file("a", "1")])], &place.dirs).unwrap();
    let left = put_aside(&place.dirs).unwrap();
    assert!(!place.dirs.disk().exists());
    // The same sandbox may come again before it is removed, and be left again.
    replace(&[volume(vec![file("a", "2")])], &place.dirs).unwrap();
    let more = put_aside(&place.dirs).unwrap();
    for removal in left.into_iter().chain(more) {
        at_once(removal).unwrap();
    }
    let root = place.dirs.disk().parent().unwrap();
    assert_eq!(fs::read_dir(root).unwrap().count(), 0);
}
