//! The HTTPS API of a kubelet, which the API server calls for logs, exec,
//! attach, port-forward and stats, and metrics-server for usage.
//!
//! Started by `process`. A request is authenticated ([`authenticate`]),
//! authorised ([`authorize`]) and then served from the pods' [`Directory`] and
//! the pool; nothing is kept here.
//!
//! ```text
//!  API server ──TLS──▶ authenticate ▸ authorize ▸ route ──▶ logs, stream, stats ──▶ the pod's host
//! ```
//!
//! What always holds:
//! - nobody is anonymous: without a certificate of the client CA or a token that
//!   the API server vouches for, the answer is 401;
//! - what runs a command or opens a stream asks for `create`, also where the
//!   method is GET (a WebSocket), so that a right to read is no right to run;
//! - a review that fails is a refusal;
//! - who holds connections without saying who he is keeps out nobody who says it.

mod attributes;
mod authenticate;
mod authorize;
mod doorway;
mod logs;
mod pods;
mod review_cache;
mod serving;
mod stats;
mod stream;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use bounds::{Bounds, Seldom};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use kube::Client;
use rustls_pki_types::CertificateDer;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::{
    incoming::{Arrived, Incoming},
    pod::{Directory, Found},
    pool::{CallError, HostClient, Pool},
};
use authenticate::Authenticator;
use authorize::Authorizer;
use doorway::{Doorway, Standing};
pub(crate) use serving::{
    Authority as ClientAuthority, Certificate, ServingError, check as check_clients, request,
};

/// A client that has not finished its handshake by then is hung up on.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// And one that has not sent its request's head.
const HEAD: Duration = Duration::from_secs(30);
#[derive(Debug, thiserror::Error)]
pub(crate) enum KubeletError {
    #[error("cannot read the kubelet API's certificates")]
    Serving(#[from] ServingError),
}

/// What handlers reach.
#[derive(Clone)]
struct Context {
    node_name: Arc<str>,
    directory: Directory,
    pool: Pool,
}

/// What every request passes first.
#[derive(Clone)]
struct Gate {
    authenticator: Authenticator,
    authorizer: Authorizer,
}

/// Who is served, and by what.
pub(crate) struct Kubelet {
    pub(crate) incoming: Incoming,
    pub(crate) clients: ClientAuthority,
    pub(crate) certificate: Certificate,
    pub(crate) node_name: String,
    pub(crate) address: std::net::IpAddr,
    pub(crate) client: Client,
    pub(crate) directory: Directory,
    pub(crate) pool: Pool,
    pub(crate) shown: Bounds,
}

impl Kubelet {
    /// Serves until `shutdown`. Streams that are open then are cut.
    pub(crate) async fn serve(mut self, shutdown: CancellationToken) -> Result<(), KubeletError> {
        let tls = serving::start(
            &self.clients,
            self.certificate,
            &self.node_name,
            self.address,
            self.client.clone(),
            &shutdown,
        )?;
        let context = Context {
            node_name: self.node_name.as_str().into(),
            directory: self.directory,
            pool: self.pool,
        };
        let gate = Gate {
            authenticator: Authenticator::new(self.client.clone(), tls.client_verifier),
            authorizer: Authorizer::new(self.client, self.node_name),
        };
        let router = router(context, gate);
        let acceptor = TlsAcceptor::from(tls.config);
        let doorway = Doorway::new(&self.shown);
        let told = Seldom::default();
        info!("kubelet API served");
        loop {
            let accepted = tokio::select! {
                accepted = self.incoming.accept() => accepted,
                () = shutdown.cancelled() => return Ok(()),
            };
            let Arrived { socket, from } = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, say: others must end first.
                    if let Some(left_out) = told.due(Instant::now()) {
                        warn!(%error, left_out, "cannot accept a connection to the kubelet API");
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (standing, displaced) = doorway.come(from.ip());
            let connection = connection(socket, acceptor.clone(), router.clone(), standing);
            let shutdown = shutdown.clone();
            let span = info_span!("kubelet_api", peer = %from);
            let task = async move {
                tokio::select! {
                    () = connection => {}
                    () = displaced => debug!("others came, and it had not said who it is"),
                    () = shutdown.cancelled() => {}
                }
            };
            tokio::spawn(task.instrument(span));
        }
    }
}

async fn connection(socket: TcpStream, acceptor: TlsAcceptor, router: Router, standing: Standing) {
    // Keystrokes of an exec: nothing to gain by waiting for more.
    drop(socket.set_nodelay(true));
    let tls = match timeout(HANDSHAKE, acceptor.accept(socket)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return debug!(%error, "TLS handshake failed"),
        Err(_) => return debug!("TLS handshake took too long"),
    };
    let chain: Option<Arc<[CertificateDer<'static>]>> = tls
        .get_ref()
        .1
        .peer_certificates()
        .map(|chain| chain.iter().map(|c| c.clone().into_owned()).collect());
    let service = TowerToHyperService::new(
        router
            .layer(Extension(Certificates(chain)))
            .layer(Extension(standing)),
    );
    let served = hyper::server::conn::http1::Builder::new()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(tls), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        debug!(%error, "connection ended");
    }
}

/// What the client showed in the handshake; not yet believed.
#[derive(Clone)]
struct Certificates(Option<Arc<[CertificateDer<'static>]>>);

fn router(context: Context, gate: Gate) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/healthz/ping", get(async || "ok"))
        .route("/pods", get(pods::pods))
        .route("/pods/", get(pods::pods))
        .route("/runningpods/", get(pods::running))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(logs::logs))
        .route("/exec/{namespace}/{pod}/{container}", any(stream::exec))
        .route("/exec/{namespace}/{pod}/{uid}/{container}", any(stream::exec))
        .route("/attach/{namespace}/{pod}/{container}", any(stream::attach))
        .route("/attach/{namespace}/{pod}/{uid}/{container}", any(stream::attach))
        .route("/portForward/{namespace}/{pod}", any(stream::port_forward))
        .route("/portForward/{namespace}/{pod}/{uid}", any(stream::port_forward))
        .route("/stats/summary", get(stats::summary))
        .route("/metrics/resource", get(stats::resource))
        .with_state(context)
        .layer(middleware::from_fn_with_state(gate, admit))
}

/// Lets a request through if somebody known, who may, sent it.
async fn admit(State(gate): State<Gate>, mut request: Request<Body>, next: Next) -> Response {
    let certificates = request
        .extensions_mut()
        .remove::<Certificates>()
        .and_then(|c| c.0);
    let user = match gate
        .authenticator
        .authenticate(certificates.as_deref(), request.headers())
        .await
    {
        Ok(user) => user,
        Err(error) => {
            warn!(
                path = request.uri().path(),
                error = &error as &dyn std::error::Error,
                "request to the kubelet API refused: not authenticated"
            );
            return (StatusCode::UNAUTHORIZED, "Unauthorized").into_response();
        }
    };
    if let Some(standing) = request.extensions_mut().remove::<Standing>()
        && let Err(level) = standing.proved(&user.name)
    {
        warn!(user = user.name, %level, "too many connections to the kubelet API");
        return (
            StatusCode::TOO_MANY_REQUESTS,
            format!("the {level}'s share of connections is used up"),
        )
            .into_response();
    }
    let asked = attributes::of(request.method(), request.uri().path());
    match gate.authorizer.authorize(&user, &asked).await {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            warn!(
                user = user.name,
                path = request.uri().path(),
                error = &refusal as &dyn std::error::Error,
                "request to the kubelet API refused: not authorised"
            );
            (StatusCode::FORBIDDEN, refusal.to_string()).into_response()
        }
    }
}

/// A request that cannot be served: what the caller is told.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("pod {namespace}/{pod} is not on this node")]
    NoPod { namespace: String, pod: String },
    #[error("pod {namespace}/{pod} has not been started yet")]
    NotStarted { namespace: String, pod: String },
    #[error("pod {namespace}/{pod} has another UID than {uid}")]
    AnotherPod {
        namespace: String,
        pod: String,
        uid: String,
    },
    #[error("container {container} is not in pod {namespace}/{pod}")]
    NoContainer {
        namespace: String,
        pod: String,
        container: String,
    },
    #[error("container {container:?} in pod {pod:?} is waiting to start: {why}")]
    Waiting {
        pod: String,
        container: String,
        why: String,
    },
    #[error("{0}: {1}")]
    Parameter(&'static str, String),
    #[error("the connection cannot be upgraded: send Connection: Upgrade")]
    NoUpgrade,
    #[error("the host of the pod is not in the pool any more")]
    NoHost,
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the host of the pod answered with nothing")]
    NoAnswer,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NoPod { .. } | Self::AnotherPod { .. } | Self::NoContainer { .. } => StatusCode::NOT_FOUND,
            Self::Call(CallError::NotFound { .. }) => StatusCode::NOT_FOUND,
            Self::Parameter(..) | Self::NoUpgrade | Self::NotStarted { .. } | Self::Waiting { .. } => {
                StatusCode::BAD_REQUEST
            }
            Self::Call(CallError::Invalid { .. } | CallError::Refused { .. }) => StatusCode::BAD_REQUEST,
            Self::NoHost | Self::NoAnswer | Self::Call(_) => StatusCode::BAD_GATEWAY,
        };
        // The caller asked for a container, not for a host.
        let text = match self {
            Self::Call(
                CallError::NotFound { message, .. }
                | CallError::Invalid { message, .. }
                | CallError::Refused { message, .. },
            ) => message,
            refused => refused.to_string(),
        };
        (status, text).into_response()
    }
}

impl Context {
    /// The pod's newest sandbox and the host that has it.
    async fn sandbox(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
    ) -> Result<(HostClient, pool_agent_api::SandboxKey, Found), Refused> {
        let (namespace, pod) = (namespace.to_owned(), pod.to_owned());
        let Some(found) = self.directory.find(&namespace, &pod).await else {
            return Err(Refused::NoPod { namespace, pod });
        };
        if let Some(uid) = uid
            && found.pod.metadata.uid.as_deref() != Some(uid)
        {
            return Err(Refused::AnotherPod {
                namespace,
                pod,
                uid: uid.to_owned(),
            });
        }
        let Some((place, status)) = &found.sandbox else {
            return Err(Refused::NotStarted { namespace, pod });
        };
        let host = self.pool.host(&place.host).ok_or(Refused::NoHost)?;
        Ok((host, status.key.clone(), found))
    }
}

/// Refused unless the pod's spec names the container.
fn has_container(found: &Found, container: &str) -> Result<(), Refused> {
    let spec = found.pod.spec.as_ref();
    let named = spec.is_some_and(|spec| {
        let all = spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten());
        all.into_iter().any(|c| c.name == container)
    });
    if named {
        return Ok(());
    }
    let metadata = &found.pod.metadata;
    Err(Refused::NoContainer {
        namespace: metadata.namespace.clone().unwrap_or_default(),
        pod: metadata.name.clone().unwrap_or_default(),
        container: container.to_owned(),
    })
}

#[cfg(test)]
mod tests;
