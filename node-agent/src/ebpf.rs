//! Loads the eBPF programs, keeps maps and links pinned, and attaches programs to devices.
//!
//! Everything is pinned below `<root>/v<SCHEMA>`: `maps/<NAME>` and `links/<program>-<ifindex>`. A new agent finds the
//! maps, loads its own programs and puts them into the existing links: at no moment is a device without a program.

use crate::test_run;
use aegis_common::{BlockKey, FlowKey, SCHEMA, SWEEP_BATCH, SWEEP_BLOCKS, SWEEP_FLOWS, SWEEP_HEADER};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray};
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, ProgramFd, SchedClassifier, TcAttachType, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, Pod};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The compiled programs; empty in a debug build without the BPF linker.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/aegis.bpf.o"));

/// Maps that outlive the agent. (Scratch memory does not need to.)
const PINNED: &[&str] = &[
    "CONFIG",
    "ADDRESSES",
    "SLOTS",
    "PEERS",
    "PEER_INDEX",
    "HOMES",
    "HOLDINGS",
    "PODS",
    "DESTINATIONS",
    "PORTS",
    "VERDICTS",
    "ALLOCATIONS",
    "BLOCKS",
    "FORWARD",
    "REVERSE",
    "FRAGMENTS_OUT",
    "FRAGMENTS_IN",
    "COUNTERS",
    "LIMITER",
];

/// Why the data plane can't be used.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// A debug build without the BPF linker.
    #[error("this build has no eBPF programs: run `make setup` and build again")]
    NoObject,
    /// The folder for pins can't be made.
    #[error("cannot create {path}: {source} (is a bpffs mounted there?)")]
    PinFolder {
        /// The folder.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A pinned map has another layout than this version of the programs.
    #[error(
        "pinned map {path} has {found}, but this agent needs {needed}: remove {path} after draining the node"
    )]
    Layout {
        /// The pinned map.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        needed: String,
    },
    /// Programs or maps can't be loaded.
    #[error("cannot load the eBPF object: {0}")]
    Load(#[from] aya::EbpfError),
    /// A map can't be used.
    #[error("map {name}: {source}")]
    Map {
        /// Name of the map.
        name: String,
        /// Why.
        source: aya::maps::MapError,
    },
    /// Connections of a pod that is gone can't be removed.
    #[error("cannot remove connections from conntrack: {0}")]
    Conntrack(#[source] io::Error),
    /// The object lacks a program or map, or it has another type.
    #[error("the eBPF object has no usable {0}")]
    Missing(&'static str),
    /// The verifier refuses a program.
    #[error("cannot load program {program}: {source}")]
    Program {
        /// Name of the program.
        program: &'static str,
        /// The kernel's reason.
        source: ProgramError,
    },
    /// A program can't be attached.
    #[error("cannot attach {program} to {device}: {reason}")]
    Attach {
        /// Name of the program.
        program: &'static str,
        /// Device.
        device: String,
        /// The kernel's reason.
        reason: String,
    },
    /// A program can't be run.
    #[error("cannot run the sweep program: {0}")]
    Sweep(io::Error),
}

/// Entries of the maps that are sized by the user; a map that is already pinned keeps its size.
#[derive(Clone, Debug)]
pub struct MapSizes {
    /// `FORWARD` and `REVERSE`.
    pub flows: u32,
    /// `BLOCKS`.
    pub blocks: u32,
    /// `PODS`, two generations.
    pub pods: u32,
    /// `DESTINATIONS` and `PORTS`, two generations.
    pub destinations: u32,
    /// `VERDICTS`, two generations.
    pub verdicts: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        MapSizes { flows: 1 << 20, blocks: 1 << 16, pods: 1 << 12, destinations: 1 << 16, verdicts: 1 << 17 }
    }
}

/// How XDP runs on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the network stack, for drivers that lack it: correct, but slower.
    Generic,
}

/// Loaded programs and their maps.
pub struct Dataplane {
    object: Ebpf,
    links: PathBuf,
}

impl Dataplane {
    /// Loads the programs, and makes the maps or takes the pinned ones.
    pub fn load(pin_root: &Path, sizes: &MapSizes) -> Result<Dataplane, EbpfError> {
        if OBJECT.is_empty() {
            return Err(EbpfError::NoObject);
        }
        let root = pin_root.join(format!("v{SCHEMA}"));
        let (maps, links) = (root.join("maps"), root.join("links"));
        for folder in [&maps, &links] {
            fs::create_dir_all(folder)
                .map_err(|source| EbpfError::PinFolder { path: folder.clone(), source })?;
        }
        let sizes = BTreeMap::from([
            ("FORWARD", sizes.flows),
            ("REVERSE", sizes.flows),
            ("BLOCKS", sizes.blocks),
            ("PODS", sizes.pods),
            ("DESTINATIONS", sizes.destinations),
            ("PORTS", sizes.destinations),
            ("VERDICTS", sizes.verdicts),
        ]);
        check_layout(&maps)?;
        let mut loader = EbpfLoader::new();
        for (name, entries) in sizes {
            loader.map_max_entries(name, entries);
        }
        for name in PINNED {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut object = loader.load(OBJECT)?;
        for program in [POD_INGRESS, UPLINK_EGRESS] {
            classifier(&mut object, program)?
                .load()
                .map_err(|source| EbpfError::Program { program, source })?;
        }
        for program in [UPLINK_INGRESS, SWEEP] {
            xdp(&mut object, program)?.load().map_err(|source| EbpfError::Program { program, source })?;
        }
        Ok(Dataplane { object, links })
    }

    /// Attaches the classifier to a device that faces pods (tcx ingress).
    pub fn attach_pod_device(&mut self, device: &str, ifindex: u32) -> Result<(), EbpfError> {
        self.attach_tcx(POD_INGRESS, TcAttachType::Ingress, device, ifindex)
    }

    /// Attaches translation (tcx egress) and steering (XDP) to an uplink.
    pub fn attach_uplink(&mut self, device: &str, ifindex: u32) -> Result<Mode, EbpfError> {
        // Steering first: a translated packet's reply must find it.
        let mode = self.attach_xdp(device, ifindex)?;
        self.attach_tcx(UPLINK_EGRESS, TcAttachType::Egress, device, ifindex)?;
        Ok(mode)
    }

    /// Detaches all programs from a device that is gone or is not to be used any more.
    pub fn detach(&mut self, ifindex: u32) -> io::Result<()> {
        for program in [POD_INGRESS, UPLINK_EGRESS, UPLINK_INGRESS, UPLINK_INGRESS_GENERIC] {
            match fs::remove_file(self.pin(program, ifindex)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => (),
            }
        }
        Ok(())
    }

    /// Interface indices that have pinned links.
    pub fn attached(&self) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.links)? {
            let name = entry?.file_name();
            let ifindex: Option<u32> =
                name.to_string_lossy().rsplit_once('-').and_then(|(_, index)| index.parse().ok());
            found.extend(ifindex);
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// A hash map (LRU or not).
    pub fn hash<K: Pod, V: Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<HashMap<&mut MapData, K, V>, EbpfError> {
        let map = self.object.map_mut(name).ok_or(EbpfError::Missing(name))?;
        HashMap::try_from(map).map_err(|source| EbpfError::Map { name: name.into(), source })
    }

    /// An array.
    pub fn array<V: Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, V>, EbpfError> {
        let map = self.object.map_mut(name).ok_or(EbpfError::Missing(name))?;
        Array::try_from(map).map_err(|source| EbpfError::Map { name: name.into(), source })
    }

    /// A longest-prefix-match trie.
    pub fn trie<K: Pod, V: Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<LpmTrie<&mut MapData, K, V>, EbpfError> {
        let map = self.object.map_mut(name).ok_or(EbpfError::Missing(name))?;
        LpmTrie::try_from(map).map_err(|source| EbpfError::Map { name: name.into(), source })
    }

    /// A per-CPU array.
    pub fn per_cpu<V: Pod>(&self, name: &'static str) -> Result<PerCpuArray<&MapData, V>, EbpfError> {
        let map = self.object.map(name).ok_or(EbpfError::Missing(name))?;
        PerCpuArray::try_from(map).map_err(|source| EbpfError::Map { name: name.into(), source })
    }

    /// A map's file descriptor, for batch commands.
    pub fn map_fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, EbpfError> {
        match self.object.map(name) {
            Some(Map::HashMap(data) | Map::LruHashMap(data) | Map::Array(data) | Map::LpmTrie(data)) => {
                Ok(data.fd().as_fd())
            }
            _ => Err(EbpfError::Missing(name)),
        }
    }

    /// Entries that a map has room for.
    pub fn max_entries(&self, name: &'static str) -> Result<u32, EbpfError> {
        let data = match self.object.map(name) {
            Some(Map::HashMap(data) | Map::LruHashMap(data) | Map::Array(data) | Map::LpmTrie(data)) => data,
            _ => return Err(EbpfError::Missing(name)),
        };
        let info = data.info().map_err(|source| EbpfError::Map { name: name.into(), source })?;
        Ok(info.max_entries())
    }

    /// A program's file descriptor, to run it in tests.
    pub fn program_fd(&self, name: &'static str) -> Result<&ProgramFd, EbpfError> {
        let program = self.object.program(name).ok_or(EbpfError::Missing(name))?;
        program.fd().map_err(|source| EbpfError::Program { program: name, source })
    }

    /// Instructions that the verifier followed until it accepted each program; its limit is a million.
    pub fn verified(&self) -> Vec<(&str, u32)> {
        let count = |program: &aya::programs::Program| program.info().ok()?.verified_instruction_count();
        self.object.programs().filter_map(|(name, program)| Some((name, count(program)?))).collect()
    }

    /// What removes flows and blocks that are over; works in another thread too.
    pub fn sweeper(&self) -> Result<SweepProgram, EbpfError> {
        let fd = self.program_fd(SWEEP)?.try_clone().map_err(EbpfError::Sweep)?;
        Ok(SweepProgram { fd })
    }

    fn pin(&self, program: &str, ifindex: u32) -> PathBuf {
        self.links.join(format!("{program}-{ifindex}"))
    }

    /// The link that an earlier agent left for this program and device.
    fn pinned(&self, program: &str, ifindex: u32) -> Option<FdLink> {
        PinnedLink::from_pin(self.pin(program, ifindex)).ok().map(FdLink::from)
    }

    fn attach_tcx(
        &mut self,
        program: &'static str,
        kind: TcAttachType,
        device: &str,
        ifindex: u32,
    ) -> Result<(), EbpfError> {
        let path = self.pin(program, ifindex);
        let old = self.pinned(program, ifindex).and_then(|link| SchedClassifierLink::try_from(link).ok());
        let failed = |error: &dyn ToString| EbpfError::Attach {
            program,
            device: device.into(),
            reason: error.to_string(),
        };
        let classifier = classifier(&mut self.object, program)?;
        if let Some(link) = old {
            match classifier.attach_to_link(link) {
                // The pin keeps the link; this handle may go.
                Ok(_) => return Ok(()),
                // The link's device is gone, and another one has its index.
                Err(_) => fs::remove_file(&path).map_err(|error| failed(&error))?,
            }
        }
        let order = LinkOrder::default();
        let id = classifier
            .attach_with_options(device, kind, TcAttachOptions::TcxOrder(order))
            .map_err(|error| failed(&chain(&error)))?;
        let link = classifier.take_link(id).map_err(|error| failed(&chain(&error)))?;
        let link = FdLink::try_from(link).map_err(|error| failed(&error))?;
        link.pin(&path).map_err(|error| failed(&chain(&error)))?;
        Ok(())
    }

    fn attach_xdp(&mut self, device: &str, ifindex: u32) -> Result<Mode, EbpfError> {
        // The mode is part of the pin's name, since the kernel does not tell it afterwards.
        for (name, mode) in [(UPLINK_INGRESS, Mode::Native), (UPLINK_INGRESS_GENERIC, Mode::Generic)] {
            let Some(link) = self.pinned(name, ifindex).and_then(|link| XdpLink::try_from(link).ok()) else {
                continue;
            };
            let path = self.pin(name, ifindex);
            match xdp(&mut self.object, UPLINK_INGRESS)?.attach_to_link(link) {
                Ok(_) => return Ok(mode),
                Err(_) => fs::remove_file(&path).map_err(|error| EbpfError::Attach {
                    program: UPLINK_INGRESS,
                    device: device.into(),
                    reason: error.to_string(),
                })?,
            }
        }
        let failed =
            |reason: String| EbpfError::Attach { program: UPLINK_INGRESS, device: device.into(), reason };
        let native = self.pin(UPLINK_INGRESS, ifindex);
        let generic = self.pin(UPLINK_INGRESS_GENERIC, ifindex);
        let program = xdp(&mut self.object, UPLINK_INGRESS)?;
        let (id, path, mode) = match program.attach_to_if_index(ifindex, XdpMode::Driver) {
            Ok(id) => (id, native, Mode::Native),
            Err(first) => match program.attach_to_if_index(ifindex, XdpMode::Skb) {
                Ok(id) => (id, generic, Mode::Generic),
                Err(second) => {
                    return Err(failed(format!("native: {}; generic: {}", chain(&first), chain(&second))));
                }
            },
        };
        let link = program.take_link(id).map_err(|error| failed(chain(&error)))?;
        let link = FdLink::try_from(link).map_err(|error| failed(error.to_string()))?;
        link.pin(&path).map_err(|error| failed(chain(&error)))?;
        Ok(mode)
    }
}

const POD_INGRESS: &str = "pod_ingress";
const UPLINK_EGRESS: &str = "uplink_egress";
const UPLINK_INGRESS: &str = "uplink_ingress";
const UPLINK_INGRESS_GENERIC: &str = "uplink_ingress_generic";
const SWEEP: &str = "sweep";

/// The `sweep` program.
pub struct SweepProgram {
    fd: ProgramFd,
}

impl SweepProgram {
    /// Looks at these flows again and removes those that are over. Returns how many.
    pub fn flows(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_FLOWS, keys)
    }

    /// Looks at these blocks again and removes those without ports in use. Returns how many.
    pub fn blocks(&self, keys: &[BlockKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_BLOCKS, keys)
    }

    fn run<K: Pod>(&self, kind: u32, keys: &[K]) -> Result<u32, EbpfError> {
        let mut removed = 0;
        for keys in keys.chunks(SWEEP_BATCH) {
            let mut packet = vec![0; SWEEP_HEADER];
            packet[..4].copy_from_slice(&kind.to_ne_bytes());
            // SAFETY: K is plain data (aya::Pod) without padding.
            packet.extend_from_slice(unsafe {
                std::slice::from_raw_parts(keys.as_ptr().cast::<u8>(), size_of_val(keys))
            });
            removed += test_run::run(self.fd.as_fd(), &packet, &[], 1).map_err(EbpfError::Sweep)?.verdict;
        }
        Ok(removed)
    }
}

fn classifier<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, EbpfError> {
    object.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(EbpfError::Missing(name))
}

fn xdp<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, EbpfError> {
    object.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(EbpfError::Missing(name))
}

/// An error with the causes it hides: aya's own texts stop at "syscall failed".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Refuses pinned maps whose keys or values have another size than the object's: aya would take them unseen.
fn check_layout(maps: &Path) -> Result<(), EbpfError> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| EbpfError::Load(error.into()))?;
    for name in PINNED {
        let path = maps.join(name);
        let (Some(needed), true) = (object.maps.get(*name), path.exists()) else { continue };
        let failed = |source| EbpfError::Map { name: (*name).into(), source };
        let info = MapData::from_pin(&path).and_then(|map| map.info()).map_err(failed)?;
        let found = (info.key_size(), info.value_size());
        let needed = (needed.key_size(), needed.value_size());
        if found != needed {
            let text = |(key, value): (u32, u32)| format!("keys of {key} and values of {value} bytes");
            return Err(EbpfError::Layout { path, found: text(found), needed: text(needed) });
        }
    }
    Ok(())
}
