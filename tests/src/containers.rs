//! What containerd runs on the hosts, whatever anybody claims.

use anyhow::Context;
use serde_json::Value;
use spindrift_local::Lab;

/// A container as containerd's CRI plugin labelled it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub host: String,
    pub id: String,
    pub pod_uid: String,
    /// The empty name is the sandbox itself.
    pub name: String,
    /// Its init process, if it has one.
    pub pid: Option<u32>,
}

impl Container {
    pub fn is_sandbox(&self) -> bool {
        self.name.is_empty()
    }
}

/// Everything there is on all hosts, running or not.
pub async fn on_hosts(lab: &Lab) -> anyhow::Result<Vec<Container>> {
    let mut all = Vec::new();
    for host in &lab.topology().hosts {
        all.extend(on_host(lab, &host.name).await?);
    }
    Ok(all)
}

pub async fn on_host(lab: &Lab, host: &str) -> anyhow::Result<Vec<Container>> {
    let runtime = lab
        .runtime(host)
        .with_context(|| format!("there is no host {host}"))?;
    let ids = runtime
        .ctr()
        .args(["containers", "list", "--quiet"])
        .run()
        .await?;
    let tasks = runtime.ctr().args(["tasks", "list"]).run().await?;
    let pid = |id: &str| {
        let mut words = tasks.lines().map(|line| line.split_whitespace());
        let mut task = words.find(|words| words.clone().next() == Some(id))?;
        let pid = task.nth(1)?.parse().ok()?;
        (task.next() == Some("RUNNING")).then_some(pid)
    };
    let mut found = Vec::new();
    for id in ids.lines() {
        let info = match runtime.ctr().args(["containers", "info", id]).run().await {
            Ok(info) => info,
            // Removed since it was listed.
            Err(_) => continue,
        };
        let info: Value = serde_json::from_str(&info)?;
        let label = |key: &str| info["Labels"][key].as_str().unwrap_or_default().to_owned();
        found.push(Container {
            host: host.to_owned(),
            id: id.to_owned(),
            pod_uid: label("io.kubernetes.pod.uid"),
            name: label("io.kubernetes.container.name"),
            pid: pid(id),
        });
    }
    Ok(found)
}
