//! What is derived from the types is what stands in the repository.

use std::process::Command;

#[test]
fn generated_files_match_the_types() {
    let output = Command::new(env!("CARGO_BIN_EXE_crdgen")).arg("--check").output().expect("run crdgen");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
