use super::*;

fn entry(pod: &str, attempt: u32, address: &str) -> Entry {
    Entry {
        key: SandboxKey {
            pod: pod.parse().unwrap(),
            attempt: Attempt::parse("", attempt).unwrap(),
        },
        tenant: "demo".parse().unwrap(),
        namespace: "shop".parse().unwrap(),
        name: "web-0".parse().unwrap(),
        node_name: "node".into(),
        claim: Resources {
            cpu_millis: 1,
            memory_bytes: 2,
            ephemeral_storage_bytes: 3,
            sandboxes: 1,
        },
        address: address.parse().unwrap(),
        identity: Some("spiffe://cluster.local/ns/shop/sa/web".into()),
        user_ids: Some(IdRange { first: 1 << 20 }),
        accepted_at: Timestamp::from_second(1_700_000_000).unwrap(),
        boot_id: Some("b00t".into()),
        stop_by: None,
    }
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state/ledger");
    let (a, b) = (entry("a", 1, "10.0.0.2"), entry("b", 1, "10.0.0.3"));
    let by = Timestamp::from_second(1_700_000_100).unwrap();
    let (ledger, contents) = Ledger::open(&path).unwrap();
    assert_eq!((contents.generation, contents.admitted.len()), (1, 0));
    ledger
        .commit(vec![Record::Admitted(a.clone()), Record::Admitted(b.clone())])
        .await
        .unwrap();
    ledger
        .commit(vec![Record::Stopping(b.key.clone(), by)])
        .await
        .unwrap();
    let ended = (a.tenant.clone(), a.key.clone());
    ledger
        .commit(vec![Record::Ended(ended.0.clone(), ended.1.clone())])
        .await
        .unwrap();
    drop(ledger);
    for generation in [2, 3] {
        let (_, contents) = Ledger::open(&path).unwrap();
        assert_eq!(contents.generation, generation);
        assert_eq!(contents.ended, std::slice::from_ref(&ended));
        assert_eq!(contents.last_address, Some(b.address));
        let known = Entry {
            stop_by: Some(by),
            ..b.clone()
        };
        assert_eq!(contents.admitted.into_values().collect::<Vec<_>>(), [known]);
    }
}

#[tokio::test]
async fn what_an_older_agent_wrote_is_of_no_boot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let mut older = entry("a", 1, "10.0.0.2");
    older.boot_id = None;
    let (ledger, _) = Ledger::open(&path).unwrap();
    ledger
        .commit(vec![Record::Admitted(older.clone())])
        .await
        .unwrap();
    drop(ledger);
    assert!(!std::fs::read_to_string(&path).unwrap().contains("boot_id"));
    let (_, contents) = Ledger::open(&path).unwrap();
    assert_eq!(contents.admitted.into_values().collect::<Vec<_>>(), [older]);
}

#[tokio::test]
async fn a_torn_last_line_is_cut_off_and_other_damage_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let (ledger, _) = Ledger::open(&path).unwrap();
    for (pod, address) in [("a", "10.0.0.2"), ("b", "10.0.0.3")] {
        ledger
            .commit(vec![Record::Admitted(entry(pod, 1, address))])
            .await
            .unwrap();
    }
    drop(ledger);
    let whole = std::fs::read(&path).unwrap();
    let last = whole[..whole.len() - 1]
        .iter()
        .rposition(|&b| b == b'\n')
        .unwrap()
        + 1;
    for cut in [last + 1, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let (_, contents) = Ledger::open(&path).unwrap();
        assert_eq!(contents.admitted.len(), 1, "cut at {cut}");
    }
    for at in [0, 20, last - 2, last + 3] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x01;
        std::fs::write(&path, &damaged).unwrap();
        assert!(
            matches!(Ledger::open(&path), Err(LedgerError::Damaged { .. })),
            "damaged at {at}"
        );
        assert_eq!(
            std::fs::read(&path).unwrap(),
            damaged,
            "it is left for a person to look at"
        );
    }
}

#[tokio::test]
async fn commits_that_come_together_are_all_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let (ledger, _) = Ledger::open(&path).unwrap();
    let commits = (0..100).map(|i| {
        let ledger = ledger.clone();
        async move {
            let record = Record::Admitted(entry(&format!("p{i}"), 1, "10.0.0.2"));
            ledger.commit(vec![record]).await
        }
    });
    for result in futures::future::join_all(commits).await {
        result.unwrap();
    }
    drop(ledger);
    assert_eq!(Ledger::open(&path).unwrap().1.admitted.len(), 100);
}

#[tokio::test]
async fn what_is_over_is_left_out_while_the_agent_runs_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let (ledger, _) = Ledger::open(&path).unwrap();
    let size = || std::fs::metadata(&path).unwrap().len();
    let stays = entry("stays", 1, "10.0.0.2");
    ledger
        .commit(vec![Record::Admitted(stays.clone())])
        .await
        .unwrap();
    let mut largest = 0;
    // A tenant that changes its settings again and again, as fast as it can.
    for n in 0..600 {
        let settings = |n: u32| {
            Tenant::try_from(wire::Tenant {
                id: "demo".into(),
                cluster_pod_range: "10.77.0.0/16".into(),
                cluster_domain: format!("{}.{n}", "x".repeat(200)),
                dns_address: "10.96.0.10".into(),
                upstream_nameservers: vec![],
                mesh_control: Some(wire::MeshControl {
                    address: "node:1".into(),
                    trust_domain: "x".repeat(250),
                    cluster_id: "x".repeat(250),
                    network: "x".repeat(250),
                }),
            })
            .unwrap()
        };
        let records = (0..10).map(|m| Record::Tenant(settings(10 * n + m))).collect();
        ledger.commit(records).await.unwrap();
        largest = largest.max(size());
    }
    assert!(
        largest <= SMALL + (32 << 10),
        "{largest} bytes for one tenant and one pod"
    );
    let last = entry("last", 1, "10.0.0.3");
    ledger.commit(vec![Record::Admitted(last.clone())]).await.unwrap();
    drop(ledger);
    let (_, contents) = Ledger::open(&path).unwrap();
    assert_eq!(
        (contents.generation, contents.last_address),
        (2, Some(last.address))
    );
    assert_eq!(contents.admitted.into_values().collect::<Vec<_>>(), [last, stays]);
    let domain = &contents.tenants.values().next().unwrap().cluster_domain;
    assert!(domain.ends_with(".5999"), "{domain}");
}
