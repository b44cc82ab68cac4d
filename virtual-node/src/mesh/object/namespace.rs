use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Istio's label on pods and namespaces.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// What the label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataplaneMode {
    /// `none`: opted out.
    None,
    /// Any other value, such as `ambient`.
    Mesh,
}

impl DataplaneMode {
    pub fn of(meta: &ObjectMeta) -> Option<Self> {
        match meta.labels.as_ref()?.get(DATAPLANE_MODE)?.as_str() {
            "none" => Some(Self::None),
            _ => Some(Self::Mesh),
        }
    }

    /// Whether a pod of a virtual node is in the mesh: unless its own label says no,
    /// or, where it has none, its namespace's label does.
    pub fn enrols(pod: Option<Self>, namespace: Option<Self>) -> bool {
        pod.or(namespace) != Some(Self::None)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespace {
    pub mode: Option<DataplaneMode>,
}

impl Namespace {
    pub fn parse(meta: &ObjectMeta) -> Self {
        Self {
            mode: DataplaneMode::of(meta),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_in_the_mesh_unless_it_or_its_namespace_says_no() {
        let (no, yes) = (Some(DataplaneMode::None), Some(DataplaneMode::Mesh));
        for (pod, namespace, enrolled) in [
            (None, None, true),
            (None, yes, true),
            (None, no, false),
            (no, None, false),
            (no, yes, false),
            (yes, no, true),
            (yes, None, true),
        ] {
            assert_eq!(
                DataplaneMode::enrols(pod, namespace),
                enrolled,
                "{pod:?} in {namespace:?}"
            );
        }
    }
}
