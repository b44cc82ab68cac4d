//! Whether a user may: the API server is asked (SubjectAccessReview), and its
//! answer kept for a while.

use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Duration, Instant};

use super::{attributes::Attributes, authenticate::User, review_cache::ReviewCache};
use crate::api_server::answered;

/// A kubelet's own defaults (`authorization.webhook.cache…TTL`).
const KEEP_ALLOWED: Duration = Duration::from_secs(300);
const KEEP_DENIED: Duration = Duration::from_secs(30);
/// Answers remembered at once.
const ANSWERS: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum AuthorizeError {
    #[error(
        "{user:?} may not {verb} nodes/{} of node {node:?}: grant that verb on that subresource",
        subresources.join(" or nodes/")
    )]
    Denied {
        user: String,
        verb: &'static str,
        subresources: &'static [&'static str],
        node: String,
    },
    #[error("the API server could not be asked whether {user:?} may do this")]
    Review {
        user: String,
        #[source]
        source: Box<kube::Error>,
    },
}

type Question = (User, &'static str, &'static str);

#[derive(Clone)]
pub(super) struct Authorizer {
    client: Client,
    node: Arc<str>,
    answers: Arc<Mutex<ReviewCache<Question, bool>>>,
}

impl Authorizer {
    pub(super) fn new(client: Client, node: String) -> Self {
        Self {
            client,
            node: node.into(),
            answers: Arc::new(Mutex::new(ReviewCache::new(ANSWERS))),
        }
    }

    pub(super) async fn authorize(&self, user: &User, asked: &Attributes) -> Result<(), AuthorizeError> {
        for subresource in asked.subresources {
            if self.may(user, asked.verb, subresource).await? {
                return Ok(());
            }
        }
        Err(AuthorizeError::Denied {
            user: user.name.clone(),
            verb: asked.verb,
            subresources: asked.subresources,
            node: self.node.to_string(),
        })
    }

    async fn may(
        &self,
        user: &User,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, AuthorizeError> {
        let question = (user.clone(), verb, subresource);
        let kept = self
            .answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&question, Instant::now());
        if let Some(allowed) = kept {
            return Ok(allowed);
        }
        let allowed =
            self.review(user, verb, subresource)
                .await
                .map_err(|source| AuthorizeError::Review {
                    user: user.name.clone(),
                    source: Box::new(source),
                })?;
        let keep = if allowed { KEEP_ALLOWED } else { KEEP_DENIED };
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.put(question, allowed, keep, Instant::now());
        Ok(allowed)
    }

    async fn review(&self, user: &User, verb: &str, subresource: &str) -> Result<bool, kube::Error> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: user.uid.clone(),
                groups: Some(user.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    group: Some(String::new()),
                    version: Some("v1".into()),
                    resource: Some("nodes".into()),
                    subresource: Some(subresource.into()),
                    name: Some(self.node.to_string()),
                    verb: Some(verb.into()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let status = answered(reviews.create(&PostParams::default(), &review))
            .await?
            .status
            .unwrap_or_default();
        Ok(status.allowed && status.denied != Some(true))
    }
}
