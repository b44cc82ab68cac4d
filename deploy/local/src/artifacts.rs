//! The programs and images a lab runs, built from their sources.
//!
//! Ours come from cargo, which knows itself what changed. The others (the
//! Kubernetes control plane, containerd, test images) take minutes and are kept
//! in the [`Cache`] under a hash of what they are made from.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    cache::{Cache, CacheError, Key},
    images::{self, ImageError, Images},
    progress::{Progress, Step},
    tool::{Tool, ToolError},
};

/// How our own programs are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// What a user runs.
    Release,
    /// What tests run: built while the tests are.
    Dev,
}

/// Programs of other projects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Containerd {
    /// Holds containerd, its runc shim and ctr.
    pub directory: PathBuf,
    pub runc: PathBuf,
}

/// Our own programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spindrift {
    /// Where cargo put them.
    pub directory: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("cannot keep what was built")]
    Cache(#[from] CacheError),
    #[error("cannot build {what}")]
    Build {
        what: &'static str,
        #[source]
        source: ToolError,
    },
    #[error("cannot build an image")]
    Image(#[from] ImageError),
    #[error("cannot read what it is built from, or link what was built")]
    Files(#[from] std::io::Error),
    #[error("{} is missing: build it with cargo build --workspace --bins", .0.display())]
    NotBuilt(PathBuf),
}

/// Of Kubernetes, as deploy/devcluster/go.mod has it.
const KUBERNETES: &str = "v1.37.2";
/// The newest whose CRI plugin loads without other new tools. See docs/decisions.
const CONTAINERD: &str = "v2.2.3";
/// The distributions' may be older than 1.2, which cannot give a volume the owners of
/// a pod's user namespace.
const RUNC: &str = "v1.5.3";
/// What runc is linked with: seccomp filters are compiled by it.
const LIBSECCOMP: &str = "/usr/include/seccomp.h";
/// Cold, on two cores, devcluster takes under seven minutes.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// Where this workspace lies.
pub fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.ancestors().nth(2).unwrap_or(own).to_owned()
}

/// Our own programs, built if their sources changed.
pub async fn spindrift(profile: Profile, progress: &Progress) -> Result<Spindrift, ArtifactError> {
    let built = built(profile);
    let step = progress.step("Build spindrift");
    let mut cargo = Tool::words("cargo build --locked --bins")
        .args([
            // All of it: another selection has other features of the dependencies,
            // and would compile them once more.
            "--workspace",
        ])
        .directory(workspace())
        .limit(BUILD_LIMIT);
    if profile == Profile::Release {
        cargo = cargo.arg("--release");
    }
    cargo
        .run_showing(&step)
        .await
        .map_err(|source| ArtifactError::Build {
            what: "spindrift",
            source,
        })?;
    step.done_quietly();
    Ok(built)
}

/// Our own programs as some cargo build left them: for tests, which were built
/// with them.
pub fn built(profile: Profile) -> Spindrift {
    let directory = match profile {
        Profile::Release => "release",
        Profile::Dev => "debug",
    };
    Spindrift {
        directory: workspace().join("target").join(directory),
    }
}

impl Spindrift {
    pub fn program(&self, name: &str) -> Result<PathBuf, ArtifactError> {
        let path = self.directory.join(name);
        if path.is_file() {
            Ok(path)
        } else {
            Err(ArtifactError::NotBuilt(path))
        }
    }
}

impl Containerd {
    pub fn program(&self) -> PathBuf {
        self.directory.join("containerd")
    }

    pub fn ctr(&self) -> PathBuf {
        self.directory.join("ctr")
    }
}

/// The Kubernetes control plane and kubectl in one binary.
pub async fn devcluster(cache: &Cache, progress: &Progress) -> Result<PathBuf, ArtifactError> {
    let what = "the Kubernetes control plane";
    let source = workspace().join("deploy/devcluster");
    let version = KUBERNETES.trim_start_matches('v').split('.').collect::<Vec<_>>();
    // Without its version the API server says v0.0.0, and kubectl complains.
    let package = "k8s.io/component-base/version";
    let flags = format!(
        "-s -w -X {package}.gitVersion={KUBERNETES} -X {package}.gitMajor={} -X {package}.gitMinor={} \
         -X {package}.gitTreeState=clean",
        version[0], version[1]
    );
    let step = progress.step(format!("Build {what}"));
    let key = go_key(&step).await?.text(&flags);
    let key = ["main.go", "etcd.go", "go.mod", "go.sum"]
        .iter()
        .try_fold(key, |key, name| key.file(&source.join(name)))?;
    let built = cache
        .ensure::<ArtifactError>("devcluster", key, &step, async |directory: &Path| {
            go("build -v -trimpath -ldflags")
                .arg(&flags)
                .arg("-o")
                .arg(directory.join("devcluster"))
                .arg(".")
                .directory(&source)
                .run_showing(&step)
                .await
                .map_err(|source| ArtifactError::Build { what, source })
        })
        .await?;
    step.done_quietly();
    Ok(built.join("devcluster"))
}

/// Karpenter with the pool's cloud provider.
pub async fn karpenter(cache: &Cache, progress: &Progress) -> Result<PathBuf, ArtifactError> {
    let what = "Karpenter";
    let source = workspace().join("deploy/karpenter");
    let step = progress.step(format!("Build {what}"));
    let key = go_key(&step).await?.text(what);
    let mut files = vec![];
    for directory in ["", "api", "driver", "provider"] {
        for entry in std::fs::read_dir(source.join(directory))? {
            let path = entry?.path();
            let known = path.extension().and_then(|extension| extension.to_str());
            if matches!(known, Some("go" | "mod" | "sum" | "yaml")) {
                files.push(path);
            }
        }
    }
    // The order of a directory is nobody's promise.
    files.sort();
    let key = files.iter().try_fold(key, |key, path| key.file(path))?;
    let built = cache
        .ensure::<ArtifactError>("karpenter", key, &step, async |directory: &Path| {
            go("build -v -trimpath -ldflags")
                .arg("-s -w")
                .arg("-o")
                .arg(directory.join("karpenter"))
                .arg(".")
                .directory(&source)
                .run_showing(&step)
                .await
                .map_err(|source| ArtifactError::Build { what, source })
        })
        .await?;
    step.done_quietly();
    Ok(built.join("karpenter"))
}

/// containerd, its runc shim and ctr; and runc.
pub async fn containerd(cache: &Cache, progress: &Progress) -> Result<Containerd, ArtifactError> {
    let what = "containerd";
    let step = progress.step(format!("Build {what}"));
    let key = go_key(&step).await?.text(CONTAINERD);
    let directory = cache
        .ensure::<ArtifactError>("containerd", key, &step, async |directory: &Path| {
            let module = "github.com/containerd/containerd/v2/cmd";
            let programs = ["containerd", "containerd-shim-runc-v2", "ctr"];
            go("install -v -trimpath -ldflags")
                .arg("-s -w")
                .args(programs.map(|program| format!("{module}/{program}@{CONTAINERD}")))
                .env("GOBIN", directory)
                .run_showing(&step)
                .await
                .map_err(|source| ArtifactError::Build { what, source })
        })
        .await?;
    step.done_quietly();
    let runc = runc(cache, progress).await?;
    Ok(Containerd { directory, runc })
}

async fn runc(cache: &Cache, progress: &Progress) -> Result<PathBuf, ArtifactError> {
    let what = "runc";
    let step = progress.step(format!("Build {what}"));
    let key = go_key(&step).await?.text(RUNC).file(Path::new(LIBSECCOMP))?;
    let directory = cache
        .ensure::<ArtifactError>("runc", key, &step, async |directory: &Path| {
            go("install -v -trimpath -tags seccomp -ldflags")
                .arg("-s -w")
                .arg(format!("github.com/opencontainers/runc@{RUNC}"))
                // The one program with cgo: it enters namespaces before Go has threads.
                .env("CGO_ENABLED", "1")
                .env("GOBIN", directory)
                .run_showing(&step)
                .await
                .map_err(|source| ArtifactError::Build { what, source })
        })
        .await?;
    step.done_quietly();
    Ok(directory.join("runc"))
}

/// The images of the demo and of the tests, as archives to import.
pub async fn images(cache: &Cache, progress: &Progress) -> Result<Images, ArtifactError> {
    let what = "the demo's images";
    let source = workspace().join("deploy/devcluster");
    let step = progress.step(format!("Build {what}"));
    let failed = |source| ArtifactError::Build { what, source };
    let agnhost_key = go_key(&step)
        .await?
        .file(&source.join("go.mod"))?
        .file(&source.join("go.sum"))?;
    let agnhost = cache
        .ensure::<ArtifactError>("agnhost", agnhost_key.clone(), &step, async |directory: &Path| {
            go("build -v -trimpath -ldflags")
                .arg("-s -w")
                .arg("-o")
                .arg(directory.join("agnhost"))
                .arg("k8s.io/kubernetes/test/images/agnhost")
                .directory(&source)
                .run_showing(&step)
                .await
                .map_err(failed)
        })
        .await?
        .join("agnhost");
    let pause = workspace().join("deploy/local/images/pause.rs");
    let rustc = Tool::words("rustc --version")
        .directory(workspace())
        .run()
        .await
        .map_err(failed)?;
    let key = agnhost_key
        .text(images::REVISION)
        .text(&rustc)
        .file(&pause)?
        .file(Path::new(images::BUSYBOX))?;
    let directory = cache
        .ensure::<ArtifactError>("images", key, &step, async |directory: &Path| {
            Ok(images::build(directory, &agnhost, &pause, &step).await?)
        })
        .await?;
    step.done_quietly();
    Ok(Images::in_directory(directory))
}

/// An image of busybox and programs of ours, a source file each, as an archive
/// to import: for tests, which bring their own tools into pods.
pub async fn program_image(
    cache: &Cache,
    image: images::Image,
    sources: &[PathBuf],
    progress: &Progress,
) -> Result<PathBuf, ArtifactError> {
    let what = "a test image";
    let step = progress.step(format!("Build {what}"));
    let rustc = Tool::words("rustc --version")
        .directory(workspace())
        .run()
        .await
        .map_err(|source| ArtifactError::Build { what, source })?;
    let key = go_key(&step)
        .await?
        .text(images::REVISION)
        .text(image.reference)
        .text(&rustc)
        .file(Path::new(images::BUSYBOX))?;
    let key = sources.iter().try_fold(key, |key, source| key.file(source))?;
    let directory = cache
        .ensure::<ArtifactError>(image.name, key, &step, async |directory: &Path| {
            Ok(images::build_programs(directory, image, sources).await?)
        })
        .await?;
    step.done_quietly();
    Ok(directory.join(format!("{}.tar", image.name)))
}

/// Links to all of it in one directory that stays where it is: for tests of a
/// single crate, and for people.
pub async fn tools(cache: &Cache, progress: &Progress) -> Result<PathBuf, ArtifactError> {
    let devcluster = devcluster(cache, progress).await?;
    let containerd = containerd(cache, progress).await?;
    let images = images(cache, progress).await?;
    let directory = cache.root().join("tools");
    std::fs::create_dir_all(&directory)?;
    let link = |name: &str, target: &Path| {
        let new = directory.join(format!(".{name}.{}", std::process::id()));
        std::os::unix::fs::symlink(target, &new)?;
        std::fs::rename(&new, directory.join(name))
    };
    for program in ["containerd", "containerd-shim-runc-v2", "ctr"] {
        link(program, &containerd.directory.join(program))?;
    }
    link("runc", &containerd.runc)?;
    for program in ["devcluster", "kubectl"] {
        link(program, &devcluster)?;
    }
    for image in images::ALL {
        link(&format!("{}.tar", image.name), &images.archive(image))?;
    }
    Ok(directory)
}

/// Everything but runc is built without cgo: one way, so that nothing compiles twice,
/// and the programs run in any image.
fn go(words: &str) -> Tool {
    Tool::new("go")
        .args(words.split_whitespace())
        .env("CGO_ENABLED", "0")
        .limit(BUILD_LIMIT)
}

async fn go_key(step: &Step) -> Result<Key, ArtifactError> {
    step.note("looking at the Go toolchain");
    let version = go("env GOVERSION GOARCH")
        .directory(workspace().join("deploy/devcluster"))
        .run()
        .await
        .map_err(|source| ArtifactError::Build {
            what: "with Go",
            source,
        })?;
    Ok(Key::default().text(&version))
}
