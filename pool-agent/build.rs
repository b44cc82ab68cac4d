//! Compiles the runtime's protocol with a protoc written in Rust, so that nothing
//! has to be installed first.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["containers.proto", "cri.proto", "health.proto", "tasks.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    for file in files {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
