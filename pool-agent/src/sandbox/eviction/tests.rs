use pool_agent_api::{
    Resources,
    spec::{Container, ContainerResources, EmptyDir, Volume, VolumeSource},
};

use super::*;
use crate::{
    allowance::tests::room,
    layout::Layout,
    sandbox::lifecycle::tests_support::{container, spec},
};

const MIB: u64 = 1 << 20;

#[test]
fn an_amount_reads_as_it_was_written() {
    for (bytes, text) in [
        (1 << 20, "1Mi"),
        (3 << 30, "3Gi"),
        (1536 << 20, "1536Mi"),
        (100_000_000, "100M"),
        (2048, "2Ki"),
        (5_000, "5k"),
        (1_234_567, "1234567"),
        (0, "0"),
    ] {
        assert_eq!(quantity(bytes), text);
    }
}

/// A pod of two containers, the first with a limit, and an emptyDir with another.
fn bounds(at: &std::path::Path, container_limit: Option<u64>) -> (SandboxDirs, Bounds) {
    let spec = spec("a", |parts| {
        let limited = Container {
            resources: ContainerResources {
                ephemeral_storage_limit_bytes: container_limit,
                ephemeral_storage_request_bytes: Some(0),
                ..Default::default()
            },
            ..container("app")
        };
        parts.containers = vec![limited, container("other")];
        let empty = EmptyDir {
            memory: false,
            size_limit_bytes: Some(2 * MIB),
        };
        parts.volumes = vec![Volume {
            name: "scratch".parse().unwrap(),
            source: VolumeSource::EmptyDir(empty),
        }];
        parts.claim = Resources {
            ephemeral_storage_bytes: 0,
            ..parts.claim
        };
    });
    let mut room = room();
    room.least_ephemeral_storage_bytes = 8 * MIB;
    let allowance = Allowance::of(spec.claim, &spec, &room).unwrap();
    let dirs = Layout::new(at.join("state"), at.join("run")).sandbox(&spec.key);
    let bounds = Bounds::of(&spec, &allowance, &dirs);
    (dirs, bounds)
}

fn disk(volume: u64, log: u64, layers: [u64; 2]) -> Disk {
    let taken = |bytes| Usage { bytes, inodes: 1 };
    Disk {
        volumes: [("scratch".parse().unwrap(), taken(volume))].into(),
        logs: [("app".parse().unwrap(), taken(log))].into(),
        layers: [
            ("app".parse().unwrap(), taken(layers[0])),
            ("other".parse().unwrap(), taken(layers[1])),
        ]
        .into(),
    }
}

#[test]
fn each_bound_is_told_in_a_kubelets_words() {
    let directory = tempfile::tempdir().unwrap();
    let (_, limited) = bounds(directory.path(), Some(4 * MIB));
    let (_, free) = bounds(directory.path(), None);
    for (bounds, disk, says) in [
        (&limited, disk(MIB, MIB, [MIB, MIB]), None),
        (
            &limited,
            disk(3 * MIB, 0, [0, 0]),
            Some("Usage of EmptyDir volume \"scratch\" exceeds the limit \"2Mi\". "),
        ),
        (
            &limited,
            disk(MIB, MIB, [2 * MIB, MIB]),
            Some("Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "),
        ),
        (&free, disk(MIB, MIB, [2 * MIB, 4 * MIB]), None),
        (
            &free,
            disk(MIB, MIB, [2 * MIB, 5 * MIB]),
            Some("Pod ephemeral local storage usage exceeds 8Mi, what its host allows a request of 0. "),
        ),
    ] {
        assert_eq!(bounds.exceeded(&disk).as_deref(), says);
    }
    // A container's own limit, where the pod's sum leaves room.
    let mut two = limited;
    two.limit = Some(8 * MIB);
    assert_eq!(
        two.exceeded(&disk(0, 3 * MIB, [2 * MIB, 0])).as_deref(),
        Some("Container app exceeded its local ephemeral storage limit \"4Mi\". ")
    );
}

#[tokio::test(start_paused = true)]
async fn volumes_logs_and_layers_are_measured_and_the_pod_is_evicted_once() {
    for what in ["volume", "log", "layer"] {
        let directory = tempfile::tempdir().unwrap();
        let (dirs, bounds) = bounds(directory.path(), None);
        let key = bounds.key.clone();
        let volume = dirs.disk_volume(&"scratch".parse().unwrap());
        let log = dirs.logs().join("app");
        for path in [&volume, &log] {
            std::fs::create_dir_all(path).unwrap();
        }
        let (commands, mut inbox) = mpsc::channel(1);
        let (_driver, progress) = watch::channel(Progress::default());
        let (counts, counted) = watch::channel(Arc::default());
        let (told, seen) = watch::channel(Disk::default());
        tokio::spawn(watch(bounds, counted, told, progress, commands));
        let quiet = tokio::time::timeout(PERIOD * 3, inbox.recv()).await;
        assert!(quiet.is_err(), "an empty pod takes nothing");
        match what {
            "volume" => std::fs::write(volume.join("file"), vec![1; 3 << 20]).unwrap(),
            "log" => std::fs::write(log.join("0.log"), vec![1; 9 << 20]).unwrap(),
            _ => {
                let layer = Counted {
                    writable_layer: Usage {
                        bytes: 9 * MIB,
                        inodes: 1,
                    },
                    working_set_bytes: 0,
                };
                let containers = [("app".parse().unwrap(), layer)].into();
                counts.send_replace(Arc::new([(key, containers)].into()));
            }
        }
        let Some(Command::Event(Event::Evict(reason, message))) = inbox.recv().await else {
            panic!("it was not evicted for its {what}");
        };
        assert_eq!(reason, "Evicted");
        assert!(message.contains("xceeds"), "{message}");
        assert!(seen.borrow().total().bytes >= 3 * MIB);
        assert!(inbox.recv().await.is_none(), "it is told once");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_measured_once_the_sandbox_has_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let (_, bounds) = bounds(directory.path(), None);
    let (commands, mut inbox) = mpsc::channel(1);
    let (driver, progress) = watch::channel(Progress::default());
    let (_runtime, counted) = watch::channel(Arc::default());
    let (told, _seen) = watch::channel(Disk::default());
    tokio::spawn(watch(bounds, counted, told, progress, commands));
    driver.send_modify(|p| p.stopped = true);
    assert!(inbox.recv().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn files_without_a_byte_are_bounded_and_looked_at_no_further() {
    let directory = tempfile::tempdir().unwrap();
    let (dirs, mut bounds) = bounds(directory.path(), None);
    bounds.allowed.inodes = 1000;
    let log = dirs.logs().join("app");
    std::fs::create_dir_all(&log).unwrap();
    for n in 0..2000 {
        std::fs::write(log.join(n.to_string()), []).unwrap();
    }
    let (disk, _) = bounds.measure().await;
    assert_eq!(disk.total().inodes, 1001);
    assert_eq!(
        bounds.exceeded(&disk).as_deref(),
        Some("Pod ephemeral local storage usage exceeds 1000 files, what its host allows a request of 0. ")
    );
}

#[tokio::test(start_paused = true)]
async fn large_trees_keep_no_other_pod_from_being_measured() {
    let large = tempfile::tempdir().unwrap();
    let (dirs, mut hostile) = bounds(large.path(), None);
    (hostile.allowed.bytes, hostile.allowed.inodes) = (u64::MAX, u64::MAX);
    let log = dirs.logs().join("app");
    std::fs::create_dir_all(&log).unwrap();
    for n in 0..60_000 {
        std::fs::File::create(log.join(n.to_string())).unwrap();
    }
    let small = tempfile::tempdir().unwrap();
    let (dirs, fast) = bounds(small.path(), None);
    std::fs::create_dir_all(dirs.logs().join("app")).unwrap();
    std::fs::write(dirs.logs().join("app/0.log"), vec![1; 9 << 20]).unwrap();

    let (_driver, progress) = watch::channel(Progress::default());
    let (_counts, counted) = watch::channel(Arc::default());
    let mut figures = vec![];
    for _ in 0..4 {
        let (commands, _unread) = mpsc::channel(1);
        let (told, seen) = watch::channel(Disk::default());
        figures.push(seen);
        let (counted, progress) = (counted.clone(), progress.clone());
        tokio::spawn(watch(hostile.clone(), counted, told, progress, commands));
    }
    let (commands, mut inbox) = mpsc::channel(1);
    let (told, _seen) = watch::channel(Disk::default());
    tokio::spawn(watch(fast, counted, told, progress, commands));
    assert!(matches!(
        inbox.recv().await,
        Some(Command::Event(Event::Evict(..)))
    ));
    for figure in figures {
        assert!(!figure.has_changed().unwrap(), "it waited for a large tree");
    }
}
