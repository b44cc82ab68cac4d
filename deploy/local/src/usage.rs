//! The operator's collector of usage records, with JSON lines as its sink.

use std::{net::SocketAddr, path::PathBuf};

use serde::Serialize;

use crate::{
    artifacts::Spindrift,
    component::{Component, Ready},
    file::{self, Mode},
    instance::Layout,
    netns::Namespace,
    pool::{PoolError, PoolPki, PoolTls},
    topology::CELL,
};

pub const COMPONENT: &str = "usage-collector";
/// Where the operator's programs are.
pub const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(CELL), 15020);

#[derive(Serialize)]
struct Config {
    listen: SocketAddr,
    tls: PoolTls,
    json_lines: JsonLines,
}

#[derive(Serialize)]
struct JsonLines {
    directory: PathBuf,
}

/// Where the records come to lie: for `spindrift usage`.
pub fn directory(layout: &Layout) -> PathBuf {
    layout.data().join("usage")
}

pub fn collector(
    layout: &Layout,
    lab: &Namespace,
    pki: &PoolPki,
    programs: &Spindrift,
) -> Result<Component, PoolError> {
    let config = Config {
        listen: ADDRESS,
        tls: pki.usage_collector()?,
        json_lines: JsonLines {
            directory: directory(layout),
        },
    };
    let text = toml::to_string(&config).map_err(|source| PoolError::Config {
        agent: COMPONENT.into(),
        source,
    })?;
    let path = layout.state().join("usage-collector.toml");
    file::write(&path, text, Mode::Public).map_err(|source| PoolError::File {
        path: path.clone(),
        source,
    })?;
    Ok(Component::new(COMPONENT, programs.program(COMPONENT)?)
        .within(lab)
        .path_flag("config", &path)
        .input(path)
        .ready_when(Ready::Accepts(ADDRESS)))
}
