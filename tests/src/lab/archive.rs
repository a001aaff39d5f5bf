//! Container images as docker archives, made from files of this machine: no builder, no registry, no base image.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use serde_json::json;
use sha2::{Digest, Sha256};

/// How many archives of an image stay: what one build makes and another still uses.
const KEPT: usize = 3;

/// One file of an image.
#[derive(Clone, Debug)]
pub struct ImageFile {
    /// Absolute path in the image.
    pub target: String,
    /// Contents; every file of an image is executable.
    pub contents: Vec<u8>,
}

impl ImageFile {
    /// A file of this machine, under another or the same path.
    pub fn read(source: &Path, target: &str) -> anyhow::Result<Self> {
        let contents = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        Ok(Self { target: target.to_owned(), contents })
    }
}

/// An image: what it is called without its tag, what it runs, and its files.
pub struct Image {
    /// Reference without the tag, such as `aegis.test/aegis-operator`.
    pub repository: String,
    /// Entry point; arguments of the pod follow it.
    pub entrypoint: Vec<String>,
    /// Files in any order.
    pub files: Vec<ImageFile>,
}

/// An image written to disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// Full reference. The tag is a digest of the contents, so another binary is another reference.
    pub reference: String,
    /// The docker archive.
    pub path: PathBuf,
}

impl Archive {
    /// The reference without its tag.
    pub fn repository(&self) -> &str {
        self.reference.rsplit_once(':').map_or(&self.reference, |(repository, _)| repository)
    }
}

impl Image {
    /// Writes the image as `<name>-<tag>.tar` into a folder, unless it is there already.
    pub fn write(&self, folder: &Path) -> anyhow::Result<Archive> {
        let layer = self.layer()?;
        let layer_digest = digest(&layer);
        let config = serde_json::to_vec(&json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
        }))?;
        let config_digest = digest(&config);
        let tag = &config_digest[..12];
        let reference = format!("{}:{tag}", self.repository);
        let name = self.repository.rsplit('/').next().unwrap_or(&self.repository);
        let path = folder.join(format!("{name}-{tag}.tar"));
        if path.exists() {
            // In use again: see `superseded`.
            fs::File::options().append(true).open(&path)?.set_modified(SystemTime::now())?;
            return Ok(Archive { reference, path });
        }
        fs::create_dir_all(folder)?;
        let config_name = format!("{config_digest}.json");
        let layer_name = format!("{layer_digest}/layer.tar");
        let manifest = serde_json::to_vec(
            &json!([{"Config": config_name, "RepoTags": [reference], "Layers": [layer_name]}]),
        )?;
        let mut builder = tar::Builder::new(Vec::new());
        for (name, contents) in
            [(&config_name, &config), (&layer_name, &layer), (&"manifest.json".into(), &manifest)]
        {
            append(&mut builder, name, contents, 0o644)?;
        }
        let temporary = path.with_extension("new");
        fs::write(&temporary, builder.into_inner()?).with_context(|| format!("write {}", path.display()))?;
        fs::rename(&temporary, &path)?;
        Ok(Archive { reference, path })
    }

    /// The only layer: files sorted by path, no times, so that equal files make an equal image.
    fn layer(&self) -> anyhow::Result<Vec<u8>> {
        let mut files: Vec<&ImageFile> = self.files.iter().collect();
        files.sort_by(|a, b| a.target.cmp(&b.target));
        let mut builder = tar::Builder::new(Vec::new());
        for file in files {
            append(&mut builder, file.target.trim_start_matches('/'), &file.contents, 0o755)?;
        }
        Ok(builder.into_inner()?)
    }
}

/// Which archives of a folder nobody needs any more: all but the latest few of each image, and those in use.
pub fn superseded(folder: &Path, used: &BTreeSet<PathBuf>) -> Vec<PathBuf> {
    let mut by_image: BTreeMap<String, Vec<(SystemTime, PathBuf)>> = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let image = name.strip_suffix(".tar").and_then(|stem| stem.rsplit_once('-'));
        if let (Some((image, _)), Ok(changed)) = (image, entry.metadata().and_then(|it| it.modified())) {
            by_image.entry(image.to_owned()).or_default().push((changed, entry.path()));
        }
    }
    by_image
        .into_values()
        .flat_map(|mut archives| {
            archives.sort_by(|a, b| b.cmp(a));
            archives.into_iter().skip(KEPT).map(|(_, path)| path)
        })
        .filter(|path| !used.contains(path))
        .collect()
}

fn append(builder: &mut tar::Builder<Vec<u8>>, name: &str, contents: &[u8], mode: u32) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(contents.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    builder.append_data(&mut header, name, contents).with_context(|| format!("add {name} to an archive"))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use super::*;

    fn image(contents: &[u8]) -> Image {
        let file =
            |target: &str, contents: &[u8]| ImageFile { target: target.into(), contents: contents.to_vec() };
        Image {
            repository: "aegis.test/thing".into(),
            entrypoint: vec!["/thing".into()],
            files: vec![file("/thing", contents), file("/lib/a.so", b"library")],
        }
    }

    fn entries(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(bytes);
        archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let name = entry.path().unwrap().display().to_string();
                let mut contents = Vec::new();
                entry.read_to_end(&mut contents).unwrap();
                (name, contents)
            })
            .collect()
    }

    #[test]
    fn an_archive_names_what_it_holds() {
        let folder = std::env::temp_dir().join(format!("aegis-archive-{}", std::process::id()));
        let archive = image(b"one").write(&folder).unwrap();
        let outer = entries(&fs::read(&archive.path).unwrap());
        let manifest: serde_json::Value = serde_json::from_slice(&outer["manifest.json"]).unwrap();
        assert_eq!(manifest[0]["RepoTags"][0], archive.reference.as_str());
        let layer = &outer[manifest[0]["Layers"][0].as_str().unwrap()];
        let config: serde_json::Value =
            serde_json::from_slice(&outer[manifest[0]["Config"].as_str().unwrap()]).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{}", digest(layer)));
        assert_eq!(config["config"]["Entrypoint"][0], "/thing");
        let inner = entries(layer);
        assert_eq!(inner["thing"], b"one");
        assert_eq!(inner["lib/a.so"], b"library");

        assert_eq!(image(b"one").write(&folder).unwrap(), archive, "same files, same reference");
        assert_ne!(image(b"two").write(&folder).unwrap().reference, archive.reference);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_order_of_files_does_not_matter() {
        let mut reversed = image(b"one");
        reversed.files.reverse();
        assert_eq!(reversed.layer().unwrap(), image(b"one").layer().unwrap());
    }

    #[test]
    fn old_archives_go_unless_they_are_used() {
        let folder = std::env::temp_dir().join(format!("aegis-old-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(format!("aegis-{name}.tar"));
        for (age, name) in
            ["agent-1", "agent-2", "agent-3", "agent-4", "agent-5", "probe-1"].iter().enumerate()
        {
            let file = fs::File::create(path(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(60 * age as u64)).unwrap();
        }
        assert_eq!(superseded(&folder, &BTreeSet::new()), [path("agent-4"), path("agent-5")]);
        assert_eq!(superseded(&folder, &[path("agent-5")].into()), [path("agent-4")]);
        fs::remove_dir_all(folder).unwrap();
    }
}
