use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use proptest::prelude::*;

use super::*;

const LOG: &str = "\
2026-11-23T12:00:00.000000001Z stdout F one
2026-11-23T12:00:01.000000001Z stderr P tw
2026-11-23T12:00:02.000000001Z stderr F o
2026-11-23T12:00:03.000000001Z stdout F three
";

async fn read(content: &str, request: Request) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    std::fs::write(&path, content).unwrap();
    let (to, mut from) = mpsc::channel(64);
    stream(&path, request, || false, to).await;
    let mut all = vec![];
    while let Some(block) = from.recv().await {
        all.extend(block.unwrap());
    }
    String::from_utf8(all).unwrap()
}

#[tokio::test]
async fn a_log_is_shown_as_a_kubelet_shows_it() {
    let all = "one\ntwo\nthree\n";
    assert_eq!(read(LOG, Request::default()).await, all);
    for (lines, shown) in [(0, ""), (1, "three\n"), (2, "two\nthree\n"), (9, all)] {
        let request = Request {
            tail_lines: Some(lines),
            ..Request::default()
        };
        assert_eq!(read(LOG, request).await, shown, "{lines}");
    }
    let since = Request {
        since: Some("2026-11-23T12:00:03Z".parse().unwrap()),
        ..Request::default()
    };
    assert_eq!(read(LOG, since).await, "three\n");
    let limited = Request {
        limit_bytes: Some(6),
        ..Request::default()
    };
    assert_eq!(read(LOG, limited).await, "one\ntw");
    let stamped = Request {
        timestamps: true,
        tail_lines: Some(1),
        ..Request::default()
    };
    assert_eq!(read(LOG, stamped).await, "2026-11-23T12:00:03.000000001Z three\n");
    assert_eq!(read("not an entry\n", Request::default()).await, "");
}

#[tokio::test]
async fn a_followed_log_goes_on_over_a_rotation_until_the_run_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let line = |text: &str| format!("2026-11-23T12:00:00Z stdout F {text}\n");
    std::fs::write(&path, line("one")).unwrap();
    let running = Arc::new(AtomicBool::new(true));
    let (to, mut from) = mpsc::channel(64);
    let follower = tokio::spawn({
        let (path, running) = (path.clone(), running.clone());
        let request = Request {
            follow: true,
            ..Request::default()
        };
        async move { stream(&path, request, move || running.load(Ordering::SeqCst), to).await }
    });
    assert_eq!(from.recv().await.unwrap().unwrap(), "one\n");
    let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(line("two").as_bytes()).unwrap();
    assert_eq!(from.recv().await.unwrap().unwrap(), "two\n");
    std::fs::rename(&path, directory.path().join("0.log.1")).unwrap();
    std::fs::write(&path, line("three")).unwrap();
    assert_eq!(from.recv().await.unwrap().unwrap(), "three\n");
    running.store(false, Ordering::SeqCst);
    assert!(from.recv().await.is_none());
    follower.await.unwrap();
}

#[test]
fn the_last_lines_are_cut_to_their_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    std::fs::write(&path, LOG).unwrap();
    assert_eq!(last_lines(&path, 80, 2048), "one\ntwo\nthree\n");
    assert_eq!(last_lines(&path, 1, 2048), "three\n");
    assert_eq!(last_lines(&path, 80, 4), "ree\n");
    assert_eq!(last_lines(&directory.path().join("none"), 80, 4), "");
}

proptest! {
    /// However lines are cut into entries and however long they are, the tail is
    /// what a reader of the whole would call the last lines.
    #[test]
    fn the_tail_is_the_end_of_the_whole(
        lines in proptest::collection::vec(proptest::collection::vec(0usize..40_000, 1..4), 0..12),
        wanted in 0u64..14,
    ) {
        let mut log = String::new();
        let mut whole = vec![];
        for pieces in &lines {
            let mut line = String::new();
            for (i, length) in pieces.iter().enumerate() {
                let tag = if i + 1 == pieces.len() { "F" } else { "P" };
                let text = "x".repeat(*length);
                log.push_str(&format!("2026-11-23T12:00:00Z stdout {tag} {text}\n"));
                line.push_str(&text);
            }
            whole.push(line + "\n");
        }
        let skipped = whole.len().saturating_sub(usize::try_from(wanted).unwrap());
        let expected = whole[skipped..].concat();
        let mut file = std::io::Cursor::new(log.as_bytes());
        let start = tail::start_of(&mut file, log.len() as u64, wanted).unwrap();
        let mut writer = Writer::new(false, None, None);
        writer.push(&log.as_bytes()[usize::try_from(start).unwrap()..]);
        prop_assert_eq!(String::from_utf8(writer.take().to_vec()).unwrap(), expected);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), wanted in 0u64..5) {
        let mut file = std::io::Cursor::new(&bytes);
        let start = tail::start_of(&mut file, bytes.len() as u64, wanted).unwrap();
        prop_assert!(start <= bytes.len() as u64);
        let mut writer = Writer::new(true, None, Some(7));
        writer.push(&bytes);
        writer.finish();
        prop_assert!(writer.take().len() <= 7);
    }
}

#[tokio::test]
async fn a_link_in_a_logs_place_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "2026-11-23T12:00:00Z stdout F the host's own\n").unwrap();
    let logs = directory.path().join("main");
    std::fs::create_dir(&logs).unwrap();
    let path = logs.join("0.log");
    std::os::unix::fs::symlink(&secret, &path).unwrap();
    assert_eq!(last_lines(&path, 10, 1000), "");
    for tail_lines in [None, Some(5)] {
        let request = Request {
            tail_lines,
            ..Request::default()
        };
        let (to, mut from) = mpsc::channel(4);
        stream(&path, request, || false, to).await;
        let told = from.recv().await.unwrap();
        assert!(told.is_err(), "{told:?}");
        assert!(from.recv().await.is_none());
    }
    remove(&path);
    assert!(secret.exists() && !path.is_symlink());
}
