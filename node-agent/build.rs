//! Compiles the eBPF programs with the same pinned toolchain and leaves the object where `src/ebpf.rs` embeds it.
//!
//! Without the BPF linker or the toolchain's `rust-src`, a release build fails with the command that installs them; a
//! debug build warns and embeds an empty object, so that checks, lints and the tests of pure code need neither.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

const TARGET: &str = "bpfel-unknown-none";

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let object = PathBuf::from(env::var("OUT_DIR")?).join("aegis.bpf.o");
    for path in ["ebpf/src", "ebpf/Cargo.toml", "common/src", "common/Cargo.toml", "build.rs"] {
        println!("cargo::rerun-if-changed={}", here.join(path).display());
    }
    // Not PATH: it is another one in each shell, and the agent would be compiled again for nothing.
    println!("cargo::rerun-if-env-changed=AEGIS_TOOLS");
    match missing() {
        None => compile(&here, &object),
        Some(what) if env::var("PROFILE")? == "release" => {
            Err(format!("{what} is missing, so the eBPF programs can't be built: run `make setup`").into())
        }
        Some(what) => {
            println!("cargo::warning={what} is missing: built without eBPF programs; run `make setup`");
            fs::write(&object, [])?;
            Ok(())
        }
    }
}

/// What the build of the programs lacks.
fn missing() -> Option<&'static str> {
    if linker().is_none() {
        return Some("bpf-linker");
    }
    let output = Command::new(env::var_os("RUSTC")?).args(["--print", "sysroot"]).output().ok()?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    (!source.exists()).then_some("the toolchain component rust-src")
}

/// The linker: from PATH, or from where `make setup` puts it.
fn linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = env::var_os("AEGIS_TOOLS")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache/aegis/tools")));
    env::split_paths(&path)
        .map(|folder| folder.join("bpf-linker"))
        .chain(tools.map(|tools| tools.join("bpf-linker/bin/bpf-linker")))
        .find(|file| file.is_file())
}

fn compile(here: &Path, object: &Path) -> Result<(), Box<dyn Error>> {
    let linker = linker().ok_or("bpf-linker is missing")?;
    // A target folder of its own, the same for all profiles: `core` is built once, and the outer cargo's lock is not
    // waited for.
    let target = target_folder(object)?.join("ebpf");
    let flags = [
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        "-Ctarget-cpu=v3".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    let mut cargo = Command::new(env::var_os("CARGO").ok_or("CARGO is not set")?);
    // What the outer cargo sets for build scripts would steer the inner one.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let keep = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_CAINFO"].contains(&name.as_str())
            || name.starts_with("CARGO_REGISTR")
            || name.starts_with("CARGO_SOURCE");
        if !keep && (name.starts_with("CARGO") || name.starts_with("RUST") && name != "RUSTUP_HOME") {
            cargo.env_remove(&name);
        }
    }
    let status = cargo
        .current_dir(here.join("ebpf"))
        .env("RUSTC", env::var_os("RUSTC").ok_or("RUSTC is not set")?)
        // `build-std` and `core_intrinsics` on the stable toolchain.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .args(["build", "--release", "-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target)
        .status()?;
    if !status.success() {
        return Err("the eBPF programs do not compile (see above)".into());
    }
    copy(&target.join(TARGET).join("release/aegis"), object)?;
    Ok(())
}

/// The workspace's target folder: OUT_DIR is `<target>[/<triple>]/<profile>/build/<package>/out`.
fn target_folder(object: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let profile = object.ancestors().nth(4).ok_or("OUT_DIR is too short")?;
    let parent = profile.parent().ok_or("OUT_DIR is too short")?;
    let triple = parent
        .file_name()
        .is_some_and(|name| name.to_string_lossy() == env::var("TARGET").unwrap_or_default());
    let folder = if triple { parent.parent().ok_or("OUT_DIR is too short")? } else { parent };
    Ok(folder.to_path_buf())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)
        .map(|_| ())
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", from.display())))
}
