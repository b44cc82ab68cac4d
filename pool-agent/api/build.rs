//! Compiles the protobuf contract with a protoc written in Rust, so that nothing
//! has to be installed first.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["pool.proto", "usage.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    for file in files {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
