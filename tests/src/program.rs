//! The test programs for inside pods (`images/`), as one image on every host.

use std::path::Path;

use spindrift_local::{Lab, Progress, artifacts, cache::Cache, images::Image};

pub const PROBE: Image = Image {
    name: "probe",
    reference: "spindrift.local/probe:1",
};

/// Builds the image if need be and gives it to each host.
pub async fn import(lab: &Lab, cache: &Cache, progress: &Progress) -> anyhow::Result<()> {
    let sources =
        ["probe.rs", "fetch.go"].map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("images").join(name));
    let archive = artifacts::program_image(cache, PROBE, &sources, progress).await?;
    for host in &lab.topology().hosts {
        if let Some(runtime) = lab.runtime(&host.name) {
            runtime.import_archive(PROBE, &archive).await?;
        }
    }
    Ok(())
}
