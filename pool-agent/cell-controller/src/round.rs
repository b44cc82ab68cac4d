//! One look at all requests, at the tokens that were used and at what members of the
//! pool are told.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::CertificateSigningRequest,
        core::v1::{ConfigMap, Node, Secret},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client, Error, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions},
};
use pool_cell::names;
use serde_json::{Value, json};

use crate::{
    authority::Authority,
    member, request as requests,
    rule::{self, Asked, Asker, Verdict},
};

const TOKENS: &str = "kube-system";
/// A request that is lost with its connection would be waited for until TCP gives up.
const TIMEOUT: Duration = Duration::from_secs(15);

pub(crate) async fn answered<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(Error::Service(elapsed.into())),
    }
}

/// Somebody else was faster: the next round sees what came of it.
pub(crate) fn outrun(error: &Error) -> bool {
    matches!(error, Error::Api(status) if matches!(status.code, 404 | 409))
}

pub async fn round(client: &Client, authority: Option<&Authority>) -> Result<(), Error> {
    if let Some(authority) = authority {
        members(client, authority).await?;
    }
    // Before the requests: whatever a token is marked with by now is among those.
    let tokens = tokens(client).await?;
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let ours = ListParams::default().fields(&format!("spec.signerName={}", names::CLIENT_SIGNER));
    let requests = answered(objects::list(&Api::all(client.clone()), &ours)).await?;
    for request in &requests {
        if let Some(asked) = rule::asked(request)
            && let Err(error) = decide(client, &api, request, asked).await
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                request = request.name_any(),
                error,
                "a request is not decided yet"
            );
        }
    }
    sweep(client, &tokens, &requests).await
}

async fn tokens(client: &Client) -> Result<Vec<Secret>, Error> {
    let of_tokens = ListParams::default().fields("type=bootstrap.kubernetes.io/token");
    answered(objects::list(
        &Api::namespaced(client.clone(), TOKENS),
        &of_tokens,
    ))
    .await
}

async fn decide(
    client: &Client,
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    asked: Result<Asked, rule::Denial>,
) -> Result<(), Error> {
    let asked = match asked {
        Ok(asked) => asked,
        Err(denial) => return deny(api, request, denial.reason(), &denial.to_string()).await,
    };
    let nodes: Api<Node> = Api::all(client.clone());
    let node = answered(nodes.get_opt(asked.host.as_str())).await?;
    let tokens: Api<Secret> = Api::namespaced(client.clone(), TOKENS);
    let token = match &asked.asker {
        Asker::Token(id) => answered(tokens.get_opt(&format!("bootstrap-token-{id}"))).await?,
        Asker::Host(_) => None,
    };
    let mut verdict = rule::verdict(&asked, token.as_ref(), node.as_ref());
    if verdict == Verdict::Mark
        && let Some(token) = &token
    {
        let patch = json!({"metadata": {
            // As it was read: of two requests at once one is marked.
            "resourceVersion": token.metadata.resource_version,
            "annotations": { names::USED_BY: asked.uid },
        }});
        let (name, parameters, patch) = (token.name_any(), PatchParams::default(), Patch::Merge(patch));
        let marked = match answered(tokens.patch(&name, &parameters, &patch)).await {
            Err(error) if outrun(&error) => return Ok(()),
            other => other?,
        };
        tracing::info!(host = %asked.host, "a host's token is used");
        verdict = rule::verdict(&asked, Some(&marked), node.as_ref());
    }
    match verdict {
        Verdict::Approve => {
            tracing::info!(host = %asked.host, request = request.name_any(), "a host's certificate is approved");
            let message = match asked.asker {
                Asker::Token(_) => "its token names this host",
                Asker::Host(_) => "the host asks for itself",
            };
            conclude(api, request, "Approved", "SpindriftHost", message).await
        }
        Verdict::Deny(denial) => deny(api, request, denial.reason(), &denial.to_string()).await,
        Verdict::Mark => Ok(()),
    }
}

/// Signs what members of the pool may have, and tells them whom to believe.
async fn members(client: &Client, authority: &Authority) -> Result<(), Error> {
    tell(client, authority).await?;
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let ours = ListParams::default().fields(&format!("spec.signerName={}", names::MEMBER_SIGNER));
    for request in answered(objects::list(&Api::all(client.clone()), &ours)).await? {
        if let Err(error) = sign(client, &api, &request, authority).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                request = request.name_any(),
                error,
                "a request is not answered yet"
            );
        }
    }
    Ok(())
}

async fn sign(
    client: &Client,
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    authority: &Authority,
) -> Result<(), Error> {
    let signed = request
        .status
        .as_ref()
        .is_some_and(|status| status.certificate.is_some());
    let decided = requests::is_decided(request);
    if signed || decided && !requests::is_approved(request) {
        return Ok(());
    }
    let nodes: Api<Node> = Api::all(client.clone());
    let node = match member::host(request) {
        Some(host) => answered(nodes.get_opt(host.as_str())).await?,
        None => None,
    };
    // Also of one that is approved: somebody else may have, by another rule.
    let member = match member::verdict(request, &authority.trust_domain, node.as_ref()) {
        Ok(member) => member,
        Err(denial) if decided => {
            tracing::warn!(request = request.name_any(), denial = %denial, "approved, and not signed");
            let failed = json!([condition("Failed", denial.reason(), &denial.to_string())]);
            return settle(api, request, &json!({ "conditions": failed })).await;
        }
        Err(denial) => return deny(api, request, denial.reason(), &denial.to_string()).await,
    };
    if !decided {
        let message = "a member of the pool asks for its own name";
        return conclude(api, request, "Approved", "SpindriftMember", message).await;
    }
    let status = match authority.sign(&request.spec.request.0, &member, Timestamp::now()) {
        Ok(chain) => json!({ "certificate": ByteString(chain.into_bytes()) }),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(request = request.name_any(), error, "a request cannot be signed");
            json!({ "conditions": [condition("Failed", "Unsigned", "the key is of no kind that is signed")] })
        }
    };
    tracing::info!(member = %member, request = request.name_any(), "a member's certificate");
    settle(api, request, &status).await
}

/// Writes into the status of a request; its conditions are added to those that are there.
async fn settle(
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    status: &Value,
) -> Result<(), Error> {
    let patch = json!({
        "metadata": { "resourceVersion": request.metadata.resource_version },
        "status": status,
    });
    let (name, parameters, patch) = (
        request.name_any(),
        PatchParams::default(),
        Patch::Strategic(patch),
    );
    match answered(api.patch_status(&name, &parameters, &patch)).await {
        Err(error) if outrun(&error) => Ok(()),
        other => other.map(drop),
    }
}

/// The pool's roots and trust domain, where every member finds them.
async fn tell(client: &Client, authority: &Authority) -> Result<(), Error> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), names::POOL_NAMESPACE);
    let data = [
        (names::POOL_CA.to_owned(), authority.roots.clone()),
        (
            names::POOL_TRUST_DOMAIN.to_owned(),
            authority.trust_domain.clone(),
        ),
    ];
    let data = Some(data.into());
    let known = answered(api.get_opt(names::POOL)).await?;
    if known.is_some_and(|known| known.data == data) {
        return Ok(());
    }
    let told = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": names::POOL },
        "data": data,
    });
    let ours = PatchParams::apply("spindrift-cell-controller").force();
    answered(api.patch(names::POOL, &ours, &Patch::Apply(told))).await?;
    tracing::info!("members of the pool are told its roots");
    Ok(())
}

async fn deny(
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    reason: &str,
    message: &str,
) -> Result<(), Error> {
    tracing::warn!(
        request = request.name_any(),
        user = request.spec.username,
        reason,
        "a request is denied"
    );
    conclude(api, request, "Denied", reason, message).await
}

fn condition(kind: &str, reason: &str, message: &str) -> Value {
    json!({
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastUpdateTime": Time(Timestamp::now()),
    })
}

async fn conclude(
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    verdict: &str,
    reason: &str,
    message: &str,
) -> Result<(), Error> {
    let patch = json!({
        "metadata": { "resourceVersion": request.metadata.resource_version },
        "status": { "conditions": [condition(verdict, reason, message)] },
    });
    let (name, parameters, patch) = (request.name_any(), PatchParams::default(), Patch::Merge(patch));
    match answered(api.patch_approval(&name, &parameters, &patch)).await {
        Err(error) if outrun(&error) => Ok(()),
        other => other.map(drop),
    }
}

/// Removes the tokens that are used up.
async fn sweep(
    client: &Client,
    tokens: &[Secret],
    requests: &[CertificateSigningRequest],
) -> Result<(), Error> {
    let api: Api<Secret> = Api::namespaced(client.clone(), TOKENS);
    let nodes: Api<Node> = Api::all(client.clone());
    for token in tokens {
        let (Some(host), Some(uid)) = (
            rule::annotation(token, names::HOST),
            rule::annotation(token, names::USED_BY),
        ) else {
            continue;
        };
        let node = answered(nodes.get_opt(host)).await?;
        let request = requests.iter().find(|r| r.metadata.uid.as_deref() == Some(uid));
        if !rule::spent(request, node.as_ref(), Timestamp::now()) {
            continue;
        }
        let parameters = DeleteParams {
            preconditions: Some(Preconditions {
                uid: token.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match answered(api.delete(&token.name_any(), &parameters)).await {
            Ok(_) => tracing::info!(host, "a used token is removed"),
            Err(error) if outrun(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
