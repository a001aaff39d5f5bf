//! The images of the lab: built from this checkout's static binaries.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::archive::{Archive, Image, ImageFile, superseded};
use super::process::run;
use super::state::State;

/// Static binaries need no image below them.
const TARGET: &str = "x86_64-unknown-linux-musl";

/// The workspace's profile for the lab, which is compiled in half the time of `release`. `AEGIS_PROFILE` names another one.
const PROFILE: &str = "lab";

/// Archives of everything that is installed.
pub struct Images {
    /// `aegis-operator`.
    pub operator: Archive,
    /// `aegis-node-agent`, with `nft`.
    pub agent: Archive,
    /// `aegis-collector`, where it is wanted.
    pub collector: Option<Archive>,
}

/// Compiles packages for the images. Cargo shows its own progress; nothing to do takes well under a second.
pub fn compile(packages: &[&str]) -> anyhow::Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).args(["build", "--profile", &profile(), "--target", TARGET]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    // What `cargo run` and `cargo test` tell their program about its package: some build scripts (ring's) watch these, so
    // every change between here and a shell would compile half of the dependencies again.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|it| name.starts_with(it))
        {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().context("run cargo")?;
    if !status.success() {
        bail!("cargo build of {} failed", packages.join(", "));
    }
    Ok(())
}

/// The probe's image: sandbox of every pod, and what test pods run.
pub fn probe() -> anyhow::Result<Archive> {
    let _alone = lock()?;
    let file = compiled("aegis-probe", "/probe")?;
    // Containerd starts a sandbox with the entry point alone; test pods replace it by a `command` of their own.
    let entrypoint = ["/probe", "pause"].map(str::to_owned).into();
    let image = Image { repository: "aegis.test/aegis-probe".into(), entrypoint, files: vec![file] };
    let archive = image.write(&folder())?;
    prune()?;
    Ok(archive)
}

/// Waits until no other lab makes images, and keeps others waiting until it is dropped: all write to the same files.
fn lock() -> anyhow::Result<File> {
    fs::create_dir_all(folder())?;
    let file = File::create(folder().join(".lock"))?;
    file.lock()?;
    Ok(file)
}

/// Removes archives of earlier builds that no running lab needs for a node that comes back.
fn prune() -> anyhow::Result<()> {
    let used = State::all().into_iter().flat_map(|state| state.archives.into_values()).collect();
    for path in superseded(&folder(), &used) {
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// The operator's and the agent's image, and on request the collector's.
pub fn project(with_collector: bool) -> anyhow::Result<Images> {
    let _alone = lock()?;
    let image = |name: &str, more: Vec<ImageFile>| {
        let mut files = vec![compiled(name, &format!("/{name}"))?];
        files.extend(more);
        Image { repository: format!("aegis.test/{name}"), entrypoint: vec![format!("/{name}")], files }
            .write(&folder())
    };
    let images = Images {
        operator: image("aegis-operator", Vec::new())?,
        agent: image("aegis-node-agent", with_libraries("nft")?)?,
        collector: if with_collector { Some(collector()?) } else { None },
    };
    prune()?;
    Ok(images)
}

/// The collector's image, from the program that its tests run: with SQLite it takes long to compile, and here nobody looks at its speed.
fn collector() -> anyhow::Result<Archive> {
    let name = "aegis-collector";
    let program = target().join("debug").join(name);
    if !program.exists() {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let status = cargo.current_dir(workspace()).args(["build", "--package", name]).status();
        if !status.context("run cargo")?.success() {
            bail!("cargo build of {name} failed");
        }
    }
    // Most of it is for debuggers.
    let stripped = folder().join(name);
    let (own, from) = (stripped.display().to_string(), program.display().to_string());
    run("strip", &["--strip-all", "-o", &own, &from])?;
    let mut files = vec![ImageFile::read(&stripped, &format!("/{name}"))?];
    files.extend(libraries_of(&program)?);
    Image { repository: format!("aegis.test/{name}"), entrypoint: vec![format!("/{name}")], files }
        .write(&folder())
}

/// The probe on this machine, for origins and captures.
pub fn probe_binary() -> PathBuf {
    binary("aegis-probe")
}

/// One of this checkout's static binaries.
fn compiled(name: &str, target: &str) -> anyhow::Result<ImageFile> {
    ImageFile::read(&binary(name), target).context("`make build` compiles it")
}

/// A dynamic program of this machine with its loader and all libraries it names.
fn with_libraries(program: &str) -> anyhow::Result<Vec<ImageFile>> {
    let path = ["/usr/sbin", "/sbin", "/usr/bin"]
        .into_iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.exists())
        .with_context(|| format!("{program} is not installed; run `make setup`"))?;
    let mut files = vec![ImageFile::read(&path, &format!("/usr/sbin/{program}"))?];
    files.extend(libraries_of(&path)?);
    Ok(files)
}

/// The loader of a program, and all libraries that it names.
fn libraries_of(program: &Path) -> anyhow::Result<Vec<ImageFile>> {
    let listing = run("ldd", &[&program.display().to_string()])?;
    libraries(&listing).iter().map(|library| ImageFile::read(Path::new(library), library)).collect()
}

/// Paths in the output of `ldd`.
fn libraries(listing: &str) -> BTreeSet<String> {
    listing.split_ascii_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn binary(name: &str) -> PathBuf {
    target().join(TARGET).join(profile()).join(name)
}

fn profile() -> String {
    std::env::var("AEGIS_PROFILE").unwrap_or_else(|_| PROFILE.to_owned())
}

fn folder() -> PathBuf {
    target().join("lab-images")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries_and_the_loader() {
        let listing = "\tlinux-vdso.so.1 (0x1)\n\tlibnftables.so.1 => /lib/x86_64-linux-gnu/libnftables.so.1 (0x2)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        let found: Vec<String> = libraries(listing).into_iter().collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libnftables.so.1", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
