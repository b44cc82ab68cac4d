//! The live connections of one pod, so that they can be ended from outside:
//! when a policy no longer allows them, or when the pod goes.
//!
//! A connection's task is wrapped once and costs nothing while nobody ends it.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use futures::future::{AbortHandle, AbortRegistration, Abortable};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::pods::LocalPod;
use crate::policy::Facts;

#[derive(Default)]
pub(crate) struct Live {
    table: Mutex<Table>,
    tasks: TaskTracker,
    /// Set when the pod goes: no new connections, and tunnels tell their peers.
    closing: CancellationToken,
}

#[derive(Default)]
struct Table {
    /// No connection is taken any more.
    closed: bool,
    next: u64,
    open: HashMap<u64, (AbortHandle, Subject)>,
}

/// What a connection's task says of itself once it knows.
#[derive(Clone, Default)]
pub(crate) struct Subject(Arc<ArcSwapOption<(Arc<LocalPod>, Facts)>>);

impl Subject {
    /// From now on the connection to `server`, a pod of this host, is decided
    /// upon anew when policies change. To be called before the first decision,
    /// so that no change falls in between.
    pub(crate) fn set(&self, server: Arc<LocalPod>, facts: Facts) {
        self.0.store(Some(Arc::new((server, facts))));
    }

    /// The connection will go elsewhere.
    pub(crate) fn clear(&self) {
        self.0.store(None);
    }
}

struct Registered {
    live: Arc<Live>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let open = &mut self.live.table().open;
        open.remove(&self.id);
        // A map keeps the room of its best days.
        if open.capacity() > 1024 && open.len() < open.capacity() / 8 {
            open.shrink_to_fit();
        }
    }
}

impl Live {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that can panic runs under it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a connection. False if the pod is going, and it was not started.
    pub(crate) fn spawn<F>(self: &Arc<Self>, connection: impl FnOnce(Subject) -> F + Send + 'static) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let subject = Subject::default();
        let (handle, registration) = AbortHandle::new_pair();
        let mut table = self.table();
        if table.closed {
            return false;
        }
        table.next += 1;
        let id = table.next;
        table.open.insert(id, (handle, subject.clone()));
        let registered = Registered {
            live: self.clone(),
            id,
        };
        // Under the lock, so that closing waits for all that were taken.
        self.tasks
            .spawn(run(registered, subject, registration, connection));
        true
    }

    /// Ends the connections to pods of this host that are not `allowed` any
    /// more; how many.
    pub(crate) fn cut_unless(&self, allowed: impl Fn(&Arc<LocalPod>, &Facts) -> bool) -> usize {
        let known: Vec<(AbortHandle, Subject)> = self.table().open.values().cloned().collect();
        let refused: Vec<AbortHandle> = known
            .into_iter()
            .filter(|(_, subject)| {
                let told = subject.0.load();
                told.as_ref().is_some_and(|told| !allowed(&told.0, &told.1))
            })
            .map(|(handle, _)| handle)
            .collect();
        for handle in &refused {
            handle.abort();
        }
        refused.len()
    }

    pub(crate) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Takes no more, waits for those that live, and ends what is left after
    /// `drain`.
    pub(crate) async fn close(&self, drain: Duration) {
        self.refuse();
        if tokio::time::timeout(drain, self.tasks.wait()).await.is_err() {
            self.cut();
            self.tasks.wait().await;
        }
    }

    /// Takes no more, and ends all.
    pub(crate) fn cut(&self) {
        self.refuse();
        let left: Vec<AbortHandle> = self.table().open.values().map(|(h, _)| h.clone()).collect();
        for handle in left {
            handle.abort();
        }
    }

    fn refuse(&self) {
        self.table().closed = true;
        self.closing.cancel();
        self.tasks.close();
    }
}

async fn run<F: Future<Output = ()>>(
    registered: Registered,
    subject: Subject,
    registration: AbortRegistration,
    connection: impl FnOnce(Subject) -> F,
) {
    // Whoever aborted it knows; what it held tells of itself when dropped.
    let _ended = Abortable::new(connection(subject), registration).await;
    drop(registered);
}
