use std::{collections::VecDeque, task::Waker};

use super::*;
use crate::{Budget, Rule, Step};

const MINUTE: Duration = Duration::from_secs(60);

/// What a caller has sent so far; more may come.
#[derive(Default)]
struct Sent(VecDeque<Bytes>);

impl Body for Sent {
    type Data = Bytes;
    type Error = Overrun;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Overrun>>> {
        match self.0.pop_front() {
            Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            None => Poll::Pending,
        }
    }
}

type Call = Metered<Sent, &'static str, ()>;

fn call(shared: &Shared<&'static str>, who: &'static str, sends: Sends, sent: &[&[u8]]) -> Call {
    let step = Step {
        key: who,
        level: Level::Tenant,
        rule: Rule {
            promised: 0,
            limit: 4,
            greed: 4,
        },
    };
    let path = Path {
        trunk: Arc::from([step]),
        leaf: None,
    };
    let body = Sent(sent.iter().map(|b| Bytes::copy_from_slice(b)).collect());
    Metered::new(
        (body, |overrun| overrun),
        sends,
        Arc::new(Paid::new(shared.clone(), path)),
        (),
    )
}

/// Reads what is there. The bytes that its reader has got, or why it got no more.
fn read(call: &mut Call) -> Result<usize, Overrun> {
    let mut got = 0;
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        match Pin::new(&mut *call).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => got += frame.data_ref().map_or(0, Bytes::len),
            Poll::Ready(Some(Err(overrun))) => return Err(overrun),
            Poll::Ready(None) | Poll::Pending => return Ok(got),
        }
    }
}

fn message(length: usize) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
    bytes.resize(HEAD + length, 7);
    bytes
}

fn one(longest: usize) -> Sends {
    Sends::One {
        longest,
        within: MINUTE,
    }
}

#[tokio::test(start_paused = true)]
async fn messages_that_are_not_whole_are_paid_for_and_whoever_sends_many_is_refused_alone() {
    let shared = Shared::new(Budget::new(8, 0));
    let almost = &message(10 * PAGE)[..2 * PAGE];
    let mut hostile = [0; 3].map(|_| call(&shared, "hostile", one(16 * PAGE), &[almost]));
    assert_eq!(read(&mut hostile[0]), Ok(2 * PAGE));
    assert_eq!(read(&mut hostile[1]), Ok(2 * PAGE));
    assert_eq!(read(&mut hostile[2]), Err(Overrun::Share(Level::Tenant)));
    assert_eq!(shared.held(), 4);
    let mut honest = call(&shared, "honest", one(PAGE), &[&message(PAGE - HEAD)]);
    assert_eq!(read(&mut honest), Ok(PAGE));
    drop((hostile, honest));
    assert_eq!(shared.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_message_is_paid_for_until_its_call_ends_and_not_only_while_it_comes() {
    let shared = Shared::new(Budget::new(8, 0));
    let mut body = call(&shared, "tenant", one(PAGE), &[&message(10)]);
    let paid = body.paid.clone();
    assert_eq!(read(&mut body), Ok(HEAD + 10));
    drop(body);
    assert_eq!(shared.held(), 1, "it is being worked on");
    drop(paid);
    assert_eq!(shared.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_trickles_in_is_cut_off_in_time() {
    let shared = Shared::new(Budget::new(8, 0));
    let mut silent = call(&shared, "silent", one(PAGE), &[]);
    let mut trickling = call(&shared, "trickling", one(PAGE), &[]);
    for _ in 0..59 {
        tokio::time::advance(Duration::from_secs(1)).await;
        trickling.body.0.push_back(Bytes::from_static(&[0]));
        assert_eq!((read(&mut silent), read(&mut trickling)), (Ok(0), Ok(1)));
    }
    tokio::time::advance(Duration::from_secs(2)).await;
    trickling.body.0.push_back(Bytes::from_static(&[0]));
    assert_eq!(read(&mut silent), Err(Overrun::TooSlow(MINUTE)));
    assert_eq!(read(&mut trickling), Err(Overrun::TooSlow(MINUTE)));
}

#[tokio::test(start_paused = true)]
async fn no_message_is_longer_than_its_call_may_send() {
    let shared = Shared::new(Budget::new(8, 0));
    for sends in [one(100), Sends::Many { longest: 100 }] {
        let mut declared = call(&shared, "tenant", sends, &[&message(101)[..HEAD]]);
        assert_eq!(read(&mut declared), Err(Overrun::TooLong(100)));
        let mut whole = call(&shared, "tenant", sends, &[&message(100)]);
        assert_eq!(read(&mut whole), Ok(HEAD + 100));
    }
    // One call, and message after message.
    let mut more = call(&shared, "tenant", one(100), &[&message(100), &message(0)]);
    assert_eq!(read(&mut more), Err(Overrun::TooLong(100)));
}

#[tokio::test(start_paused = true)]
async fn a_stream_pays_for_the_message_under_way_alone_however_it_is_cut() {
    let shared = Shared::new(Budget::new(8, 0));
    let all: Vec<u8> = [PAGE, 0, 3, 2 * PAGE].into_iter().flat_map(message).collect();
    for cut in [1, 4, 5, 6, 1000, PAGE] {
        let pieces: Vec<&[u8]> = all.chunks(cut).collect();
        let sends = Sends::Many { longest: 2 * PAGE };
        let mut stream = call(&shared, "tenant", sends, &pieces);
        assert_eq!(read(&mut stream), Ok(all.len()), "in pieces of {cut}");
        assert_eq!(shared.held(), 0, "all are whole");
        stream
            .body
            .0
            .push_back(Bytes::from(message(2 * PAGE)[..PAGE + 1].to_vec()));
        assert_eq!(read(&mut stream), Ok(PAGE + 1));
        assert_eq!(shared.held(), 2);
    }
}
