//! The collector's settings: one TOML file, checked once at the start.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use serde::Deserialize;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

/// Whoever has not said by then who he is, is let go.
const HANDSHAKE: Duration = Duration::from_secs(10);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) listen: SocketAddr,
    pub(crate) tls: TlsFiles,
    pub(crate) json_lines: Option<JsonLines>,
    pub(crate) postgres: Option<Postgres>,
}

/// The pool's PKI, as PEM files. The certificate names the collector:
/// `spiffe://TRUST_DOMAIN/usage-collector`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    pub(crate) trust_domain: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JsonLines {
    pub(crate) directory: PathBuf,
    /// A file that is longer is followed by another.
    #[serde(default = "JsonLines::default_rotation")]
    pub(crate) rotate_bytes: u64,
}

impl JsonLines {
    fn default_rotation() -> u64 {
        256 << 20
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Postgres {
    /// As libpq has it: `postgresql://…` or `host=… user=…`.
    pub(crate) url: String,
}

impl Config {
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text)?;
        if config.json_lines.is_none() && config.postgres.is_none() {
            bail!("there is no sink: say [json_lines] or [postgres]");
        }
        if let Some(lines) = &config.json_lines {
            if !lines.directory.is_absolute() {
                bail!("json_lines.directory: must be an absolute path");
            }
            if lines.rotate_bytes < 4096 {
                bail!("json_lines.rotate_bytes: must be at least 4096");
            }
        }
        Ok(config)
    }
}

impl TlsFiles {
    pub(crate) fn server(&self) -> anyhow::Result<ServerTlsConfig> {
        let read = |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
        let identity = Identity::from_pem(read(&self.certificate)?, read(&self.key)?);
        Ok(ServerTlsConfig::new()
            .identity(identity)
            .client_ca_root(Certificate::from_pem(read(&self.ca)?))
            .timeout(HANDSHAKE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        listen = "192.0.2.1:15020"
        [tls]
        certificate = "/a"
        key = "/b"
        ca = "/c"
        trust_domain = "pool.spindrift"
    "#;

    #[test]
    fn a_file_without_a_sink_or_with_a_mistake_is_refused_by_field() {
        let with = |text: &str| {
            Config::parse(&format!("{FILE}{text}"))
                .map(drop)
                .map_err(|e| e.to_string())
        };
        assert_eq!(with("[json_lines]\ndirectory = \"/x\""), Ok(()));
        assert_eq!(with("[postgres]\nurl = \"postgresql:///usage\""), Ok(()));
        for (text, says) in [
            ("", "there is no sink"),
            ("[json_lines]\ndirectory = \"x\"", "json_lines.directory"),
            (
                "[json_lines]\ndirectory = \"/x\"\nrotate_bytes = 1",
                "json_lines.rotate_bytes",
            ),
            (
                "[json_lines]\ndirectory = \"/x\"\nrotate = 1",
                "unknown field `rotate`",
            ),
        ] {
            let error = with(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
