use std::{
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rustix::fs::{CWD, RawMode};

use super::{
    measurement::{Measurement, Usage},
    removal::Removal,
    slices::{Work, at_once, in_slices},
    *,
};

/// Levels of a tree that is deep: a path to its end is six times what the kernel takes.
const DEEP: usize = 5_000;
/// How long a race is run. It must not be won once.
const RACE: Duration = Duration::from_millis(500);

/// A place a pod can write, and something of the host's beside it.
struct Place {
    beside: tempfile::TempDir,
    volume: PathBuf,
    secret: PathBuf,
}

const SECRET: &str = "the host's own";

const EVERYTHING: Usage = Usage {
    bytes: u64::MAX,
    inodes: u64::MAX,
};
const NOTHING: Usage = Usage {
    bytes: 0,
    inodes: u64::MAX,
};

fn place() -> Place {
    let beside = tempfile::tempdir().unwrap();
    let volume = beside.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let host = beside.path().join("host");
    fs::create_dir(&host).unwrap();
    let secret = host.join("secret");
    fs::write(&secret, SECRET).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    Place {
        beside,
        volume,
        secret,
    }
}

impl Place {
    fn directory(&self) -> Directory {
        Directory::open(&self.volume).unwrap()
    }

    fn host(&self) -> &Path {
        self.secret.parent().unwrap()
    }

    fn removed(&self, name: &str) -> io::Result<()> {
        at_once(Removal::of(&self.directory(), name)?)
    }

    /// What must be so whatever a pod does.
    fn host_is_untouched(&self) {
        let metadata = fs::symlink_metadata(&self.secret).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o600);
        assert_eq!(metadata.nlink(), 1);
        assert_eq!(fs::read_to_string(&self.secret).unwrap(), SECRET);
        assert_eq!(fs::read_dir(self.host()).unwrap().count(), 1);
    }
}

/// A chain of directories with a file in each, made without a path.
fn deep(root: &Path, levels: usize) {
    let mut at = Directory::open(root).unwrap();
    for _ in 0..levels {
        at.create("file", b"x", Owned::ours(0o644)).unwrap();
        at = at.make("d", Owned::ours(0o755)).unwrap();
    }
}

fn measured(root: &Path) -> Usage {
    at_once(Measurement::of(root, EVERYTHING).unwrap())
}

#[test]
fn a_link_leads_nowhere_and_what_is_above_is_not_reached() {
    let place = place();
    symlink(place.host(), place.volume.join("link")).unwrap();
    symlink(&place.secret, place.volume.join("file")).unwrap();
    symlink("../host/secret", place.volume.join("up")).unwrap();
    symlink("..", place.volume.join("above")).unwrap();
    let volume = place.directory();
    for path in ["file", "up", "link/secret", "../host/secret", "above/host/secret"] {
        assert!(volume.file(path).is_err(), "{path}");
        assert!(
            volume.holds(path, SECRET.as_bytes(), Owned::ours(0o600)).is_err(),
            "{path}"
        );
    }
    for path in ["link", "..", "above", "/", "above/host"] {
        assert!(volume.directory(path).is_err(), "{path}");
    }
    for name in ["..", ".", "", "a/b", "../host/x", "/x"] {
        assert!(volume.create(name, b"x", Owned::ours(0o600)).is_err(), "{name:?}");
        assert!(volume.make(name, Owned::ours(0o777)).is_err(), "{name:?}");
        assert!(volume.unlink(name).is_err(), "{name:?}");
        assert!(
            volume.replace(name, b"x", Owned::ours(0o666)).is_err(),
            "{name:?}"
        );
    }
    assert!(volume.create("link", b"x", Owned::ours(0o666)).is_err());
    assert!(volume.make_or_open("link", Owned::ours(0o777)).is_err());
    // The link goes, not what it leads to.
    volume.replace("file", b"mine", Owned::ours(0o666)).unwrap();
    assert_eq!(fs::read_to_string(place.volume.join("file")).unwrap(), "mine");
    place.host_is_untouched();
}

#[test]
fn only_a_regular_file_is_opened() {
    let place = place();
    let volume = place.directory();
    rustix::fs::mknodat(
        &volume,
        "fifo",
        FileType::Fifo,
        Mode::RUSR,
        rustix::fs::makedev(0, 0),
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.volume.join("socket")).unwrap();
    for name in ["fifo", "socket", "."] {
        let error = volume.file(name).unwrap_err();
        assert!(error.to_string().contains("regular"), "{name}: {error}");
    }
    volume.create("plain", b"x", Owned::ours(0o600)).unwrap();
    assert_eq!(io::read_to_string(volume.file("plain").unwrap()).unwrap(), "x");
}

#[test]
fn a_file_is_held_for_the_same_only_with_all_its_bytes_its_owner_and_its_mode() {
    let place = place();
    let volume = place.directory();
    let owned = Owned::ours(0o640);
    volume.create("a", b"12", owned).unwrap();
    let holds = |content: &[u8], mode| volume.holds("a", content, Owned::ours(mode)).unwrap();
    assert!(holds(b"12", 0o640));
    assert!(!holds(b"13", 0o640) && !holds(b"1", 0o640) && !holds(b"123", 0o640));
    assert!(!holds(b"12", 0o600));
    assert!(!volume.holds("b", b"", owned).unwrap());
}

#[test]
fn a_sub_path_is_made_like_its_volume_and_never_through_a_link() {
    let place = place();
    fs::set_permissions(&place.volume, fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(place.volume.join("inside")).unwrap();
    symlink("inside", place.volume.join("link")).unwrap();
    symlink(place.host(), place.volume.join("out")).unwrap();
    symlink("dangling", place.volume.join("nowhere")).unwrap();
    symlink("../host/new", place.volume.join("above")).unwrap();
    let volume = place.directory();
    for (path, opens) in [
        ("inside", true),
        ("link", true),
        ("link/new", true),
        ("new/deep", true),
        ("out", false),
        ("out/new", false),
        ("nowhere", false),
        ("nowhere/new", false),
        ("above", false),
        ("above/new", false),
        ("../host", false),
        ("/", false),
    ] {
        assert_eq!(volume.sub_path(Path::new(path)).is_ok(), opens, "{path}");
    }
    for made in ["new", "new/deep", "inside/new"] {
        let mode = fs::metadata(place.volume.join(made)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o777, "{made}");
    }
    assert!(!place.volume.join("dangling").exists());
    place.host_is_untouched();
}

#[test]
fn a_deep_tree_is_measured_and_removed_without_a_frame_or_a_descriptor_for_each_level() {
    let place = place();
    fs::create_dir(place.volume.join("tree")).unwrap();
    deep(&place.volume.join("tree"), DEEP);
    let volume = place.directory();
    let tree = place.volume.join("tree");
    // Frames for its levels would not fit. What is asserted is asserted outside: nor
    // would a panic's.
    let work = move || -> io::Result<(Usage, usize)> {
        let mut measurement = Measurement::of(&tree, EVERYTHING)?;
        let mut open = 0;
        let usage = loop {
            open = open.max(measurement.open());
            if let std::ops::ControlFlow::Break(usage) = measurement.go_on(1) {
                break usage;
            }
        };
        at_once(Removal::of(&volume, "tree")?)?;
        Ok((usage, open))
    };
    let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(work);
    let (usage, open) = thread.unwrap().join().unwrap().unwrap();
    assert_eq!(usage.inodes, 2 * DEEP as u64 + 1);
    assert!(open < 40, "{open} directories open at a time");
    assert_eq!(fs::read_dir(&place.volume).unwrap().count(), 0);
}

#[test]
fn all_that_is_no_directory_goes_and_names_may_be_any_bytes() {
    let place = place();
    let tree = place.volume.join("tree");
    let odd = tree.join(OsStr::from_bytes(b"\xff\xfe\n"));
    fs::create_dir_all(odd.join("a/b")).unwrap();
    fs::write(odd.join(OsStr::from_bytes(b"a/\x80")), "x").unwrap();
    symlink(place.host(), odd.join("a/link")).unwrap();
    symlink(&place.secret, odd.join("a/b/file")).unwrap();
    fs::hard_link(odd.join(OsStr::from_bytes(b"a/\x80")), tree.join("again")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    let fifo = Directory::open(&tree).unwrap();
    let none = rustix::fs::makedev(0, 0);
    rustix::fs::mknodat(&fifo, "fifo", FileType::Fifo, Mode::RUSR, none).unwrap();
    fs::set_permissions(odd.join("a"), fs::Permissions::from_mode(0o0)).unwrap();
    // root, odd, a, b, one file of two names, two links, a socket and a fifo
    assert_eq!(measured(&tree).inodes, 9);
    // In turns of one entry, as anybody may be interrupted.
    let mut removal = Removal::of(&place.directory(), "tree").unwrap();
    while removal.go_on(1).is_continue() {}
    assert!(!tree.exists());
    place.removed("tree").unwrap();
    place.host_is_untouched();
}

#[test]
fn a_wide_tree_is_worked_through_in_turns() {
    const WIDE: usize = 6_000;
    let place = place();
    let tree = place.directory().make("tree", Owned::ours(0o755)).unwrap();
    let below = tree.make("below", Owned::ours(0o755)).unwrap();
    for i in 0..WIDE {
        mkdirat(&below, i.to_string(), Mode::RWXU).unwrap();
        if i % 4 == 0 {
            let inner = below.directory(i.to_string()).unwrap();
            inner.create("file", b"", Owned::ours(0o644)).unwrap();
        }
    }
    assert_eq!(
        measured(&place.volume.join("tree")).inodes,
        2 + (WIDE + WIDE / 4) as u64
    );
    let mut removal = Removal::of(&place.directory(), "tree").unwrap();
    let mut turns = 0;
    while let std::ops::ControlFlow::Continue(()) = removal.go_on(500) {
        turns += 1;
    }
    assert!(turns >= WIDE / 500, "{turns} turns");
    assert!(!place.volume.join("tree").exists());
}

#[test]
fn blocks_are_counted_once_and_nothing_outside_is() {
    let place = place();
    let root = &place.volume;
    fs::create_dir_all(root.join("a/b")).unwrap();
    let empty = measured(root).bytes;
    // Sparse: it has a length, but takes no blocks.
    fs::File::create(root.join("sparse"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    fs::write(place.host().join("much"), vec![1; 1 << 20]).unwrap();
    symlink("../host/much", root.join("link")).unwrap();
    symlink("..", root.join("up")).unwrap();
    assert!(measured(root).bytes < empty + (64 << 10));
    fs::write(root.join("a/b/file"), vec![1; 100 << 10]).unwrap();
    fs::hard_link(root.join("a/b/file"), root.join("a/again")).unwrap();
    let used = measured(root).bytes - empty;
    assert!(
        (100 << 10..190 << 10).contains(&used),
        "two names of one file count once: {used}"
    );
    let mut looked = Measurement::of(root, NOTHING).unwrap();
    assert!(looked.go_on(1).is_break(), "it has found enough");
    assert!(Measurement::of(&root.join("none"), EVERYTHING).is_err());
}

/// Runs `work` again and again while somebody swaps a directory of the volume, with
/// what is in it, for a link to the host's.
fn while_swapped(place: &Place, mut work: impl FnMut()) -> u32 {
    /// Ends the swapping, also when an assertion fails.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (volume, host) = (&place.volume, place.host());
        let over = &over;
        let _ended = Over(over);
        scope.spawn(move || {
            let link = volume.join("link");
            symlink(host, &link).unwrap();
            let at = Directory::open(volume).unwrap();
            while !over.load(Ordering::Relaxed) {
                // In one step, so that each of the two is there all the time.
                let swap = renameat_with(&at, "link", &at, "a", RenameFlags::EXCHANGE);
                match swap {
                    Ok(()) => {}
                    // The other side has removed it.
                    Err(Errno::NOENT) => {
                        fs::create_dir_all(volume.join("a/b/c")).ok();
                        fs::write(volume.join("a/b/c/secret"), SECRET).ok();
                        if !link.is_symlink() {
                            symlink(host, &link).ok();
                        }
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let begun = Instant::now();
        let mut times = 0;
        while begun.elapsed() < RACE {
            work();
            times += 1;
        }
        times
    })
}

#[test]
fn a_pod_that_swaps_directories_for_links_meanwhile_leads_nobody_out() {
    let place = place();
    let (mut gone, mut found, mut opened) = (0, 0, 0);
    let mut times = while_swapped(&place, || {
        // Whatever it is at that moment.
        gone += u32::from(place.removed("a").is_ok());
    });
    place.host_is_untouched();
    for name in ["link", "a"] {
        place.removed(name).unwrap();
    }
    fs::create_dir_all(place.volume.join("a/b/c")).unwrap();
    fs::write(place.volume.join("a/b/c/secret"), SECRET).unwrap();
    times += while_swapped(&place, || {
        let volume = place.directory();
        if let Ok(file) = volume.file("a/secret") {
            panic!("a file of the host's was opened: {file:?}");
        }
        found += u32::from(volume.file("a/b/c/secret").is_ok());
        opened += u32::from(volume.sub_path(Path::new("a/new")).is_ok());
        if let Ok(a) = volume.directory("a") {
            a.create("made", b"", Owned::ours(0o666)).ok();
        }
    });
    place.host_is_untouched();
    assert!(
        times > 2 && gone > 0 && found > 0 && opened > 0,
        "{times} {gone} {found} {opened}"
    );
}

#[tokio::test]
async fn work_in_slices_ends_as_if_it_were_done_at_once() {
    let place = place();
    fs::create_dir(place.volume.join("tree")).unwrap();
    deep(&place.volume.join("tree"), 3_000);
    let usage = in_slices(Measurement::of(&place.volume, EVERYTHING).unwrap())
        .await
        .unwrap();
    assert_eq!(usage.inodes, 2 * 3_000 + 2);
    in_slices(Removal::of(&place.directory(), "tree").unwrap())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(measured(&place.volume).inodes, 1);
}

#[test]
fn what_must_not_change_is_removed_all_the_same() {
    let place = place();
    fs::create_dir_all(place.volume.join("tree/fixed/below")).unwrap();
    fs::write(place.volume.join("tree/fixed/file"), "x").unwrap();
    fs::write(place.volume.join("tree/fixed/below/file"), "x").unwrap();
    // chattr(1) takes root and a file system that has it; elsewhere there is nothing to remove.
    let fix = |path: &str, flags| {
        let opened = rustix::fs::openat(CWD, place.volume.join(path), OFlags::RDONLY, Mode::empty()).unwrap();
        rustix::fs::ioctl_setflags(&opened, flags).is_ok()
    };
    use rustix::fs::IFlags;
    let could = fix("tree/fixed/file", IFlags::IMMUTABLE)
        && fix("tree/fixed/below", IFlags::APPEND)
        && fix("tree/fixed", IFlags::IMMUTABLE);
    if could {
        assert!(fs::remove_file(place.volume.join("tree/fixed/file")).is_err());
    } else {
        eprintln!("this file system has no immutable files, or this is not root: not shown");
    }
    place.removed("tree").unwrap();
    assert!(!place.volume.join("tree").exists());
}

#[test]
fn a_mode_reaches_the_kernel_whole() {
    let place = place();
    place.directory().make("d", Owned::ours(0o2777)).unwrap();
    let mode: RawMode = fs::metadata(place.volume.join("d")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o2777);
    assert!(place.beside.path().exists());
}

#[test]
fn what_is_mounted_in_a_tree_is_neither_measured_nor_removed() {
    use nix::{
        mount::{MntFlags, MsFlags, mount, umount2},
        sched::{CloneFlags, unshare},
    };
    if !geteuid().is_root() {
        eprintln!("mounting takes root: not shown");
        return;
    }
    let place = place();
    let at = place.volume.join("tree/a/b");
    fs::create_dir_all(&at).unwrap();
    fs::create_dir_all(place.volume.join("tree/c")).unwrap();
    // A thread of its own: its mounts are nobody else's.
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        // Of the same file system, so that nothing but the mount tells them apart.
        mount(Some(place.host()), &at, none, MsFlags::MS_BIND, none).unwrap();
        assert_eq!(
            measured(&place.volume.join("tree")).inodes,
            3,
            "the tree, a and c"
        );
        let error = place.removed("tree").unwrap_err();
        assert!(place.secret.exists(), "{error}");
        place.host_is_untouched();
        assert!(!place.volume.join("tree/c").exists(), "the rest goes");
        umount2(&at, MntFlags::MNT_DETACH).unwrap();
        place.removed("tree").unwrap();
        place.host_is_untouched();
    })
    .join()
    .unwrap();
}
