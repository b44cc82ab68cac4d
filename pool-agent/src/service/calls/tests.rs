use std::sync::Mutex;

use bytes::Bytes;
use http_body_util::BodyExt;

use super::*;
use crate::policy::bounds::Bounds;

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

fn calls() -> Calls {
    Calls::new(Bounds::default().callers(), &bounds::Bounds::default())
}

#[test]
fn a_tenant_that_asks_without_end_is_refused_alone() {
    let calls = calls();
    let (greedy, modest) = (tenant("greedy"), tenant("modest"));
    for kind in [Kind::Call, Kind::Watch, Kind::Grants, Kind::Logs, Kind::Splice] {
        let mut held = vec![];
        let status = loop {
            match calls.begin(&greedy, kind) {
                Ok(call) => held.push(call),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(status.message().contains("tenant's share"), "{status}");
        assert!(calls.begin(&modest, kind).is_ok());
        held.pop();
        assert!(calls.begin(&greedy, kind).is_ok(), "one has ended");
    }
}

/// A body that sends `bytes` in frames, and then nothing, without an end.
fn unfinished(bytes: usize) -> Body {
    let frames = vec![Bytes::from_static(&[0; 1 << 14]); bytes >> 14];
    let mut frames = std::collections::VecDeque::from(frames);
    // gRPC's head of a message of 32 MiB.
    if let Some(first) = frames.front_mut() {
        let mut head = vec![0, 2, 0, 0, 0];
        head.resize(1 << 14, 0);
        *first = head.into();
    }
    let stream = futures::stream::poll_fn(move |_| match frames.pop_front() {
        Some(bytes) => Poll::Ready(Some(Ok::<_, Status>(hyper::body::Frame::data(bytes)))),
        None => Poll::Pending,
    });
    Body::new(http_body_util::StreamBody::new(stream))
}

fn request(method: &str, caller: &TenantId, body: Body) -> http::Request<Body> {
    http::Request::post(format!("/spindrift.pool.v1.PoolAgent/{method}"))
        .extension(Caller(caller.clone()))
        .body(body)
        .unwrap()
}

/// What tonic holds of each call before its handler is asked.
type Gathered = Arc<Mutex<Vec<(Vec<Bytes>, Option<Status>)>>>;

/// A thousand bodies, read as far as they come by a server that keeps what it reads.
async fn flood(
    calls: &Calls,
    caller: &TenantId,
    method: &str,
    count: usize,
    bytes: usize,
) -> (usize, Vec<Status>) {
    let gathered: Gathered = Arc::default();
    let mut statuses = vec![];
    let mut admitted = vec![];
    for _ in 0..count {
        match calls.admit(request(method, caller, unfinished(bytes))) {
            Ok(request) => admitted.push(request.into_body()),
            Err(status) => statuses.push(status),
        }
    }
    let reading = admitted.into_iter().map(|mut body| {
        let gathered = gathered.clone();
        async move {
            let mut held = vec![];
            loop {
                // What does not come now does not come.
                let next = futures::poll!(std::pin::pin!(body.frame()));
                match next {
                    Poll::Ready(Some(Ok(frame))) => held.extend(frame.into_data().ok()),
                    Poll::Ready(Some(Err(status))) => {
                        gathered.lock().unwrap().push((held, Some(status)));
                        return body;
                    }
                    Poll::Ready(None) | Poll::Pending => {
                        gathered.lock().unwrap().push((held, None));
                        return body;
                    }
                }
            }
        }
    });
    let bodies = futures::future::join_all(reading).await;
    let gathered = std::mem::take(&mut *gathered.lock().unwrap());
    let held: usize = gathered.iter().flat_map(|(held, _)| held).map(Bytes::len).sum();
    statuses.extend(gathered.into_iter().filter_map(|(_, status)| status));
    // Until here all of it was in memory at once.
    drop(bodies);
    (held, statuses)
}

#[tokio::test]
async fn bodies_are_paid_for_before_their_handler_is_asked() {
    let calls = calls();
    let hostile = tenant("hostile");
    let (held, refused) = flood(&calls, &hostile, "StartSandbox", 1024, 1 << 20).await;
    assert!(held <= 65 << 20, "{held} bytes of one tenant were in memory");
    assert!(
        held >= 32 << 20,
        "{held} bytes are less than one message may have"
    );
    assert!(refused.len() >= 1024 - 65);
    for status in refused {
        assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
    }
    assert_eq!(
        (calls.messages.held(), calls.calls.held()),
        (0, 0),
        "all is given back"
    );
}

#[tokio::test]
async fn a_call_that_asks_for_little_may_say_little() {
    let calls = calls();
    for method in [
        "ConfigureTenant",
        "StopSandbox",
        "GetHost",
        "Watch",
        "Logs",
        "NoSuchMethod",
    ] {
        let (held, refused) = flood(&calls, &tenant("hostile"), method, 4, 1 << 20).await;
        assert!(held <= 4 * MAX_QUESTION, "{method}: {held}");
        let codes: Vec<_> = refused.iter().map(Status::code).collect();
        assert_eq!(codes, [tonic::Code::OutOfRange; 4], "{method}");
    }
}

#[tokio::test]
async fn a_tenant_whose_messages_fill_its_share_keeps_nobody_else_out() {
    let calls = calls();
    let bodies: Vec<_> = (0..200)
        .map(|_| request("StartSandbox", &tenant("hostile"), unfinished(1 << 20)))
        .filter_map(|request| calls.admit(request).ok())
        .map(http::Request::into_body)
        .collect();
    let mut held = vec![];
    for mut body in bodies {
        while let Poll::Ready(Some(Ok(_))) = futures::poll!(std::pin::pin!(body.frame())) {}
        held.push(body);
    }
    let (read, refused) = flood(&calls, &tenant("honest"), "StartSandbox", 20, 1 << 20).await;
    assert_eq!((read, refused.len()), (20 << 20, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_grants_goes_on_for_as_long_as_each_of_them_is_short() {
    let calls = calls();
    let grants = 2 * PATIENCE.as_secs();
    let message = |length: usize, sent: usize| {
        let mut message = vec![0];
        message.extend((length as u32).to_be_bytes());
        message.resize(5 + sent, 0);
        Ok::<_, Status>(hyper::body::Frame::data(Bytes::from(message)))
    };
    let each_second = futures::stream::unfold(0, move |number| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let next = match number < grants {
            true => message(40, 40),
            false => message(MAX_QUESTION + 1, 0),
        };
        Some((next, number + 1))
    });
    let body = Body::new(http_body_util::StreamBody::new(Box::pin(each_second)));
    let request = calls.admit(request("Grant", &tenant("t"), body)).unwrap();
    assert_eq!((calls.grants.held(), calls.calls.held()), (1, 0));
    let mut body = request.into_body();
    for _ in 0..grants {
        body.frame().await.unwrap().unwrap();
    }
    let status = body.frame().await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange);
}
