//! The contract between a virtual node and the agents of its pool.
//!
//! `proto/pool.proto` is the wire; this crate parses it, once, into types that
//! cannot hold an invalid value. `virtual-node` builds a [`SandboxSpec`] from a
//! Pod, `pool-agent` receives one; both report and read a [`SandboxStatus`].
//! `proto/usage.proto` is between a host and the operator's collector of usage.
//! Nothing here does I/O or reads a clock.
//!
//! What always holds:
//! - every sandbox is named by a [`SandboxKey`]: the pod's UID and the attempt,
//!   the number that fences an older placement of the same pod;
//! - an id is safe as a file name and as a path segment of a URL;
//! - a value refused at this edge names the field, as a path in the message
//!   (`containers[0].mounts[1].volume`), and the problem ([`Invalid`]).

pub mod grant;
pub mod host;
pub mod id;
mod invalid;
pub mod peer;
pub mod refusal;
pub mod spec;
pub mod status;
pub mod tenant;

pub use grant::{Epoch, Grant};
pub use host::{Host, Pressure, Resources};
pub use id::{
    Attempt, ContainerName, HostName, Namespace, PodName, PodUid, SandboxKey, ServiceAccountName, TenantId,
    VolumeName,
};
pub use invalid::Invalid;
pub use peer::{Peer, PeerId};
pub use refusal::{Refusal, RefusalReason};
pub use spec::SandboxSpec;
pub use status::SandboxStatus;
pub use tenant::Tenant;

/// The generated messages, client and server of `spindrift.pool.v1`.
#[allow(unreachable_pub, clippy::all)]
pub mod wire {
    tonic::include_proto!("spindrift.pool.v1");
}

/// The generated messages, client and server of `spindrift.usage.v1`.
#[allow(unreachable_pub, clippy::all)]
pub mod usage_wire {
    tonic::include_proto!("spindrift.usage.v1");
}
