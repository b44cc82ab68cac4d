//! The contract over HTTP: each request is parsed here and decided by the owner.

use std::io;

use axum::{
    Json, Router,
    extract::{Path, Query, State, rejection::JsonRejection},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};

use super::{
    Request,
    contract::{Class, Code, Instance, Order, Refusal},
};

type Owner = State<mpsc::Sender<Request>>;

pub(super) async fn serve(listener: UnixListener, owner: mpsc::Sender<Request>) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/shapes", post(shapes))
        .route("/v1/instances", get(list))
        .route("/v1/instances/{name}", get(one).put(create).delete(delete))
        .with_state(owner);
    axum::serve(listener, router).await
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.code.status(), Json(self)).into_response()
    }
}

/// The owner's answer; it is busy or gone if there is none.
async fn ask<T>(
    owner: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, Refusal> {
    let (reply, answer) = oneshot::channel();
    owner
        .try_send(request(reply))
        .map_err(|_| Code::Unavailable.because("too much is asked at once"))?;
    answer
        .await
        .map_err(|_| Code::Unavailable.because("the driver ends"))
}

fn parsed<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Refusal> {
    body.map(|Json(body)| body)
        .map_err(|error| Code::Invalid.because(error.body_text()))
}

/// A lab's shapes are the same for every class.
async fn shapes(State(owner): Owner, class: Result<Json<Class>, JsonRejection>) -> Result<Response, Refusal> {
    parsed(class)?;
    let shapes = ask(&owner, Request::Shapes).await?;
    Ok(Json(json!({ "shapes": shapes })).into_response())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    provider_id: Option<String>,
}

async fn list(State(owner): Owner, Query(filter): Query<Filter>) -> Result<Response, Refusal> {
    let mut instances = ask(&owner, Request::List).await?;
    if let Some(id) = filter.provider_id {
        instances.retain(|instance| instance.provider_id == id);
    }
    Ok(Json(json!({ "instances": instances })).into_response())
}

async fn one(State(owner): Owner, Path(name): Path<String>) -> Result<Json<Instance>, Refusal> {
    let instances = ask(&owner, Request::List).await?;
    let found = instances.into_iter().find(|instance| instance.name == name);
    found
        .map(Json)
        .ok_or_else(|| Code::NotFound.because(format_args!("there is no {name}")))
}

async fn create(
    State(owner): Owner,
    Path(name): Path<String>,
    order: Result<Json<Order>, JsonRejection>,
) -> Result<Json<Instance>, Refusal> {
    let order = parsed(order)?;
    ask(&owner, |reply| Request::Create(name, Box::new(order), reply))
        .await?
        .map(Json)
}

async fn delete(State(owner): Owner, Path(name): Path<String>) -> Result<Response, Refusal> {
    let going = ask(&owner, |reply| Request::Delete(name, reply)).await??;
    Ok((StatusCode::ACCEPTED, Json(going)).into_response())
}
