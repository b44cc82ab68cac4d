//! Container images made here, from no registry: `busybox` (Debian's static
//! one), `agnhost` (Kubernetes' own test server) and `pause`.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    progress::Step,
    tool::{Tool, ToolError},
};

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error("cannot write its files")]
    Files(#[from] std::io::Error),
}

/// Debian's, from busybox-static.
pub const BUSYBOX: &str = "/bin/busybox";

/// Counts changes of how the images are put together.
pub const REVISION: &str = "images 1";

/// An image by its parts: the archive's file is `NAME.tar`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    pub name: &'static str,
    pub reference: &'static str,
}

pub const PAUSE: Image = Image {
    name: "pause",
    reference: "spindrift.local/pause:1",
};
pub const BUSYBOX_IMAGE: Image = Image {
    name: "busybox",
    reference: "spindrift.local/busybox:1",
};
pub const AGNHOST: Image = Image {
    name: "agnhost",
    reference: "spindrift.local/agnhost:1",
};
pub const ALL: [Image; 3] = [PAUSE, BUSYBOX_IMAGE, AGNHOST];

/// A directory of image archives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    directory: PathBuf,
}

impl Images {
    pub(crate) fn in_directory(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// An OCI archive that carries the image's reference.
    pub fn archive(&self, image: Image) -> PathBuf {
        self.directory.join(format!("{}.tar", image.name))
    }

    /// Another whenever the content is.
    pub fn version(&self) -> String {
        self.directory
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

/// Builds all archives into the directory.
pub(crate) async fn build(
    directory: &Path,
    agnhost: &Path,
    pause: &Path,
    step: &Step,
) -> Result<(), ImageError> {
    step.note("busybox");
    let root = directory.join("root.busybox");
    busybox(&root).await?;
    archive(directory, BUSYBOX_IMAGE, &root, &["--config.cmd=sh"]).await?;

    step.note("agnhost");
    // On top of busybox, so that a person can look around with a shell.
    let root = rename(directory, "root.busybox", "root.agnhost")?;
    std::fs::copy(agnhost, root.join("agnhost"))?;
    archive(directory, AGNHOST, &root, &["--config.entrypoint=/agnhost"]).await?;

    step.note("pause");
    let root = directory.join("root.pause");
    tree(&root, &[])?;
    compile(pause, &root.join("pause")).await?;
    archive(
        directory,
        PAUSE,
        &root,
        &["--config.entrypoint=/pause", "--config.user=65535:65535"],
    )
    .await?;
    for leftover in ["root.agnhost", "root.pause"] {
        std::fs::remove_dir_all(directory.join(leftover))?;
    }
    Ok(())
}

/// Builds the archive of one image: busybox, and a program of each source file,
/// Rust or Go, under the file's name. The first is the entrypoint.
pub(crate) async fn build_programs(
    directory: &Path,
    image: Image,
    sources: &[PathBuf],
) -> Result<(), ImageError> {
    let root = directory.join("root");
    busybox(&root).await?;
    for source in sources {
        let program = root.join(source.file_stem().unwrap_or_default());
        if source.extension().is_some_and(|extension| extension == "go") {
            compile_go(source, &program).await?;
        } else {
            compile(source, &program).await?;
        }
    }
    let first = sources.first().and_then(|source| source.file_stem());
    let entrypoint = format!("--config.entrypoint=/{}", first.unwrap_or_default().display());
    archive(directory, image, &root, &[&entrypoint]).await?;
    std::fs::remove_dir_all(&root)?;
    Ok(())
}

/// busybox under each of its names, and the files that its tools look for.
async fn busybox(root: &Path) -> Result<(), ImageError> {
    tree(root, &["bin", "etc", "tmp"])?;
    std::fs::copy(BUSYBOX, root.join("bin/busybox"))?;
    let applets = Tool::new(BUSYBOX).arg("--list").run().await?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(accounts(root)?)
}

/// A static program of one file, which runs in an image that has nothing else.
async fn compile(source: &Path, program: &Path) -> Result<(), ToolError> {
    Tool::words("rustc --edition=2024 -O -Cpanic=abort -Cstrip=symbols -Ctarget-feature=+crt-static -o")
        .arg(program)
        .arg(source)
        // rust-toolchain.toml counts from there.
        .directory(source.parent().unwrap_or(Path::new(".")))
        .limit(Duration::from_secs(300))
        .run()
        .await
        .map(drop)
}

/// The same of one file that needs no module but Go's own library.
async fn compile_go(source: &Path, program: &Path) -> Result<(), ToolError> {
    Tool::new("go")
        .args(["build", "-trimpath", "-ldflags", "-s -w", "-o"])
        .arg(program)
        .arg(source)
        .env("CGO_ENABLED", "0")
        .limit(Duration::from_secs(600))
        .run()
        .await
        .map(drop)
}

fn rename(directory: &Path, from: &str, to: &str) -> std::io::Result<PathBuf> {
    let to = directory.join(to);
    std::fs::rename(directory.join(from), &to)?;
    Ok(to)
}

fn tree(root: &Path, directories: &[&str]) -> std::io::Result<()> {
    std::fs::create_dir_all(root)?;
    directories
        .iter()
        .try_for_each(|directory| std::fs::create_dir_all(root.join(directory)))
}

/// Images without these make tools that look up users complain.
fn accounts(root: &Path) -> std::io::Result<()> {
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    std::fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")
}

/// One layer of the tree, with the configuration, under the image's reference.
async fn archive(directory: &Path, image: Image, root: &Path, config: &[&str]) -> Result<(), ToolError> {
    let layout = directory.join(format!("layout.{}", image.name));
    let layer = directory.join(format!("layer.{}.tar", image.name));
    let tagged = format!("{}:1", layout.display());
    // Fixed owners and times: the same content gives the same image.
    Tool::words("tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf")
        .arg(&layer)
        .arg("-C")
        .arg(root)
        .arg(".")
        .run()
        .await?;
    Tool::words("umoci init --layout").arg(&layout).run().await?;
    Tool::words("umoci new --image").arg(&tagged).run().await?;
    Tool::words("umoci raw add-layer --image")
        .arg(&tagged)
        .arg(&layer)
        .run()
        .await?;
    let path = "--config.env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    Tool::words("umoci config --image")
        .arg(&tagged)
        .arg(path)
        .args(config)
        .run()
        .await?;
    let archive = directory.join(format!("{}.tar", image.name));
    Tool::words("skopeo copy --quiet --insecure-policy")
        .arg(format!("oci:{tagged}"))
        .arg(format!("oci-archive:{}:{}", archive.display(), image.reference))
        .run()
        .await?;
    std::fs::remove_dir_all(&layout).ok();
    std::fs::remove_file(&layer).ok();
    Ok(())
}
