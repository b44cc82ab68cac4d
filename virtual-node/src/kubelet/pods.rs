//! `/pods` and `/runningpods/`: what this node has.

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::Context;
use crate::pod::Found;

pub(super) async fn pods(State(context): State<Context>) -> Json<Value> {
    Json(list(context.directory.all().await))
}

/// Those of which something runs.
pub(super) async fn running(State(context): State<Context>) -> Json<Value> {
    use pool_agent_api::status::ContainerState::Running;
    let mut found = context.directory.all().await;
    found.retain(|f| {
        f.sandbox.as_ref().is_some_and(|(_, status)| {
            let all = status.init_containers.iter().chain(&status.containers);
            all.into_iter().any(|c| matches!(c.state, Running { .. }))
        })
    });
    Json(list(found))
}

fn list(found: Vec<Found>) -> Value {
    let items: Vec<_> = found.iter().map(|f| &*f.pod).collect();
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
}
