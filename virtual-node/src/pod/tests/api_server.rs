//! An API server that exists only here: objects, versions, watches and the
//! preconditions that this node relies on; and whatever can go wrong with a request.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::{Client, client::Body};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::world::Journal;

/// What becomes of a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fate {
    /// Refused, without effect.
    Status(u16),
    /// No answer for ever, without effect.
    Unanswered,
    /// It takes effect, and the answer is lost.
    AnswerLost,
    /// Somebody else writes the object just before.
    Overtaken,
}

struct Fault {
    method: Method,
    path: String,
    fate: Fate,
    times: usize,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By path, e.g. `/api/v1/namespaces/shop/pods/web`.
    objects: BTreeMap<String, Value>,
    /// Changes of pods, each with its version.
    changes: Vec<(u64, &'static str, Value)>,
    /// A watch from before this version cannot be answered any more.
    oldest: u64,
    faults: Vec<Fault>,
    /// Bodies of PATCHes of pods' statuses that were tried.
    patches: Vec<Value>,
    /// Reasons of events.
    events: Vec<String>,
}

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct ApiServer {
    state: Arc<Mutex<State>>,
    journal: Journal,
    /// Watches that are open begin anew when this changes.
    cuts: watch::Sender<u64>,
}

type Answer = Result<Value, StatusCode>;
type AnyBody = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Debug, thiserror::Error)]
#[error("the connection broke")]
struct Broken;

impl ApiServer {
    pub(super) fn new(journal: Journal) -> Self {
        Self {
            state: Arc::default(),
            journal,
            cuts: watch::Sender::new(0),
        }
    }

    pub(super) fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { server.serve(request).await }
        });
        Client::new(service, "default")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- what tests do

    pub(super) fn put(&self, path: &str, object: Value) {
        self.state().put(path, object);
        self.journal.stir();
    }

    /// The names of what is in a collection.
    pub(super) fn names(&self, collection: &str) -> Vec<String> {
        let state = self.state();
        let inside = format!("{collection}/");
        let paths = state.objects.keys();
        paths
            .filter_map(|path| path.strip_prefix(&inside))
            .map(str::to_owned)
            .collect()
    }

    pub(super) fn get(&self, path: &str) -> Option<Value> {
        self.state().objects.get(path).cloned()
    }

    /// As `kubectl delete`.
    pub(super) fn delete_pod(&self, path: &str, grace: i64) {
        let mut pod = self.get(path).unwrap();
        pod["metadata"]["deletionTimestamp"] = json!("2026-11-01T00:00:00Z");
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        self.put(path, pod);
    }

    /// As `kubectl delete --force`.
    pub(super) fn remove(&self, path: &str) {
        self.state().remove(path);
        self.journal.stir();
    }

    /// Open watches end, and what happened before now can only be listed.
    pub(super) fn compact(&self) {
        let mut state = self.state();
        state.version += 1;
        state.oldest = state.version;
        drop(state);
        self.cuts.send_modify(|cut| *cut += 1);
        self.journal.stir();
    }

    /// The next `times` requests of that method whose path ends so.
    pub(super) fn fault(&self, method: Method, path: &str, fate: Fate, times: usize) {
        self.state().faults.push(Fault {
            method,
            path: path.to_owned(),
            fate,
            times,
        });
    }

    pub(super) fn mend(&self) {
        self.state().faults.clear();
    }

    pub(super) fn patches(&self) -> Vec<Value> {
        self.state().patches.clone()
    }

    pub(super) fn events(&self) -> Vec<String> {
        self.state().events.clone()
    }

    // ---- requests

    async fn serve(&self, request: Request<Body>) -> Result<Response<AnyBody>, Broken> {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let fate = self.state().fate(&head.method, &path);
        let plain = matches!(fate, None | Some(Fate::Overtaken | Fate::AnswerLost));
        if path.ends_with("/pods") && query.contains("watch=true") && plain {
            return Ok(self.watch(&query));
        }
        if head.method != Method::GET {
            self.journal
                .note(format!("{} {}", head.method, path.trim_start_matches("/api/v1/")));
        }
        let answer = match fate {
            Some(Fate::Unanswered) => std::future::pending().await,
            Some(Fate::Status(code)) => Err(StatusCode::from_u16(code).unwrap()),
            Some(Fate::Overtaken) => {
                self.state().touch(path.trim_end_matches("/status"));
                self.state().handle(&head.method, &path, body)
            }
            Some(Fate::AnswerLost) | None => self.state().handle(&head.method, &path, body),
        };
        self.journal.stir();
        if let Some(Fate::AnswerLost) = fate {
            return Err(Broken);
        }
        let (code, answer) = match answer {
            Ok(object) => (StatusCode::OK, object),
            Err(code) => {
                let mut status = failure(code);
                if head.method == Method::POST && code == StatusCode::CONFLICT {
                    status["reason"] = json!("AlreadyExists");
                }
                (code, status)
            }
        };
        let body = Full::new(Bytes::from(answer.to_string()));
        Ok(Response::builder()
            .status(code)
            .body(body.boxed_unsync())
            .unwrap())
    }

    fn watch(&self, query: &str) -> Response<AnyBody> {
        let from: u64 = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resourceVersion="))
            .and_then(|version| version.parse().ok())
            .unwrap_or(0);
        let frames = self
            .changes(from)
            .map(|change| Ok(Frame::data(Bytes::from(format!("{change}\n")))));
        Response::new(StreamBody::new(frames).boxed_unsync())
    }

    fn changes(&self, from: u64) -> impl Stream<Item = Value> + Send + 'static {
        let server = self.clone();
        let (cuts, stirred) = (self.cuts.subscribe(), self.journal.subscribe());
        stream::unfold(from, move |at| {
            let (server, mut cuts, mut stirred) = (server.clone(), cuts.clone(), stirred.clone());
            async move {
                loop {
                    stirred.borrow_and_update();
                    if let Some(next) = server.state().change_after(at) {
                        return Some(next);
                    }
                    tokio::select! {
                        _ = cuts.changed() => return None,
                        changed = stirred.changed() => changed.ok()?,
                    }
                }
            }
        })
    }
}

impl State {
    fn fate(&mut self, method: &Method, path: &str) -> Option<Fate> {
        let fault = self
            .faults
            .iter_mut()
            .find(|f| f.times > 0 && f.method == *method && path.ends_with(&f.path))?;
        fault.times -= 1;
        Some(fault.fate)
    }

    fn put(&mut self, path: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let kind = match self.objects.insert(path.to_owned(), object.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        self.changed(path, kind, object);
    }

    fn remove(&mut self, path: &str) -> Option<Value> {
        let object = self.objects.remove(path)?;
        self.version += 1;
        self.changed(path, "DELETED", object.clone());
        Some(object)
    }

    fn changed(&mut self, path: &str, kind: &'static str, mut object: Value) {
        if path.contains("/pods/") {
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.changes.push((self.version, kind, object));
        }
    }

    /// Somebody else changes something that is not ours.
    fn touch(&mut self, path: &str) {
        if let Some(mut object) = self.objects.get(path).cloned() {
            object["metadata"]["annotations"] = json!({"touched": self.version.to_string()});
            self.put(path, object);
        }
    }

    fn change_after(&self, at: u64) -> Option<(Value, u64)> {
        if at < self.oldest {
            let gone = json!({"type": "ERROR", "object": failure(StatusCode::GONE)});
            return Some((gone, self.oldest));
        }
        let (version, kind, object) = self.changes.iter().find(|(version, _, _)| *version > at)?;
        Some((json!({"type": kind, "object": object}), *version))
    }

    fn handle(&mut self, method: &Method, path: &str, body: Value) -> Answer {
        match *method {
            Method::GET if is_collection(path) => Ok(self.list(path)),
            Method::GET => self.objects.get(path).cloned().ok_or(StatusCode::NOT_FOUND),
            Method::POST if path.ends_with("/token") => Ok(json!({
                "metadata": {}, "spec": {"audiences": []},
                "status": {"token": "a token", "expirationTimestamp": "2126-01-01T00:00:00Z"},
            })),
            Method::POST if path.ends_with("/events") => {
                let reason = body["reason"].as_str().unwrap_or_default().to_owned();
                self.events.push(reason);
                Ok(body)
            }
            Method::POST if path.ends_with("/pods") => {
                let name = body["metadata"]["name"].as_str().unwrap_or_default();
                let at = format!("{path}/{name}");
                if self.objects.contains_key(&at) {
                    return Err(StatusCode::CONFLICT);
                }
                let mut object = body.clone();
                object["metadata"]["uid"] = json!(format!("made-{}", self.version));
                self.put(&at, object);
                Ok(self.objects[&at].clone())
            }
            Method::PATCH if path.ends_with("/status") => {
                self.patches.push(body.clone());
                self.patch_status(path.trim_end_matches("/status"), &body)
            }
            Method::PATCH => Ok(json!({"metadata": {}, "involvedObject": {}})),
            Method::DELETE => {
                let object = self.objects.get(path).ok_or(StatusCode::NOT_FOUND)?;
                precondition(&body["preconditions"], object)?;
                self.remove(path).ok_or(StatusCode::NOT_FOUND)
            }
            _ => Err(StatusCode::METHOD_NOT_ALLOWED),
        }
    }

    fn list(&self, path: &str) -> Value {
        let (prefix, kind) = path.rsplit_once('/').unwrap();
        let of = |object_path: &&String| {
            let rest = object_path.strip_prefix(prefix);
            // All namespaces, or one.
            rest.is_some_and(|rest| rest.contains(&format!("/{kind}/")))
        };
        let items: Vec<&Value> = self
            .objects
            .iter()
            .filter(|(path, _)| of(path))
            .map(|(_, o)| o)
            .collect();
        json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": items})
    }

    fn patch_status(&mut self, path: &str, patch: &Value) -> Answer {
        let mut object = self.objects.get(path).cloned().ok_or(StatusCode::NOT_FOUND)?;
        precondition(&patch["metadata"], &object)?;
        let before = object.clone();
        if !object["status"].is_object() {
            object["status"] = json!({});
        }
        let status = object["status"].as_object_mut().unwrap();
        for (field, new) in patch["status"].as_object().into_iter().flatten() {
            match field.as_str() {
                "conditions" => merge(status, field, "type", new),
                "podIPs" | "hostIPs" => merge(status, field, "ip", new),
                _ if new.is_null() => drop(status.remove(field)),
                _ => drop(status.insert(field.clone(), new.clone())),
            }
        }
        if object != before {
            self.put(path, object);
        }
        Ok(self.objects[path].clone())
    }
}

/// `.../services`, not `.../services/web`.
fn is_collection(path: &str) -> bool {
    let parts = path.trim_start_matches("/api/v1/").split('/').count();
    path.starts_with("/api/v1/") && parts % 2 == 1
}

fn precondition(wanted: &Value, object: &Value) -> Result<(), StatusCode> {
    for field in ["uid", "resourceVersion"] {
        if !wanted[field].is_null() && wanted[field] != object["metadata"][field] {
            return Err(StatusCode::CONFLICT);
        }
    }
    Ok(())
}

/// A list that is merged by a key, as strategic merge patches have it.
fn merge(status: &mut Map<String, Value>, field: &str, key: &str, changes: &Value) {
    let list = status.entry(field).or_insert_with(|| json!([]));
    let list = list.as_array_mut().unwrap();
    for change in changes.as_array().into_iter().flatten() {
        let at = list.iter().position(|element| element[key] == change[key]);
        if change["$patch"] == "delete" {
            if let Some(at) = at {
                list.remove(at);
            }
            continue;
        }
        let mut element = at.map_or(json!({}), |at| list[at].clone());
        for (name, value) in change.as_object().unwrap() {
            if value.is_null() {
                element.as_object_mut().unwrap().remove(name);
            } else {
                element[name] = value.clone();
            }
        }
        match at {
            Some(at) => list[at] = element,
            None => list.push(element),
        }
    }
}

fn failure(code: StatusCode) -> Value {
    let reason = match code {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::CONFLICT => "Conflict",
        StatusCode::GONE => "Expired",
        _ => "",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code.as_u16(), "reason": reason, "message": "as the test has it",
    })
}
