//! x

use crate::lab::Lab;

#[tokio::test(flavor = "multi_thread")]
async fn attaching_is_quick() {
    let mut lab = Lab::new();
    let (router, _proxy) = lab.open().await;
    let mut times = Vec::new();
    for number in 2..42 {
        let pod = lab.pod(number);
        let start = std::time::Instant::now();
        router.attach(pod.enrolled()).await.unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "attach: p50 {:?}, p99 {:?}",
        times[times.len() / 2],
        times[times.len() - 1]
    );
}
