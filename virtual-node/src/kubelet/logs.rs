//! `/containerLogs`: a container's log from its host.

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use pool_agent_api::{
    SandboxKey,
    status::{ContainerState, wire_timestamp},
    wire,
};

use super::{Context, Found, Refused, has_container};

pub(super) async fn logs(
    State(context): State<Context>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Refused> {
    let (host, key, found) = context.sandbox(&namespace, &pod, None).await?;
    has_container(&found, &container)?;
    readable(&found, &pod, &container)?;
    let request = request(
        &key,
        &container,
        query.as_deref().unwrap_or_default(),
        Timestamp::now(),
    )?;
    let chunks = host.logs(request).await?;
    // A status after the first byte can only cut the response short.
    let body = Body::from_stream(chunks.map(|chunk| chunk.map(|c| c.data)));
    Ok(([("content-type", "text/plain; charset=utf-8")], body).into_response())
}

/// A container that has never run has no log: a kubelet's own words on why.
fn readable(found: &Found, pod: &str, container: &str) -> Result<(), Refused> {
    let sandbox = found.sandbox.as_ref().map(|(_, status)| status);
    let mut statuses = sandbox
        .into_iter()
        .flat_map(|s| s.init_containers.iter().chain(&s.containers));
    let why = match statuses.find(|c| c.name.as_str() == container) {
        Some(status) if status.last_terminated.is_some() => return Ok(()),
        Some(status) => match &status.state {
            ContainerState::Waiting { reason, .. } => match reason.as_str() {
                "ErrImagePull" => "image can't be pulled",
                "ImagePullBackOff" => "trying and failing to pull image",
                reason => reason,
            },
            ContainerState::Running { .. } | ContainerState::Terminated(_) => return Ok(()),
        },
        None => "ContainerCreating",
    };
    Err(Refused::Waiting {
        pod: pod.to_owned(),
        container: container.to_owned(),
        why: why.to_owned(),
    })
}

/// The parameters of Kubernetes' PodLogOptions.
fn request(
    key: &SandboxKey,
    container: &str,
    query: &str,
    now: Timestamp,
) -> Result<wire::LogsRequest, Refused> {
    let mut request = wire::LogsRequest {
        key: Some(key.into()),
        container: container.to_owned(),
        ..wire::LogsRequest::default()
    };
    let mut since_seconds = None;
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let count = |name: &'static str| {
            value
                .parse::<u64>()
                .map_err(|_| Refused::Parameter(name, format!("{value:?} is not a whole number")))
        };
        match &*name {
            "follow" => request.follow = flag("follow", &value)?,
            "previous" => request.previous = flag("previous", &value)?,
            "timestamps" => request.timestamps = flag("timestamps", &value)?,
            "tailLines" => request.tail_lines = Some(count("tailLines")?),
            "limitBytes" => match count("limitBytes")? {
                0 => return Err(Refused::Parameter("limitBytes", "must be at least 1".into())),
                limit => request.limit_bytes = Some(limit),
            },
            "sinceSeconds" => match count("sinceSeconds")? {
                0 => return Err(Refused::Parameter("sinceSeconds", "must be at least 1".into())),
                seconds => since_seconds = Some(seconds),
            },
            "sinceTime" => {
                let at: Timestamp = value.parse().map_err(|_| {
                    Refused::Parameter("sinceTime", format!("{value:?} is not an RFC 3339 time"))
                })?;
                request.since = Some(wire_timestamp(at));
            }
            // The kubelet passes over what it does not know.
            _ => {}
        }
    }
    if let Some(seconds) = since_seconds {
        if request.since.is_some() {
            return Err(Refused::Parameter(
                "sinceSeconds",
                "may not stand beside sinceTime".into(),
            ));
        }
        let ago = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
        let at = now.checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH);
        request.since = Some(wire_timestamp(at));
    }
    Ok(request)
}

/// As Go's strconv.ParseBool reads it; an empty value is true.
pub(super) fn flag(name: &'static str, value: &str) -> Result<bool, Refused> {
    match value {
        "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(Refused::Parameter(
            name,
            format!("{other:?} is not true or false"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<wire::LogsRequest, Refused> {
        let key = SandboxKey {
            pod: "u".parse().unwrap(),
            attempt: pool_agent_api::Attempt::FIRST,
        };
        request(&key, "app", query, Timestamp::from_second(1_000).unwrap())
    }

    #[test]
    fn every_option_of_kubectl_logs_reaches_the_host() {
        let request =
            parse("follow=true&previous=1&timestamps=true&tailLines=5&limitBytes=9&sinceSeconds=100")
                .unwrap();
        assert!(request.follow && request.previous && request.timestamps);
        assert_eq!((request.tail_lines, request.limit_bytes), (Some(5), Some(9)));
        assert_eq!(request.since.unwrap().seconds, 900);
        let request = parse("sinceTime=1970-01-01T00%3A00%3A07Z").unwrap();
        assert_eq!(request.since.unwrap().seconds, 7);
    }

    #[test]
    fn a_bad_option_is_refused_by_name() {
        for (query, name) in [
            ("tailLines=-1", "tailLines"),
            ("tailLines=x", "tailLines"),
            ("limitBytes=0", "limitBytes"),
            ("sinceSeconds=0", "sinceSeconds"),
            ("sinceTime=yesterday", "sinceTime"),
            ("follow=maybe", "follow"),
            ("sinceSeconds=1&sinceTime=1970-01-01T00:00:07Z", "sinceSeconds"),
        ] {
            let refused = parse(query).unwrap_err();
            assert!(
                matches!(refused, Refused::Parameter(n, _) if n == name),
                "{query}: {refused}"
            );
        }
    }
}
