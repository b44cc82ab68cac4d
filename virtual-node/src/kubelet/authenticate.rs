//! Who sent a request: a certificate of the client CA, or a token that the API
//! server vouches for (TokenReview).

use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{HeaderMap, header::AUTHORIZATION};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{Api, Client, api::PostParams};
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use tokio::time::{Duration, Instant};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::review_cache::ReviewCache;
use crate::api_server::answered;

/// A kubelet's own default (`authentication.webhook.cacheTTL`).
const KEEP: Duration = Duration::from_secs(120);
/// A refusal is kept shorter: a new token may be known a moment later.
const KEEP_REFUSED: Duration = Duration::from_secs(10);
/// Tokens remembered at once, by hash.
const TOKENS: usize = 1024;
/// Longer is no token of this cluster.
const LONGEST_TOKEN: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: Option<String>,
    pub(super) groups: Vec<String>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum AuthenticateError {
    #[error("neither a client certificate nor a bearer token was sent")]
    Nothing,
    #[error("the client certificate is not of the client CA")]
    Certificate(#[source] rustls::Error),
    #[error("the client certificate names nobody: it has no common name")]
    Nameless,
    #[error("the bearer token is not one the API server knows")]
    Token,
    #[error("the API server could not be asked about the token")]
    Review(#[source] Arc<kube::Error>),
}

#[derive(Clone)]
pub(super) struct Authenticator {
    client: Client,
    certificates: Arc<dyn ClientCertVerifier>,
    tokens: Arc<Mutex<ReviewCache<[u8; 32], Option<User>>>>,
}

impl Authenticator {
    pub(super) fn new(client: Client, certificates: Arc<dyn ClientCertVerifier>) -> Self {
        Self {
            client,
            certificates,
            tokens: Arc::new(Mutex::new(ReviewCache::new(TOKENS))),
        }
    }

    /// The certificate is asked first; a certificate of a stranger does not stop
    /// a good token, as in a kubelet.
    pub(super) async fn authenticate(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        headers: &HeaderMap,
    ) -> Result<User, AuthenticateError> {
        let by_certificate = match chain {
            Some([leaf, intermediates @ ..]) => Some(self.certificate(leaf, intermediates)),
            Some([]) | None => None,
        };
        if let Some(Ok(user)) = by_certificate {
            return Ok(user);
        }
        match (bearer(headers), by_certificate) {
            (Some(token), _) => self.token(token).await,
            (None, Some(refused)) => refused,
            (None, None) => Err(AuthenticateError::Nothing),
        }
    }

    fn certificate(
        &self,
        leaf: &CertificateDer<'static>,
        intermediates: &[CertificateDer<'static>],
    ) -> Result<User, AuthenticateError> {
        self.certificates
            .verify_client_cert(leaf, intermediates, UnixTime::now())
            .map_err(AuthenticateError::Certificate)?;
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| AuthenticateError::Nameless)?;
        let subject = parsed.subject();
        let name = subject
            .iter_common_name()
            .next()
            .and_then(|cn| cn.as_str().ok())
            .filter(|name| !name.is_empty())
            .ok_or(AuthenticateError::Nameless)?;
        let groups = subject.iter_organization().filter_map(|o| o.as_str().ok());
        Ok(User {
            name: name.to_owned(),
            uid: None,
            groups: groups
                .map(str::to_owned)
                .chain(["system:authenticated".to_owned()])
                .collect(),
        })
    }

    async fn token(&self, token: &str) -> Result<User, AuthenticateError> {
        let hash: [u8; 32] = Sha256::digest(token).into();
        let kept = self
            .tokens
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&hash, Instant::now());
        let user = match kept {
            Some(kept) => kept,
            None => {
                let user = self
                    .review(token)
                    .await
                    .map_err(|e| AuthenticateError::Review(Arc::new(e)))?;
                let keep = if user.is_some() { KEEP } else { KEEP_REFUSED };
                let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
                tokens.put(hash, user.clone(), keep, Instant::now());
                user
            }
        };
        user.ok_or(AuthenticateError::Token)
    }

    async fn review(&self, token: &str) -> Result<Option<User>, kube::Error> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                ..TokenReviewSpec::default()
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let status = answered(reviews.create(&PostParams::default(), &review))
            .await?
            .status
            .unwrap_or_default();
        if status.authenticated != Some(true) {
            return Ok(None);
        }
        Ok(status.user.and_then(|user| {
            Some(User {
                name: user.username.filter(|name| !name.is_empty())?,
                uid: user.uid,
                groups: user.groups.unwrap_or_default(),
            })
        }))
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= LONGEST_TOKEN)
        .then_some(token)
}
