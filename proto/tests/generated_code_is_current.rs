//! The committed code is what `fleet.proto` gives. After an edit of the .proto:
//! `BATON_REGENERATE=1 cargo test -p baton-proto`

use std::{fs, path::Path};

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = root.join("src/generated/baton.v1.rs");
    let fresh_dir = tempfile::tempdir().unwrap();

    let descriptors = protox::compile(["fleet.proto"], [root]).unwrap();
    tonic_prost_build::configure()
        .bytes(".baton.v1")
        .out_dir(fresh_dir.path())
        .compile_fds(descriptors)
        .unwrap();
    let fresh = fs::read_to_string(fresh_dir.path().join("baton.v1.rs")).unwrap();

    if std::env::var_os("BATON_REGENERATE").is_some() {
        fs::write(&committed, &fresh).unwrap();
    }
    let committed = fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        committed == fresh,
        "src/generated/baton.v1.rs is not what fleet.proto gives: \
         run `BATON_REGENERATE=1 cargo test -p baton-proto`"
    );
}
