use jiff::Timestamp;
use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn at(seconds: u64) -> Moment {
    Moment {
        wall: Timestamp::from_second(1_700_000_000 + i64::try_from(seconds).unwrap()).unwrap(),
        boot: seconds * SECOND,
    }
}

fn subject(uid: &str, attempt: u32) -> Subject {
    Subject {
        tenant: "acme".parse().unwrap(),
        namespace: "shop".parse().unwrap(),
        pod: "web".parse().unwrap(),
        key: key(uid, attempt),
    }
}

fn key(uid: &str, attempt: u32) -> SandboxKey {
    SandboxKey {
        pod: uid.parse().unwrap(),
        attempt: pool_agent_api::Attempt::parse("attempt", attempt).unwrap(),
    }
}

fn book() -> Book {
    Book::new(Place::default(), "boot-1", Duration::from_secs(30))
}

const CLAIM: Claim = Claim {
    cpu_millis: 250,
    memory_bytes: 1000,
};

fn reading(cpu_nanos: u64, memory_bytes: u64) -> Reading {
    Reading {
        cgroup: Some(CgroupReading {
            cpu_nanos,
            memory_bytes,
        }),
        mesh: Carried::default(),
    }
}

/// As the agent that comes after one that was killed has it.
fn again(book: &Book, boot_id: &str) -> Book {
    let text = serde_json::to_string(&book.accounts().collect::<Vec<_>>()).unwrap();
    let mut next = Book::new(Place::default(), boot_id, Duration::from_secs(30));
    next.restore(serde_json::from_str(&text).unwrap(), "boot-1", book.lost());
    next
}

#[test]
fn an_interval_says_what_was_claimed_and_used_and_the_next_begins_where_it_ends() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(0));
    book.read(&key("a", 1), reading(5, 100), at(10));
    assert!(book.cut(Duration::from_secs(20), 10).is_empty());
    book.read(&key("a", 1), reading(9, 300), at(20));
    let records = book.cut(Duration::from_secs(20), 10);
    let [first] = &records[..] else {
        panic!("{records:?}")
    };
    assert_eq!((first.sequence, first.from, first.to), (0, at(0), at(20)));
    assert_eq!((first.began, first.ended), (Began::Started, Ended::Continues));
    assert_eq!(
        first.amounts,
        Amounts {
            requested_cpu_nanos: 5 * SECOND,
            requested_memory_byte_seconds: 20_000,
            used_cpu_nanos: 9,
            // A straight line from 0 to 100 and on to 300.
            used_memory_byte_seconds: 500 + 2000,
            ..Amounts::default()
        }
    );
    book.kept(&records);
    book.read(&key("a", 1), reading(10, 300), at(21));
    book.end(&key("a", 1), Ended::Stopped);
    let records = book.cut(Duration::from_secs(20), 10);
    let [second] = &records[..] else {
        panic!("{records:?}")
    };
    assert_eq!((second.sequence, second.from, second.to), (1, at(20), at(21)));
    assert_eq!((second.began, second.ended), (Began::Continued, Ended::Stopped));
    assert_eq!(second.amounts.used_cpu_nanos, 1);
    book.kept(&records);
    assert!(book.cut(Duration::ZERO, 10).is_empty());
    book.forget(&key("a", 1));
    assert_eq!(book.accounts().len(), 0);
}

#[test]
fn an_attempt_that_is_over_and_not_forgotten_gets_no_second_account() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(0));
    book.end(&key("a", 1), Ended::Completed);
    book.kept(&book.cut(Duration::ZERO, 10));
    // Its sandbox is still in the ledger, and adopted.
    let mut book = again(&book, "boot-1");
    book.open(subject("a", 1), CLAIM, Start::Cold, at(50));
    book.read(&key("a", 1), reading(5, 5), at(60));
    assert!(book.cut(Duration::ZERO, 10).is_empty());
    assert!(!book.is_running(&key("a", 1)));
}

#[test]
fn an_account_that_is_forgotten_before_its_end_is_durable_goes_when_it_is() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(0));
    book.end(&key("a", 1), Ended::Completed);
    book.forget(&key("a", 1));
    let mut book = again(&book, "boot-1");
    let records = book.cut(Duration::ZERO, 10);
    assert_eq!(records.len(), 1);
    book.kept(&records);
    assert_eq!(book.accounts().len(), 0);
}

#[test]
fn a_later_attempt_has_moved() {
    let mut book = book();
    book.open(subject("a", 2), CLAIM, Start::Cold, at(0));
    assert_eq!(book.cut(Duration::ZERO, 1)[0].began, Began::Moved);
}

#[test]
fn a_cgroup_that_is_gone_keeps_what_it_counted_and_has_no_memory() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(0));
    book.read(&key("a", 1), reading(7, 100), at(0));
    book.read(&key("a", 1), Reading::default(), at(10));
    book.read(&key("a", 1), Reading::default(), at(20));
    let amounts = book.cut(Duration::ZERO, 1)[0].amounts;
    assert_eq!(
        (amounts.used_cpu_nanos, amounts.used_memory_byte_seconds),
        (7, 500)
    );
}

#[test]
fn what_ran_while_the_agent_was_dead_is_counted_once_and_said_to_be_unsampled() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(0));
    let mut look = reading(5, 100);
    look.mesh.sent = 70;
    book.read(&key("a", 1), look, at(10));
    let mut book = again(&book, "boot-1");
    let mut look = reading(50, 100);
    // Counted anew since.
    look.mesh.sent = 8;
    book.read(&key("a", 1), look, at(100));
    let amounts = book.cut(Duration::ZERO, 1)[0].amounts;
    assert_eq!((amounts.used_cpu_nanos, amounts.mesh_sent_bytes), (50, 78));
    assert_eq!(amounts.unsampled_nanos, 90 * SECOND);
}

#[test]
fn after_a_reboot_the_last_look_stands() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(0));
    book.read(&key("a", 1), reading(5, 100), at(10));
    let mut book = again(&book, "boot-2");
    assert!(book.running().is_empty());
    book.read(&key("a", 1), reading(1, 1), at(1));
    let record = &book.cut(Duration::from_secs(60), 1)[0];
    assert_eq!((record.ended, record.to), (Ended::HostRestarted, at(10)));
    assert_eq!(record.amounts.used_cpu_nanos, 5);
}

#[test]
fn a_wall_clock_that_is_set_back_makes_no_interval_negative() {
    let mut book = book();
    book.open(subject("a", 1), CLAIM, Start::Cold, at(1000));
    let back = Moment {
        wall: at(0).wall,
        boot: at(1010).boot,
    };
    book.read(&key("a", 1), reading(1, 0), back);
    let record = &book.cut(Duration::ZERO, 1)[0];
    assert_eq!(record.to.since(record.from), 10 * SECOND);
    assert_eq!(record.amounts.requested_cpu_nanos, 10 * SECOND / 4);
}

#[test]
fn an_account_that_was_lost_is_begun_anew_with_numbers_nobody_was_given() {
    let mut book = book();
    book.reopen(subject("a", 1), CLAIM, Start::Cold, at(50), reading(400, 9));
    book.read(&key("a", 1), reading(405, 9), at(60));
    let record = &book.cut(Duration::ZERO, 1)[0];
    assert_eq!((record.began, record.lost), (Began::Resumed, 1));
    assert_eq!(record.amounts.used_cpu_nanos, 5);
    assert!(record.sequence >= 1_700_000_000, "{}", record.sequence);
}

#[test]
fn ended_accounts_beyond_the_bound_are_given_up_and_counted_oldest_first() {
    let mut book = book();
    for n in 0..5 {
        let uid = format!("a{n}");
        book.open(subject(&uid, 1), CLAIM, Start::Cold, at(n));
        book.end(&key(&uid, 1), Ended::Stopped);
    }
    book.open(subject("runs", 1), CLAIM, Start::Cold, at(0));
    assert_eq!((book.give_up(2), book.lost()), (3, 3));
    let left = book.cut(Duration::from_secs(60), 10);
    let left: Vec<_> = left.iter().map(|r| r.subject.key.pod.as_str()).collect();
    assert_eq!(left, ["a3", "a4"]);
    assert_eq!(book.running().len(), 1);
}

/// What happens to a host, in any order.
#[derive(Debug, Clone)]
enum Turn {
    Open,
    /// Time passes, a pod works, and is looked at.
    Look {
        seconds: u64,
        cpu: u64,
        memory: u64,
        bytes: u64,
    },
    /// A pod works, and nobody looks before the agent is killed.
    Unseen {
        seconds: u64,
        cpu: u64,
    },
    /// The records are cut and made durable, or that fails.
    Write {
        works: bool,
    },
    End,
    Killed,
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        1 => Just(Turn::Open),
        6 => (0..40u64, 0..1000u64, 0..1000u64, 0..1000u64)
            .prop_map(|(seconds, cpu, memory, bytes)| Turn::Look { seconds, cpu, memory, bytes }),
        2 => (0..40u64, 0..1000u64).prop_map(|(seconds, cpu)| Turn::Unseen { seconds, cpu }),
        4 => any::<bool>().prop_map(|works| Turn::Write { works }),
        1 => Just(Turn::End),
        2 => Just(Turn::Killed),
    ]
}

proptest! {
    /// One attempt after another, as an agent keeps them: what is durable is the book as
    /// of the last write that worked. CPU and claims add up to the last look whatever
    /// fails or is killed; numbers and intervals have no gap.
    #[test]
    fn the_sum_of_an_attempts_records_is_what_was_counted(turns in prop::collection::vec(turn(), 1..120)) {
        let mut book = book();
        let mut durable = book.clone();
        let mut records: Vec<Record> = vec![];
        let (mut now, mut attempt, mut running) = (0, 0, false);
        // By attempt: the kernel's counter, and what an ended one came to.
        let mut counter = 0;
        let mut bytes = 0;
        let mut mesh_since_start = 0;
        let mut totals: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        let mut opened = 0;
        let write = |book: &mut Book, durable: &mut Book, records: &mut Vec<Record>, works: bool| {
            let cut = book.cut(Duration::from_secs(20), 100);
            if works {
                book.kept(&cut);
                records.extend(cut);
                *durable = book.clone();
            }
        };
        for turn in turns {
            let of = key("a", attempt.max(1));
            match turn {
                Turn::Open if !running => {
                    attempt += 1;
                    (running, counter, mesh_since_start, opened) = (true, 0, 0, now);
                    book.open(subject("a", attempt), CLAIM, Start::Cold, at(now));
                    // An attempt's beginning can be had from the ledger too.
                    write(&mut book, &mut durable, &mut records, true);
                }
                Turn::Look { seconds, cpu, memory, bytes: more } if running => {
                    (now, counter) = (now + seconds, counter + cpu);
                    bytes += more;
                    mesh_since_start += more;
                    let mut look = reading(counter, memory);
                    look.mesh.sent = mesh_since_start;
                    book.read(&of, look, at(now));
                }
                Turn::Unseen { seconds, cpu } => (now, counter) = (now + seconds, counter + cpu),
                Turn::Write { works } => write(&mut book, &mut durable, &mut records, works),
                Turn::End if running => {
                    running = false;
                    book.read(&of, reading(counter, 0), at(now));
                    book.end(&of, Ended::Stopped);
                    write(&mut book, &mut durable, &mut records, true);
                    totals.insert(attempt, (counter, now - opened));
                }
                Turn::Killed => {
                    book = again(&durable, "boot-1");
                    mesh_since_start = 0;
                }
                _ => {}
            }
        }
        let _carried = bytes;
        for (attempt, (cpu, held)) in totals {
            let own: Vec<_> = records.iter().filter(|r| r.subject.key == key("a", attempt)).collect();
            let sum = |f: fn(&Amounts) -> u64| own.iter().map(|r| f(&r.amounts)).sum::<u64>();
            prop_assert_eq!(sum(|a| a.used_cpu_nanos), cpu);
            prop_assert_eq!(sum(|a| a.requested_cpu_nanos), held * SECOND / 4);
            prop_assert_eq!(sum(|a| a.requested_memory_byte_seconds), held * 1000);
            for (n, pair) in own.windows(2).enumerate() {
                prop_assert_eq!(pair[0].sequence, n as u64);
                prop_assert_eq!(pair[1].sequence, n as u64 + 1);
                prop_assert_eq!(pair[1].from, pair[0].to);
                prop_assert_eq!(pair[0].ended, Ended::Continues);
            }
            prop_assert_eq!(own.last().map(|r| r.ended), Some(Ended::Stopped));
        }
    }
}
