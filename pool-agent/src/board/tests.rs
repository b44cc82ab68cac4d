use jiff::Timestamp;
use pool_agent_api::status::{MeshState, SandboxState};

use super::*;

fn status(pod: &str, state: SandboxState) -> SandboxStatus {
    SandboxStatus {
        key: SandboxKey {
            pod: pod.parse().unwrap(),
            attempt: pool_agent_api::Attempt::FIRST,
        },
        namespace: "shop".parse().unwrap(),
        name: "web-0".parse().unwrap(),
        node_name: "node".into(),
        revision: 0,
        state,
        reason: String::new(),
        message: String::new(),
        pod_ip: None,
        host_ip: "192.0.2.1".parse().unwrap(),
        accepted_at: Timestamp::UNIX_EPOCH,
        mesh: MeshState::Detached,
        identity: None,
        init_containers: vec![],
        containers: vec![],
        notice: None,
    }
}

fn seen(reader: &mut Reader) -> Vec<String> {
    reader
        .take()
        .unwrap()
        .into_iter()
        .map(|change| match change {
            Change::Status(s) => format!("{} {:?} {}", s.key.pod, s.state, s.revision & 0xffff_ffff),
            Change::Forgotten(key) => format!("{} forgotten", key.pod),
        })
        .collect()
}

#[tokio::test]
async fn a_slow_reader_gets_the_newest_of_each_sandbox_once() {
    let board = Board::new(1);
    let tenant: TenantId = "demo".parse().unwrap();
    let mut reader = board.reader(Some(tenant.clone()));
    board.publish(&tenant, status("a", SandboxState::Preparing));
    assert_eq!(seen(&mut reader), ["a Preparing 1"]);
    board.publish(&tenant, status("a", SandboxState::Running));
    board.publish(&tenant, status("b", SandboxState::Preparing));
    board.publish(&tenant, status("a", SandboxState::Stopping));
    board.publish(&tenant, status("a", SandboxState::Stopping));
    assert!(reader.changed().await);
    assert_eq!(seen(&mut reader), ["b Preparing 1", "a Stopping 3"]);
    board.forget(&tenant, &status("b", SandboxState::Stopped).key);
    assert_eq!(seen(&mut reader), ["b forgotten"]);
    assert!(seen(&mut reader).is_empty());
}

#[test]
fn a_reader_sees_its_own_tenant_only() {
    let board = Board::new(1);
    board.publish(&"demo".parse().unwrap(), status("a", SandboxState::Running));
    let mut other = board.reader(Some("other".parse().unwrap()));
    assert!(seen(&mut other).is_empty());
    assert_eq!(seen(&mut board.reader(None)).len(), 1);
}

#[test]
fn revisions_of_a_later_life_are_greater() {
    let tenant: TenantId = "demo".parse().unwrap();
    let revision = |generation, changes: u32| {
        let board = Board::new(generation);
        let mut newest = status("a", SandboxState::Running);
        for i in 0..changes {
            newest.message = i.to_string();
            board.publish(&tenant, newest.clone());
        }
        board.status(&tenant, &newest.key).unwrap().revision
    };
    assert!(revision(2, 1) > revision(1, 1000));
}

#[test]
fn a_reader_that_missed_too_much_is_told_to_begin_again() {
    let board = Board::new(1);
    let tenant: TenantId = "demo".parse().unwrap();
    let mut reader = board.reader(Some(tenant.clone()));
    assert!(seen(&mut reader).is_empty());
    for i in 0..=FORGOTTEN {
        let status = status(&format!("p{i}"), SandboxState::Stopped);
        let key = status.key.clone();
        board.publish(&tenant, status);
        board.forget(&tenant, &key);
    }
    assert!(matches!(reader.take(), Err(FellBehind)));
    assert!(board.reader(Some(tenant)).take().is_ok());
}

#[test]
fn a_notice_stays_on_a_status_until_the_sandbox_is_forgotten() {
    let board = Board::new(1);
    let tenant: TenantId = "demo".parse().unwrap();
    let running = status("a", SandboxState::Running);
    let key = running.key.clone();
    let notice = Notice {
        reason: "ClaimDeleted".into(),
        deadline: Timestamp::UNIX_EPOCH,
    };
    board.give_notice(&tenant, &key, notice.clone());
    assert!(
        board.status(&tenant, &key).is_none(),
        "of a sandbox that is not here"
    );
    board.publish(&tenant, running.clone());
    board.give_notice(&tenant, &key, notice.clone());
    let seen = board.status(&tenant, &key).unwrap();
    assert_eq!(
        (seen.notice.as_ref(), seen.state),
        (Some(&notice), SandboxState::Running)
    );
    let revision = seen.revision;
    board.give_notice(&tenant, &key, notice.clone());
    assert_eq!(
        board.status(&tenant, &key).unwrap().revision,
        revision,
        "it was told before"
    );
    board.publish(&tenant, status("a", SandboxState::Stopping));
    assert_eq!(board.status(&tenant, &key).unwrap().notice, Some(notice));
    board.forget(&tenant, &key);
    board.publish(&tenant, running);
    assert_eq!(board.status(&tenant, &key).unwrap().notice, None);
}

/// Statuses come from the sandbox's driver, notices from whoever keeps the claims.
#[test]
fn a_notice_never_brings_back_what_a_sandbox_said_before() {
    let board = Board::new(1);
    let tenant: TenantId = "demo".parse().unwrap();
    let key = status("a", SandboxState::Preparing).key;
    for round in 0..2000 {
        board.publish(&tenant, status("a", SandboxState::Running));
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let notice = Notice {
                    reason: round.to_string(),
                    deadline: Timestamp::UNIX_EPOCH,
                };
                board.give_notice(&tenant, &key, notice);
            });
            threads.spawn(|| board.publish(&tenant, status("a", SandboxState::Stopped)));
        });
        let now = board.status(&tenant, &key).unwrap();
        assert_eq!(now.state, SandboxState::Stopped, "round {round}");
        assert_eq!(now.notice.as_ref().unwrap().reason, round.to_string());
    }
}
