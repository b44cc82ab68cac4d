use super::*;

#[test]
fn cpu_amounts_become_the_kernels_numbers() {
    assert_eq!(
        [0, 1, 100, 1000, 1_000_000].map(cpu_shares),
        [2, 2, 102, 1024, 262_144]
    );
    assert_eq!([1, 10, 250, 2000].map(cpu_quota), [1000, 1000, 25_000, 200_000]);
    assert_eq!(
        cpu_quota(u64::MAX),
        i64::try_from(u128::from(u64::MAX) * 100).unwrap_or(i64::MAX)
    );
}

#[test]
fn a_signal_is_known_by_its_name() {
    for (name, number) in [
        ("SIGTERM", 23),
        ("SIGUSR1", 29),
        ("SIGRTMIN", 35),
        ("SIGRTMIN+3", 38),
        ("SIGRTMAX-1", 64),
    ] {
        assert_eq!(stop_signal(name).map(i32::from), Some(number), "{name}");
    }
    for name in ["", "TERM", "sigterm", "SIGNAL_SIGTERM", "SIGX"] {
        assert_eq!(stop_signal(name), None, "{name}");
    }
}

#[test]
fn the_score_for_a_burstable_container_falls_with_what_it_requests() {
    let asks = |bytes| ContainerResources {
        memory_request_bytes: Some(bytes),
        ..Default::default()
    };
    let host = 8 << 30;
    assert_eq!(Qos::Burstable.oom_score_adj(asks(0), host), 999);
    assert_eq!(Qos::Burstable.oom_score_adj(asks(4 << 30), host), 500);
    assert_eq!(Qos::Burstable.oom_score_adj(asks(u64::MAX), host), 3);
    assert_eq!(Qos::Guaranteed.oom_score_adj(asks(0), host), -997);
    assert_eq!(Qos::BestEffort.oom_score_adj(asks(0), 0), 1000);
}
