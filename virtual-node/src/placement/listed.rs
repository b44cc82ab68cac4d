//! The placer over hosts that the configuration lists: its task, around the pure
//! [`table`](super::table).

use std::{collections::BTreeMap, time::Duration};

use pool_agent_api::PodUid;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::debug;

use super::{
    Claimed, Request, Waiting,
    board::Board,
    table::{Answer, Table},
};
use crate::pool::HostTable;

/// How soon a host that refused a pod is tried again.
const RETRY: Duration = Duration::from_secs(2);

pub(super) struct Task {
    table: Table,
    waiting: BTreeMap<PodUid, oneshot::Sender<Claimed>>,
    board: Board,
}

impl Task {
    pub(super) fn new(board: Board) -> Self {
        Self {
            table: Table::default(),
            waiting: BTreeMap::new(),
            board,
        }
    }

    pub(super) async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut hosts: watch::Receiver<HostTable>,
    ) {
        self.table.set_hosts(&hosts.borrow_and_update());
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = retry.tick(), if !self.waiting.is_empty() => {
                    let answers = self.table.retry();
                    self.answer(answers);
                }
                request = requests.recv() => match request {
                    Some(request) => self.take(request),
                    None => return,
                },
                changed = hosts.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let answers = self.table.set_hosts(&hosts.borrow_and_update());
                    self.answer(answers);
                }
            }
        }
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Expect { pods } => self.board.expect(pods),
            Request::Claim {
                pod,
                ask,
                answer,
                waiting,
                ..
            } => {
                self.board.publish(&pod, None);
                waiting.send_replace(Some(Waiting::for_room()));
                self.waiting.insert(pod.clone(), answer);
                let answers = self.table.claim(pod.clone(), *ask);
                self.answer(answers);
                self.board.tells(pod);
            }
            Request::Hold {
                pod,
                ask,
                placement,
                published,
            } => {
                self.waiting.remove(&pod);
                let answers = self.table.hold(pod.clone(), *ask, placement.host.clone());
                self.board.publish(&pod, Some(placement));
                // The driver may have ended meanwhile.
                let _gone = published.send(()).is_err();
                self.answer(answers);
                self.board.tells(pod);
            }
            Request::Refused { pod, host } => {
                self.board.publish(&pod, None);
                let answers = self.table.refused(&pod, host);
                self.answer(answers);
            }
            // What is left of it takes no room.
            Request::Leave { pod, .. } | Request::Release { pod } => {
                self.waiting.remove(&pod);
                self.board.publish(&pod, None);
                let answers = self.table.release(&pod);
                self.answer(answers);
                self.board.tells(pod);
            }
        }
    }

    fn answer(&mut self, answers: Vec<(PodUid, Answer)>) {
        for (pod, answer) in answers {
            let Some(waiting) = self.waiting.remove(&pod) else {
                continue;
            };
            let answered = match answer {
                Answer::Room(host) => {
                    debug!(pod.uid = %pod, host = %host, "room claimed");
                    waiting.send(Claimed::Room(host))
                }
                Answer::Never(shortage) => waiting.send(Claimed::Never(shortage)),
            };
            // The driver changed its mind; it releases what it may hold.
            drop(answered);
        }
    }
}
