//! Compiles the protobuf contract with a protoc written in Rust, so that nothing
//! has to be installed first.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["workload.proto", "authorization.proto", "certificate.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    for file in files {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    // Maps in key order: the control plane's versions are hashes of the encoding.
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
