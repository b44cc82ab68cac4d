//! Compiles the container runtime's protocol, as pool-agent speaks it, for the
//! bench that uses a runtime by itself.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = "../pool-agent/proto";
    println!("cargo::rerun-if-changed={directory}/cri.proto");
    let descriptors = protox::compile(["cri.proto"], [directory])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
