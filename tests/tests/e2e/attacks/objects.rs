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
    scope.start(pod("odd", json!({"containers": [idle()]}))).await?;
    scope.create(service("odd")).await?;
    let fields = json!([{
        "manager": "somebody", "operation": "Update", "apiVersion": "v1",
        "time": "9999-12-31T23:59:59Z", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}},
    }]);
    for kind in ["pod", "service"] {
        let kubectl = scope.kubectl();
        // Somebody's field, which this changes no more.
        kubectl
            .run(&["label", "--overwrite", kind, "odd", "app=odd"])
            .await?;
        let late = json!({"metadata": {"managedFields": fields}}).to_string();
        kubectl
            .run(&["patch", kind, "odd", "--type=merge", "-p", &late])
            .await?;
        let kept = kubectl
            .run(&[
                "get",
                kind,
                "odd",
                "--show-managed-fields",
                "-o",
                "jsonpath={.metadata.managedFields[*].time}",
            ])
            .await?;
        anyhow::ensure!(
            kept.contains("9999-12-31"),
            "the API server did not keep it: {kept}"
        );
    }
    // Both watches have to have come past them.
    scope.create(service("web")).await?;
    scope
        .start(pod("web", json!({"containers": [probe_server()]})))
        .await?;
    a_pod_reaches_itself(scope, "web").await?;
    let gone = [
        "delete",
        "pod",
        "odd",
        "--grace-period=1",
        "--wait",
        "--timeout=60s",
    ];
    scope.kubectl().run(&gone).await.map(drop)
}
