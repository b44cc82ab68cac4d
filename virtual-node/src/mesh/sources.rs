//! Where the mesh's state comes from. Each source ends in a snapshot of a type; the
//! rest does not know which it was. Today: the tenant's Kubernetes objects for
//! addresses. Authorization policies have no source, so there are none: Istio's
//! resource definitions are not in a cluster by default.

pub mod kubernetes;
