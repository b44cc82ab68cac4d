//! Names that probes and hooks dial, looked up as the host itself would look
//! them up, as a kubelet does. Called by [`super::dial`].
//!
//! What always holds: at most [`LOOKUPS`] look-ups take a thread, also those whose
//! probe has given up, and of them a pod and a tenant have a share; whoever has used
//! it up waits within its own probe's time. What was found is asked again only after
//! [`FRESH`].

use std::{
    collections::HashMap,
    net::{IpAddr, ToSocketAddrs},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bounds::{Budget, Level, Path, Place, Rule, Shared, Step};
use pool_agent_api::{SandboxKey, TenantId};
use tokio::time::Instant;

use super::Dialler;

/// The system's resolver blocks, for tens of seconds if no server answers.
const LOOKUPS: u32 = 32;
/// Of them for one pod: a probe whose name is not answered, and another whose is.
const OF_A_POD: u32 = 2;
const OF_A_TENANT: u32 = 8;
/// How long an answer is good for. Probes come every few seconds.
const FRESH: Duration = Duration::from_secs(5);
/// Answers that are kept.
const KEPT: usize = 1024;
/// How soon whoever waits for its share looks again.
const AGAIN: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Account {
    Tenant(TenantId),
    Pod(SandboxKey),
}

type Answer = Result<IpAddr, String>;
/// What answers a name.
type Resolver = fn(&str) -> Answer;

/// What look-ups share.
struct Lookups {
    shares: Shared<Account>,
    resolver: Resolver,
    known: Mutex<HashMap<String, (Instant, Answer)>>,
}

static LOOKED_UP: LazyLock<Arc<Lookups>> = LazyLock::new(|| Arc::new(Lookups::new(system)));

/// The address that stands for `host`; of several an IPv4 one, which a tenant's
/// router can reach.
pub(super) async fn address(host: &str, of: &Dialler) -> Answer {
    if let Ok(address) = host.parse() {
        return Ok(address);
    }
    let found = LOOKED_UP.find(host, of).await;
    found.map_err(|problem| format!("lookup {host}: {problem}"))
}

/// Blocks.
fn system(host: &str) -> Answer {
    let found = (host, 0).to_socket_addrs().map_err(|e| e.to_string())?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let of_choice = addresses.iter().find(|address| address.is_ipv4());
    of_choice
        .or(addresses.first())
        .copied()
        .ok_or_else(|| "it has no address".to_owned())
}

impl Lookups {
    fn new(resolver: Resolver) -> Self {
        Self {
            shares: Shared::new(Budget::new(LOOKUPS, 0)),
            resolver,
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, (Instant, Answer)>> {
        // Nothing that can panic runs under it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn find(self: &Arc<Self>, host: &str, of: &Dialler) -> Answer {
        let place = loop {
            if let Some((at, answer)) = self.known().get(host)
                && at.elapsed() < FRESH
            {
                return answer.clone();
            }
            match self.take(of) {
                Ok(place) => break place,
                // Its probe's time ends the wait.
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        let (this, name) = (self.clone(), host.to_owned());
        let looked_up = tokio::task::spawn_blocking(move || {
            let answer = (this.resolver)(&name);
            this.keep(name, answer.clone());
            // Not before: a look-up goes on when nobody waits for it any more.
            drop(place);
            answer
        });
        looked_up.await.map_err(|e| e.to_string())?
    }

    fn take(&self, of: &Dialler) -> Result<Place<Account>, Level> {
        let step = |key, level, limit| Step {
            key,
            level,
            rule: Rule { limit, ..Rule::FAIR },
        };
        self.shares.take(Path {
            trunk: Arc::from([
                step(Account::Tenant(of.tenant.clone()), Level::Tenant, OF_A_TENANT),
                step(Account::Pod(of.key.clone()), Level::Pod, OF_A_POD),
            ]),
            leaf: None,
        })
    }

    fn keep(&self, name: String, answer: Answer) {
        let now = Instant::now();
        let mut known = self.known();
        if known.len() >= KEPT {
            known.retain(|_, (at, _)| now.saturating_duration_since(*at) < FRESH);
        }
        if known.len() < KEPT {
            known.insert(name, (now, answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        sync::{Condvar, atomic::AtomicUsize, atomic::Ordering},
    };

    use super::*;

    fn dialler(tenant: &str, pod: &str) -> Dialler {
        Dialler {
            tenant: tenant.parse().unwrap(),
            key: SandboxKey {
                pod: pod.parse().unwrap(),
                attempt: pool_agent_api::Attempt::FIRST,
            },
        }
    }

    #[tokio::test]
    async fn a_name_of_the_hosts_own_is_looked_up_and_an_address_is_taken_as_it_is() {
        let of = dialler("demo", "p");
        assert_eq!(address("localhost", &of).await, Ok(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(
            address("10.1.2.3", &of).await,
            Ok(Ipv4Addr::new(10, 1, 2, 3).into())
        );
    }

    #[tokio::test]
    async fn a_name_that_nobody_has_is_told_with_the_reason() {
        // Longer than any name: no server has to be asked.
        let name = "x".repeat(300);
        let error = address(&name, &dialler("demo", "p")).await.unwrap_err();
        assert!(error.starts_with(&format!("lookup {name}: ")), "{error}");
    }

    /// Names that begin with `silent` are not answered while this is false.
    static LET_GO: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
    static ASKED: AtomicUsize = AtomicUsize::new(0);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_tenant_whose_names_are_never_answered_keeps_nobody_else_waiting() {
        let lookups = Arc::new(Lookups::new(|name| {
            ASKED.fetch_add(1, Ordering::SeqCst);
            if name.starts_with("silent") {
                let held = LET_GO.0.lock().unwrap();
                drop(LET_GO.1.wait_while(held, |let_go| !*let_go).unwrap());
            }
            Ok(Ipv4Addr::LOCALHOST.into())
        }));
        // Probes that gave up: their look-ups go on.
        let probes: Vec<_> = (0..200)
            .map(|n| {
                let lookups = lookups.clone();
                let of = dialler("hostile", &format!("p{}", n % 50));
                let name = format!("silent{n}");
                tokio::spawn(async move {
                    let found = lookups.find(&name, &of);
                    tokio::time::timeout(Duration::from_millis(200), found)
                        .await
                        .is_err()
                })
            })
            .collect();
        for probe in probes {
            assert!(probe.await.unwrap(), "it was answered");
        }
        let held = lookups.shares.held();
        let honest = dialler("honest", "q");
        let found = tokio::time::timeout(Duration::from_secs(20), lookups.find("honest", &honest)).await;
        // And not again for each probe.
        let asked = ASKED.load(Ordering::SeqCst);
        let again = lookups.find("honest", &honest).await;
        let asked_again = ASKED.load(Ordering::SeqCst) - asked;
        *LET_GO.0.lock().unwrap() = true;
        LET_GO.1.notify_all();
        assert_eq!(held, OF_A_TENANT);
        assert_eq!(found.expect("it waited"), Ok(Ipv4Addr::LOCALHOST.into()));
        assert_eq!((again.is_ok(), asked_again), (true, 0));
    }
}
