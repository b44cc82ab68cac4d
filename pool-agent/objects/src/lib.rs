//! Kubernetes objects as others wrote them: one that does not read spoils itself, and
//! not the listing or the watch that it comes in.
//!
//! An API server takes what the types here do not. A time is a `jiff::Timestamp`, which
//! ends at 9999-12-30T22:00; Kubernetes takes one at the year's end, and whoever may
//! update an object writes its `managedFields` with the times in them (fieldmanager's
//! `Update`). A typed watch fails at such an object, lists again, and fails again, for
//! ever. So nobody reads `managedFields`, and an object that still does not read is left
//! out by name: what was known of it stands.

use std::{borrow::Cow, fmt::Debug};

use futures::{Stream, StreamExt, future};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Resource,
    api::ListParams,
    runtime::watcher::{self, Event, watcher},
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;

/// An object of a kind, or what could be told of one that does not read.
#[derive(Debug, Clone)]
pub enum Lenient<K> {
    Read(Box<K>),
    Broken {
        /// Namespace, name, UID and version.
        metadata: Box<ObjectMeta>,
        problem: String,
    },
}

impl<K> Lenient<K> {
    /// For whom an object that does not read is an answer that does not.
    pub fn whole(self) -> kube::Result<K> {
        match self {
            Self::Read(object) => Ok(*object),
            Self::Broken { problem, .. } => Err(kube::Error::SerdeError(serde::de::Error::custom(problem))),
        }
    }
}

impl<K: Resource<DynamicType = ()>> Lenient<K> {
    /// None, and a line in the log, for one that does not read.
    pub fn read(self) -> Option<K> {
        match self {
            Self::Read(object) => Some(*object),
            Self::Broken { metadata, problem } => {
                tracing::warn!(
                    kind = %K::kind(&()),
                    namespace = metadata.namespace,
                    name = metadata.name,
                    problem,
                    "an object does not read and is left out"
                );
                None
            }
        }
    }
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lenient<K> {
    /// Fails for what is no object at all, such as the status of a watch that ends.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let Some(Value::Object(metadata)) = value.get_mut("metadata") else {
            return Err(serde::de::Error::missing_field("metadata"));
        };
        metadata.remove("managedFields");
        Ok(match K::deserialize(&value) {
            Ok(object) => Self::Read(Box::new(object)),
            Err(error) => Self::Broken {
                metadata: Box::new(told(&value)),
                problem: error.to_string(),
            },
        })
    }
}

fn told(value: &Value) -> ObjectMeta {
    let text = |field| value["metadata"][field].as_str().map(str::to_owned);
    ObjectMeta {
        namespace: text("namespace"),
        name: text("name"),
        uid: text("uid"),
        resource_version: text("resourceVersion"),
        ..ObjectMeta::default()
    }
}

/// The same kind, so that an `Api` of it asks for the same objects.
impl<K: Resource<DynamicType = ()>> Resource for Lenient<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Read(object) => object.meta(),
            Self::Broken { metadata, .. } => metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Read(object) => object.meta_mut(),
            Self::Broken { metadata, .. } => metadata,
        }
    }
}

/// As kube's watcher, without the objects that do not read.
pub fn watch<K>(
    api: Api<Lenient<K>>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static,
{
    watcher(api, config).filter_map(|event| future::ready(event.map(read).transpose()))
}

fn read<K: Resource<DynamicType = ()>>(event: Event<Lenient<K>>) -> Option<Event<K>> {
    Some(match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(object.read()?),
        Event::Apply(object) => Event::Apply(object.read()?),
        Event::Delete(object) => Event::Delete(object.read()?),
    })
}

/// The objects that read.
pub async fn list<K>(api: &Api<Lenient<K>>, parameters: &ListParams) -> kube::Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug,
{
    let listed = api.list(parameters).await?;
    Ok(listed.items.into_iter().filter_map(Lenient::read).collect())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::{coordination::v1::Lease, core::v1::Service};
    use serde_json::json;

    use super::*;

    const TOO_LATE: &str = "9999-12-31T23:59:59Z";

    fn service() -> Value {
        json!({"metadata": {"namespace": "shop", "name": "web", "uid": "u-1", "managedFields": [
            {"manager": "x", "operation": "Update", "apiVersion": "v1", "time": TOO_LATE},
        ]}, "spec": {"clusterIP": "10.0.0.1"}})
    }

    #[test]
    fn a_time_that_only_a_manager_wrote_spoils_nothing() {
        assert!(
            serde_json::from_value::<Service>(service()).is_err(),
            "if this reads, the whole crate can go"
        );
        let lenient: Lenient<Service> = serde_json::from_value(service()).unwrap();
        let service = lenient.read().unwrap();
        assert_eq!(service.spec.unwrap().cluster_ip.as_deref(), Some("10.0.0.1"));
    }

    #[test]
    fn an_object_that_does_not_read_is_left_out_of_its_list_by_name() {
        let lease = |name: &str, time: &str| json!({"metadata": {"name": name}, "spec": {"renewTime": time}});
        let list = json!([
            lease("before", "2026-11-27T16:00:00.000000Z"),
            lease("broken", "9999-12-31T23:59:59.000000Z"),
            lease("after", "2026-11-27T16:00:00.000000Z"),
        ]);
        let list: Vec<Lenient<Lease>> = serde_json::from_value(list).unwrap();
        assert_eq!(list[1].meta().name.as_deref(), Some("broken"));
        let read: Vec<Lease> = list.into_iter().filter_map(Lenient::read).collect();
        let names: Vec<_> = read.iter().filter_map(|l| l.metadata.name.as_deref()).collect();
        assert_eq!(names, ["before", "after"]);
    }

    #[test]
    fn a_watch_goes_on_past_an_object_that_does_not_read() {
        let broken: Lenient<Lease> =
            serde_json::from_value(json!({"metadata": {"name": "x"}, "spec": {"renewTime": TOO_LATE}}))
                .unwrap();
        assert!(read(Event::Apply(broken)).is_none());
        assert!(matches!(read::<Lease>(Event::InitDone), Some(Event::InitDone)));
    }

    #[test]
    fn what_is_no_object_is_none() {
        assert!(serde_json::from_value::<Lenient<Service>>(json!({"kind": "Status"})).is_err());
        assert!(serde_json::from_value::<Lenient<Service>>(json!("x")).is_err());
    }
}
