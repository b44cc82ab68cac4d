//! Hosts that join a cell, and those who pretend to: the controller on a real API
//! server, with the rights that `deploy/cell` gives it. Needs root and what
//! `deploy/local/tools` installs; fails where it cannot run.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use k8s_openapi::{
    ByteString,
    api::{
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
        core::v1::{Node, Pod, Secret},
    },
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    config::Kubeconfig,
};
use pool_cell::names;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use serde_json::{Value, json};
use spindrift_local::{
    Lab, Options, Progress,
    cell::Cell,
    cluster,
    component::Component,
    lab::{self, Extent},
};

const INSTANCE: &str = "e2e-join";
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_host_joins_once_by_its_own_token_and_nobody_joins_in_its_place() -> Result<()> {
    let progress = Progress::silent();
    lab::down(&INSTANCE.parse()?, &progress).await?;
    let options = Options {
        extent: Extent::ControlPlane,
        cell: true,
        hosts: 1,
        ..Options::for_tests(INSTANCE.parse()?, spindrift_local::cache::standard()?)
    };
    let lab = Lab::up(&options, &progress).await?;
    let tried = attempts(&lab).await;
    lab::down(&INSTANCE.parse()?, &progress).await?;
    tried
}

async fn attempts(lab: &Lab) -> Result<()> {
    let cell = lab.cell().context("the lab has no cell")?;
    let kubeconfig = cell.kubeconfig("cell-controller").await?;
    Component::new("cell-controller", env!("CARGO_BIN_EXE_cell-controller"))
        .path_flag("kubeconfig", kubeconfig)
        .within(&lab.topology().lab)
        .start(lab.layout(), PATIENCE)
        .await?;
    let admin = cell.cluster().client();
    let token = Asker::of_token(cell, "host-a").await?;

    // What the token is not good for, while it is good.
    ensure!(token.refused("host-b", |_| {}, "m-1").await? == "TokenForAnother");
    let masters = |subject: &mut DistinguishedName| subject.push(DnType::OrganizationName, "system:masters");
    ensure!(token.refused("host-a", masters, "m-1").await? == "Subject");
    let secrets: Api<Secret> = Api::namespaced(token.client.clone(), "kube-system");
    forbidden("a token reads tokens", secrets.list(&ListParams::default()).await)?;

    let host = token.joined(cell, "host-a", "m-1").await?;
    // Nobody has shown himself with the certificate: the token is there, and used.
    ensure!(token.refused("host-a", |_| {}, "m-1").await? == "TokenUsed");

    a_host_is_itself_and_nobody_else(&host.client, &admin).await?;
    let tokens: Api<Secret> = Api::namespaced(admin.clone(), "kube-system");
    cluster::wait("the end of the used token", PATIENCE, async || {
        let of_tokens = ListParams::default().fields("type=bootstrap.kubernetes.io/token");
        match tokens
            .list(&of_tokens)
            .await
            .map_err(|e| e.to_string())?
            .items
            .len()
        {
            0 => Ok(()),
            n => Err(format!("{n} tokens")),
        }
    })
    .await?;

    // It renews for itself alone, and only while its node is there.
    ensure!(host.refused("host-b", |_| {}, "m-1").await? == "AnotherHost");
    host.joined(cell, "host-a", "m-1").await?;
    // Another machine with a token of its own gets no name that is taken.
    let thief = Asker::of_secret(cell, "host-a", "fedcba").await?;
    ensure!(thief.refused("host-a", |_| {}, "m-2").await? == "NameTaken");
    let nodes: Api<Node> = Api::all(admin.clone());
    nodes
        .delete("host-a", &kube::api::DeleteParams::default())
        .await?;
    ensure!(host.refused("host-a", |_| {}, "m-1").await? == "NodeGone");
    thief.joined(cell, "host-a", "m-2").await?;
    Ok(())
}

async fn a_host_is_itself_and_nobody_else(host: &Client, admin: &Client) -> Result<()> {
    let nodes: Api<Node> = Api::all(host.clone());
    let create = PostParams::default();
    nodes.create(&create, &node("host-a")?).await?;
    forbidden(
        "a host makes another's node",
        nodes.create(&create, &node("host-b")?).await,
    )?;
    Api::<Node>::all(admin.clone())
        .create(&create, &node("host-b")?)
        .await?;
    let ready = json!({"status": {"conditions": [{
        "type": "Ready", "status": "True", "reason": "AgentReady", "message": "",
        "lastHeartbeatTime": jiff::Timestamp::now().to_string(),
    }]}});
    let patch = Patch::Strategic(&ready);
    let parameters = PatchParams::default();
    forbidden(
        "a host writes another's status",
        nodes.patch_status("host-b", &parameters, &patch).await,
    )?;
    let free = json!({"spec": {"taints": []}});
    forbidden(
        "a host takes its taint away",
        nodes.patch("host-a", &parameters, &Patch::Merge(&free)).await,
    )?;
    let everything: Api<Pod> = Api::all(host.clone());
    forbidden(
        "a host lists all claims",
        everything.list(&ListParams::default()).await,
    )?;
    let theirs = ListParams::default().fields("spec.nodeName=host-b");
    forbidden("a host lists another's claims", everything.list(&theirs).await)?;
    let own = ListParams::default().fields("spec.nodeName=host-a");
    everything
        .list(&own)
        .await
        .context("a host lists its own claims")?;
    let own = ListParams::default().fields("spec.nodeName=host-a,metadata.name=u-1-1");
    everything
        .list(&own)
        .await
        .context("a host asks for one of its own claims")?;
    nodes.patch_status("host-a", &parameters, &patch).await?;
    Ok(())
}

fn node(name: &str) -> Result<Node> {
    Ok(serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {"taints": [{"key": names::POOL_TAINT, "effect": "NoSchedule"}]},
        "status": {"nodeInfo": {
            "machineID": "m-1", "bootID": "b", "systemUUID": "", "kernelVersion": "", "osImage": "",
            "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
            "operatingSystem": "linux", "architecture": "amd64",
        }},
    }))?)
}

fn forbidden<T>(what: &str, answer: Result<T, kube::Error>) -> Result<()> {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
        Err(error) => Err(error).context(format!("{what}: refused in another way")),
        Ok(_) => anyhow::bail!("{what}: it was allowed"),
    }
}

/// Whoever asks for a certificate.
struct Asker {
    client: Client,
}

impl Asker {
    fn with(cell: &Cell, user: Value) -> Result<Self> {
        let mut config = cell.cluster().config().clone();
        config.auth_info = serde_json::from_value(user)?;
        let client = Client::try_from(config)?;
        Ok(Self { client })
    }

    /// With the token that the lab's operator gives a host.
    async fn of_token(cell: &Cell, host: &str) -> Result<Self> {
        let path = cell.bootstrap_kubeconfig(host).await?;
        let read = serde_json::to_value(Kubeconfig::read_from(path)?.auth_infos)?;
        Self::with(cell, json!({"token": read[0]["user"]["token"]}))
    }

    /// With another one, of the id.
    async fn of_secret(cell: &Cell, host: &str, id: &str) -> Result<Self> {
        let secret: Secret = serde_json::from_value(json!({
            "metadata": {"name": format!("bootstrap-token-{id}"), "annotations": {names::HOST: host}},
            "type": "bootstrap.kubernetes.io/token",
            "stringData": {
                "token-id": id, "token-secret": "0123456789abcdef",
                "usage-bootstrap-authentication": "true",
                "auth-extra-groups": names::BOOTSTRAPPERS,
            },
        }))?;
        let api: Api<Secret> = Api::namespaced(cell.cluster().client(), "kube-system");
        api.create(&PostParams::default(), &secret).await?;
        Self::with(cell, json!({"token": format!("{id}.0123456789abcdef")}))
    }

    /// The reason for which a request is denied.
    async fn refused(
        &self,
        host: &str,
        change: impl FnOnce(&mut DistinguishedName),
        machine: &str,
    ) -> Result<String> {
        match self.ask(host, change, machine).await? {
            Err(reason) => Ok(reason),
            Ok(_) => anyhow::bail!("a certificate for {host} was signed"),
        }
    }

    /// With the certificate that is signed for it.
    async fn joined(&self, cell: &Cell, host: &str, machine: &str) -> Result<Self> {
        match self.ask(host, |_| {}, machine).await? {
            Ok(user) => Self::with(cell, user),
            Err(reason) => anyhow::bail!("{host} was refused: {reason}"),
        }
    }

    async fn ask(
        &self,
        host: &str,
        change: impl FnOnce(&mut DistinguishedName),
        machine: &str,
    ) -> Result<Result<Value, String>> {
        let key = KeyPair::generate()?;
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, "system:nodes");
        subject.push(DnType::CommonName, format!("system:node:{host}"));
        change(&mut subject);
        let mut parameters = CertificateParams::new(vec![])?;
        parameters.distinguished_name = subject;
        let request = CertificateSigningRequest {
            metadata: ObjectMeta {
                generate_name: Some("attempt-".into()),
                annotations: Some([(names::MACHINE.to_owned(), machine.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(parameters.serialize_request(&key)?.pem()?.into_bytes()),
                signer_name: names::CLIENT_SIGNER.into(),
                usages: Some(vec!["digital signature".into(), "client auth".into()]),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        };
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        // A new token reaches the API server by a watch of its own.
        let name = cluster::wait("the request", PATIENCE, async || {
            let made = api.create(&PostParams::default(), &request).await;
            made.map(|r| r.name_any()).map_err(|e| e.to_string())
        })
        .await?;
        let decided = cluster::wait("a decision on the request", PATIENCE, async || {
            let status = api
                .get(&name)
                .await
                .map_err(|e| e.to_string())?
                .status
                .unwrap_or_default();
            let denied = status.conditions.iter().flatten().find(|c| c.type_ == "Denied");
            match (denied, status.certificate) {
                (Some(condition), _) => Ok(Err(condition.reason.clone().unwrap_or_default())),
                (None, Some(ByteString(chain))) => Ok(Ok(json!({
                    "client-certificate-data": BASE64_STANDARD.encode(chain),
                    "client-key-data": BASE64_STANDARD.encode(key.serialize_pem()),
                }))),
                (None, None) => Err(format!("{:?}", status.conditions)),
            }
        })
        .await?;
        Ok(decided)
    }
}
