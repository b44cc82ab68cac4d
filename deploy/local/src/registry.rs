//! An image registry inside the lab, for pulls: found, missing, and with
//! credentials.
//!
//! Two processes serve the same images. References under
//! `registry.spindrift.local/` need no credentials; those under
//! `private.spindrift.local/` need [`USER`] and [`PASSWORD`]. The names are
//! resolved by each host's containerd, by its registry configuration; no DNS
//! knows them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    component::{Component, Ready},
    file::{self, Mode},
    images::{Image, Images},
    instance::Layout,
    netns::Namespace,
    tool::ToolError,
    topology::REGISTRY,
};

pub const USER: &str = "puller";
pub const PASSWORD: &str = "spindrift";
/// bcrypt of the password: protects nothing but the test of credentials.
const PASSWORD_HASH: &str = "$2b$05$abcdefghijklmnopqrstuuoPKYluLVZvILbrpmdnhikTqSCoNW4iu";

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registry {
    /// What references to it start with.
    pub name: &'static str,
    pub address: SocketAddr,
    component: &'static str,
    credentials: Credentials,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Credentials {
    None,
    Required,
}

pub const OPEN: Registry = Registry {
    name: "registry.spindrift.local",
    address: SocketAddr::new(std::net::IpAddr::V4(REGISTRY), 5000),
    component: "registry",
    credentials: Credentials::None,
};
pub const PRIVATE: Registry = Registry {
    name: "private.spindrift.local",
    address: SocketAddr::new(std::net::IpAddr::V4(REGISTRY), 5001),
    component: "registry-private",
    credentials: Credentials::Required,
};
pub const ALL: [Registry; 2] = [OPEN, PRIVATE];

#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", .path.display())]
pub struct RegistryError {
    path: PathBuf,
    source: std::io::Error,
}

impl Registry {
    /// Writes its configuration and tells what to run.
    pub fn component(&self, layout: &Layout, lab: &Namespace) -> Result<Component, RegistryError> {
        let directory = layout.state().join("registry");
        let write = |name: &str, content: String| {
            let path = directory.join(name);
            std::fs::create_dir_all(&directory)
                .and_then(|()| file::write(&path, content, Mode::Public))
                .map_err(|source| RegistryError {
                    path: path.clone(),
                    source,
                })
                .map(|()| path)
        };
        let mut config = format!(
            "version: 0.1
log:
  level: warn
storage:
  filesystem:
    rootdirectory: {}
  delete:
    enabled: true
http:
  addr: {}
",
            layout.data().join("registry").display(),
            self.address,
        );
        if self.credentials == Credentials::Required {
            let passwords = write("htpasswd", format!("{USER}:{PASSWORD_HASH}\n"))?;
            config += &format!(
                "auth:\n  htpasswd:\n    realm: spindrift\n    path: {}\n",
                passwords.display()
            );
        }
        let config = write(&format!("{}.yml", self.component), config)?;
        Ok(Component::new(self.component, "/usr/bin/docker-registry")
            .within(lab)
            .arg("serve")
            .arg(config.display().to_string())
            .input(config)
            .ready_when(Ready::Accepts(self.address)))
    }

    /// What containerd's `certs.d/NAME/hosts.toml` says.
    pub fn hosts_toml(&self) -> String {
        let address = self.address;
        format!(
            "server = \"http://{address}\"\n[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        )
    }
}

/// Puts an image into both registries under `repository:tag`; its references
/// are then `registry.spindrift.local/REPOSITORY:TAG` and so on.
pub async fn push(lab: &Namespace, images: &Images, image: Image, repository: &str) -> Result<(), ToolError> {
    lab.tool("skopeo copy --quiet --insecure-policy --dest-tls-verify=false")
        .arg(format!("oci-archive:{}", images.archive(image).display()))
        .arg(format!("docker://{}/{repository}", OPEN.address))
        .limit(Duration::from_secs(120))
        .run()
        .await
        .map(drop)
}
