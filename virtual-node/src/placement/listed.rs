//! The placer over hosts that the configuration lists: its task, around the pure
//! [`table`](super::table) and what is [`admitted`](super::admitted) to it.

use std::{collections::BTreeMap, time::Duration};

use pool_agent_api::{PodUid, Resources};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::debug;

use super::{
    Ask, Claimed, Request, Seat, Shortage, Waiting,
    admitted::Admitted,
    board::Board,
    table::{Answer, Table},
};
use crate::pool::HostTable;

/// How soon a host that refused a pod is tried again.
const RETRY: Duration = Duration::from_secs(2);

pub(super) struct Task {
    admitted: Admitted,
    /// Claims that wait to be admitted.
    admitting: BTreeMap<PodUid, Ask>,
    table: Table,
    waiting: BTreeMap<PodUid, oneshot::Sender<Claimed>>,
    board: Board,
}

impl Task {
    pub(super) fn new(board: Board, quota: Option<Resources>) -> Self {
        Self {
            admitted: Admitted::new(quota),
            admitting: BTreeMap::new(),
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
            Request::Expect { pods } => {
                self.board.expect(pods);
                self.admit_when_complete();
            }
            // Never asked for here: a listed host gives nothing up. Whoever asks is told
            // that nobody answers.
            Request::Claim {
                seat: Seat::Beside, ..
            } => {}
            Request::Claim {
                pod,
                ask,
                arrival,
                answer,
                waiting,
                ..
            } => {
                self.board.publish(&pod, None);
                waiting.send_replace(Some(Waiting::for_room()));
                self.waiting.insert(pod.clone(), answer);
                let answer = self.admitted.claim(&pod, ask.claim, arrival);
                self.admitting.insert(pod.clone(), *ask);
                if let Some(answer) = answer {
                    self.admit(pod.clone(), answer);
                }
                self.tells(pod);
            }
            Request::Hold {
                pod,
                seat: Seat::Beside,
                placement,
                published,
                ..
            } => {
                self.board.publish_beside(&pod, Some(placement));
                let _gone = published.send(()).is_err();
            }
            Request::Exchange {
                pod,
                ask,
                placement,
                beside,
                published,
            } => {
                let answers = self.table.hold(pod.clone(), *ask, placement.host.clone());
                self.board.publish_both(&pod, Some(placement), Some(beside));
                let _gone = published.send(()).is_err();
                self.answer(answers);
            }
            Request::Hold {
                pod,
                ask,
                placement,
                published,
                ..
            } => {
                self.waiting.remove(&pod);
                self.admitting.remove(&pod);
                self.admitted.count(&pod, ask.claim);
                let answers = self.table.hold(pod.clone(), *ask, placement.host.clone());
                self.board.publish(&pod, Some(placement));
                // The driver may have ended meanwhile.
                let _gone = published.send(()).is_err();
                self.answer(answers);
                self.tells(pod);
            }
            Request::Refused { pod, host } => {
                self.board.publish(&pod, None);
                let answers = self.table.refused(&pod, host);
                self.answer(answers);
            }
            Request::Finished { pod } => self.admitted.finish(&pod),
            // Nobody says of a listed host that it is over, but who takes it off the list.
            Request::GiveUp { .. } => {}
            // What is left of it takes no room.
            Request::Release {
                pod,
                seat: Seat::Beside,
            } => self.board.publish_beside(&pod, None),
            Request::Leave { pod, .. } | Request::Release { pod, .. } => {
                self.waiting.remove(&pod);
                self.admitting.remove(&pod);
                self.admitted.release(&pod);
                self.board.publish(&pod, None);
                let answers = self.table.release(&pod);
                self.answer(answers);
                self.tells(pod);
            }
        }
    }

    fn tells(&mut self, pod: PodUid) {
        self.board.tells(pod);
        self.admit_when_complete();
    }

    /// Once all that is on record is counted, what came meanwhile is answered.
    fn admit_when_complete(&mut self) {
        if !self.board.is_complete() {
            return;
        }
        for (pod, answer) in self.admitted.open() {
            self.admit(pod, answer);
        }
    }

    /// An admitted pod gets room as soon as there is some.
    fn admit(&mut self, pod: PodUid, admitted: Result<(), Shortage>) {
        let Some(ask) = self.admitting.remove(&pod) else {
            return;
        };
        let answers = match admitted {
            Ok(()) => self.table.claim(pod, ask),
            Err(shortage) => vec![(pod, Answer::Never(shortage))],
        };
        self.answer(answers);
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
