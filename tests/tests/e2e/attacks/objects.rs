//! Objects that an API server takes and that do not read here.

use serde_json::json;
use spindrift_tests::{
    Scope,
    workload::{idle, pod, probe_server, service},
};

use crate::e2e::{
    mesh::a_pod_reaches_itself,
    suite::{Case, cases},
};

pub(crate) fn tests() -> Vec<Case> {
    cases![Others: an_object_that_does_not_read_stops_neither_pods_nor_the_mesh]
}

/// Whoever may update an object writes its `managedFields`, and the times in them. The
/// last second that Kubernetes knows is one that the types here do not.
async fn an_object_that_does_not_read_stops_neither_pods_nor_the_mesh(scope: &Scope) -> anyhow::Result<()> {
    scope
        .start(pod("odd", json!({"containers": [idle()]})))
        .await?;
    scope.create(service("odd")).await?;
    let fields = json!([{
        "manager": "somebody", "operation": "Update", "apiVersion": "v1",
        "time": "9999-12-31T23:59:59Z", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}},
    }]);
    for kind in ["pod", "service"] {
        let label = json!({"metadata": {"labels": {"app": "odd"}, "managedFields": fields}}).to_string();
        let kubectl = scope.kubectl();
        kubectl.run(&["patch", kind, "odd", "--type=merge", "-p", &label]).await?;
        let kept = kubectl
            .run(&["get", kind, "odd", "--show-managed-fields", "-o", "jsonpath={.metadata.managedFields[*].time}"])
            .await?;
        anyhow::ensure!(kept.contains("9999-12-31"), "the API server did not keep it: {kept}");
    }
    // Both watches have to have come past them.
    scope.create(service("web")).await?;
    scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    a_pod_reaches_itself(scope, "web").await?;
    scope.kubectl().run(&["delete", "pod", "odd", "--grace-period=1"]).await?;
    scope.gone("odd").await
}
