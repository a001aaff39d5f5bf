//! Loads the eBPF programs and keeps their maps pinned, below `<root>/v<SCHEMA>/maps`. A new agent finds them.

use crate::carry::{STEPS, Source, Step};
use crate::flows::{EnterProgram, FlowValue, Flows};
use crate::links::Links;
use crate::test_run;
use aegis_common::{
    BlockKey, Counter, CounterValue, FORWARD_TABLE, FlowKey, ForwardValue, LoadFix, PeakKey, REVERSE_TABLE,
    ReverseValue, SCHEMA, SWEEP_BATCH, SWEEP_BLOCKS, SWEEP_CUT_SHORT, SWEEP_FLOWS, SWEEP_HEADER, SWEEP_LOADS,
    SWEEP_PEAKS, SWEEP_RESTING, SWEEP_REVERSE, SWEEP_REVOKED, TableValue,
};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use aya::programs::{CgroupSockAddr, ProgramError, ProgramFd, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
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
    "BINDS",
    "LEASE",
    "PODS",
    "HOSTS",
    "HOST_SOCKETS",
    "DESTINATIONS",
    "PORTS",
    "VERDICTS",
    "ALLOCATIONS",
    "BLOCKS",
    "FORWARD",
    "REVERSE",
    "TABLES",
    "FRAGMENTS_OUT",
    "FRAGMENTS_IN",
    "SPENT",
    "IDENTIFICATIONS",
    "ARP_ANSWERS",
    "COUNTERS",
    "PRESSURE",
    "LOADS",
    "ALL_LOADS",
    "LIMITED",
    "GROWING",
    "PULSE",
    "LIMITER",
    "METER_INDEX",
    "METERS",
    "METER_USE",
    "FREE_METERS",
    "METERS_TOLD",
    "BOUND_METERS",
    "METER_CLOCK",
    "REFUSALS",
    "REFUSALS_TOLD",
    "HANDOVER",
    "CONFIG6",
    "NETWORKS",
    "PODS6",
    "SUFFIXES",
    "DESTINATIONS6",
    "ALLOCATIONS6",
    "FLOWS6",
    "NDP_ANSWERS",
    "SINGLES",
    "ORIGINS6",
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
        /// Device, or control group.
        device: String,
        /// The kernel's reason.
        reason: String,
    },
    /// A pinned link can't be moved or removed.
    #[error("cannot move or remove {path}: {source}")]
    Link {
        /// The link, or the folder of links.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// What another version holds can't be carried over.
    #[error("cannot carry over what the version before holds: {0}")]
    Carry(#[source] io::Error),
    /// A program can't be run.
    #[error("cannot run a program: {0}")]
    Sweep(io::Error),
    /// The other one.
    #[error("cannot run the enter program: {0}")]
    Enter(io::Error),
    /// The flow tables can't be set up or read.
    #[error("flow table {name}: {source}")]
    Flows {
        /// Name of the table.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What the data plane is loaded with: entries of the maps that are sized by the user (one that is already pinned keeps its size), and
/// whether use is metered.
#[derive(Clone, Debug)]
pub struct MapSizes {
    /// Flows that may be in `FORWARD` and in `REVERSE`.
    pub flows: u32,
    /// `BLOCKS`.
    pub blocks: u32,
    /// `PODS`, two generations.
    pub pods: u32,
    /// `DESTINATIONS` and `DESTINATIONS6`, two generations.
    pub destinations: u32,
    /// `PORTS`, two generations.
    pub ports: u32,
    /// `VERDICTS`, two generations.
    pub verdicts: u32,
    /// Meters, at most [`MAX_METERS`](aegis_common::MAX_METERS).
    pub meters: u32,
    /// Whether they are used. Nobody need be told of use, and then no packet pays for it.
    pub metered: bool,
}

impl Default for MapSizes {
    fn default() -> Self {
        MapSizes {
            flows: 1 << 20,
            blocks: 1 << 16,
            pods: 1 << 12,
            destinations: 1 << 16,
            ports: 1 << 16,
            verdicts: 1 << 18,
            meters: 1 << 14,
            metered: true,
        }
    }
}

/// Loaded programs and their maps.
pub struct Dataplane {
    pub(crate) object: Ebpf,
    pub(crate) links: Links,
    /// What another version left, until it is carried over.
    pub(crate) source: Option<Arc<Source>>,
    metered: bool,
}

impl Dataplane {
    /// Loads the programs, and makes the maps or takes the pinned ones.
    pub fn load(pin_root: &Path, sizes: &MapSizes) -> Result<Dataplane, EbpfError> {
        Dataplane::load_as(pin_root, SCHEMA, sizes, STEPS)
    }

    /// The same under another number of the schema, with what is known of other schemas.
    pub fn load_as(
        pin_root: &Path,
        schema: u32,
        sizes: &MapSizes,
        known: &'static [Step],
    ) -> Result<Dataplane, EbpfError> {
        if OBJECT.is_empty() {
            return Err(EbpfError::NoObject);
        }
        let links = Links::new(pin_root, schema);
        let maps = links.maps();
        for folder in [&maps, &links.folder()] {
            fs::create_dir_all(folder)
                .map_err(|source| EbpfError::PinFolder { path: folder.clone(), source })?;
        }
        let (metered, flag) = (sizes.metered, u8::from(sizes.metered));
        let (flows, buckets) = (sizes.flows, TableValue::buckets(sizes.flows));
        let sizes = BTreeMap::from([
            ("FORWARD", buckets),
            ("REVERSE", buckets),
            ("BLOCKS", sizes.blocks),
            ("PODS", sizes.pods),
            ("HOSTS", sizes.pods),
            ("PODS6", sizes.pods),
            ("SUFFIXES", sizes.pods),
            ("DESTINATIONS", sizes.destinations),
            ("DESTINATIONS6", sizes.destinations),
            ("PORTS", sizes.ports),
            ("VERDICTS", sizes.verdicts),
            ("METER_INDEX", sizes.meters),
            ("METERS", sizes.meters),
            ("METER_USE", sizes.meters),
            ("FREE_METERS", sizes.meters),
            ("METERS_TOLD", sizes.meters),
        ]);
        check_layout(&maps)?;
        let mut loader = EbpfLoader::new();
        for (name, entries) in sizes {
            loader.map_max_entries(name, entries);
        }
        for name in PINNED {
            loader.map_pin_path(name, maps.join(name));
        }
        loader.override_global("METERED", &flag, true);
        let mut object = loader.load(OBJECT)?;
        for program in [POD_INGRESS, UPLINK_EGRESS, UPLINK_MARK] {
            classifier(&mut object, program)?
                .load()
                .map_err(|source| EbpfError::Program { program, source })?;
        }
        for program in [UPLINK_INGRESS, SWEEP, ENTER] {
            xdp(&mut object, program)?.load().map_err(|source| EbpfError::Program { program, source })?;
        }
        sock_addr(&mut object, SOCKET_CONNECT)?
            .load()
            .map_err(|source| EbpfError::Program { program: SOCKET_CONNECT, source })?;
        let mut dataplane = Dataplane { object, links, source: None, metered };
        dataplane.set_up_tables(flows)?;
        dataplane.source = dataplane.carry_from(known)?;
        Ok(dataplane)
    }

    /// Another version's maps, if what its agent wrote could be carried over.
    fn carry_from(&mut self, known: &'static [Step]) -> Result<Option<Arc<Source>>, EbpfError> {
        let Some(source) = Source::find(&self.links, known) else { return Ok(None) };
        match self.carry_written(&source) {
            Ok(()) => Ok(Some(Arc::new(source))),
            Err(error) => {
                tracing::error!(%error, "flows of the version before will be lost");
                Ok(None)
            }
        }
    }

    /// Tells the programs what the flow tables are like, unless they have been told.
    fn set_up_tables(&mut self, limit: u32) -> Result<(), EbpfError> {
        for (index, name) in [(FORWARD_TABLE, "FORWARD"), (REVERSE_TABLE, "REVERSE")] {
            if self.table(index)?.own != 0 {
                continue;
            }
            let mut seed = [[0; 8]; 2];
            std::fs::File::open("/dev/urandom")
                .and_then(|mut file| file.read_exact(seed.as_flattened_mut()))
                .map_err(|source| EbpfError::Flows { name, source })?;
            let value = TableValue::new(self.max_entries(name)?, limit, seed.map(u64::from_ne_bytes));
            let mut tables = self.array::<TableValue>("TABLES")?;
            tables.set(index, value, 0).map_err(|source| EbpfError::Map { name: "TABLES".into(), source })?;
        }
        Ok(())
    }

    /// Whether the programs meter use.
    pub fn is_metered(&self) -> bool {
        self.metered
    }

    /// What a flow table is like, by its index in `TABLES`.
    pub fn table(&mut self, index: u32) -> Result<TableValue, EbpfError> {
        let tables = self.array::<TableValue>("TABLES")?;
        tables.get(&index, 0).map_err(|source| EbpfError::Map { name: "TABLES".into(), source })
    }

    fn flows<V: FlowValue>(&self, name: &'static str) -> Result<Flows<V>, EbpfError> {
        let Some(Map::Array(map)) = self.object.map(name) else { return Err(EbpfError::Missing(name)) };
        Flows::open(map).map_err(|source| EbpfError::Flows { name, source })
    }

    /// `FORWARD`, to be read; works in another thread too.
    pub fn forward(&self) -> Result<Flows<ForwardValue>, EbpfError> {
        self.flows("FORWARD")
    }

    /// `REVERSE`, to be read; works in another thread too.
    pub fn reverse(&self) -> Result<Flows<ReverseValue>, EbpfError> {
        self.flows("REVERSE")
    }

    /// What writes both.
    pub fn enter(&self) -> Result<EnterProgram, EbpfError> {
        self.program_fd(ENTER)?.try_clone().map(EnterProgram::new).map_err(EbpfError::Enter)
    }

    /// What another version left and can be carried over.
    pub fn source(&self) -> Option<Arc<Source>> {
        self.source.clone()
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
            Some(
                Map::HashMap(data)
                | Map::LruHashMap(data)
                | Map::Array(data)
                | Map::LpmTrie(data)
                | Map::PerCpuArray(data)
                | Map::Queue(data)
                | Map::RingBuf(data),
            ) => Ok(data.fd().as_fd()),
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

    /// A handle of its own for a map, for another thread.
    pub fn handle<M>(&self, name: &'static str, kind: impl FnOnce(MapData) -> Map) -> Result<M, EbpfError>
    where
        M: TryFrom<Map, Error = aya::maps::MapError>,
    {
        let failed = |source| EbpfError::Map { name: name.into(), source };
        let fd = self.map_fd(name)?.try_clone_to_owned().map_err(|error| failed(error.into()))?;
        M::try_from(kind(MapData::from_fd(fd).map_err(failed)?)).map_err(failed)
    }

    /// `uplink_ingress`, for another thread.
    pub fn ingress(&self) -> Result<ProgramFd, EbpfError> {
        self.program_fd(UPLINK_INGRESS)?.try_clone().map_err(EbpfError::Sweep)
    }

    /// What removes flows and blocks that are over; works in another thread too.
    pub fn sweeper(&self) -> Result<SweepProgram, EbpfError> {
        let fd = self.program_fd(SWEEP)?.try_clone().map_err(EbpfError::Sweep)?;
        Ok(SweepProgram { fd })
    }
}

pub(crate) const POD_INGRESS: &str = "pod_ingress";
pub(crate) const UPLINK_EGRESS: &str = "uplink_egress";
pub(crate) const UPLINK_INGRESS: &str = "uplink_ingress";
pub(crate) const UPLINK_MARK: &str = "uplink_mark";
pub(crate) const SOCKET_CONNECT: &str = "socket_connect";
const SWEEP: &str = "sweep";
const ENTER: &str = "enter";

/// The `sweep` program.
pub struct SweepProgram {
    fd: ProgramFd,
}

impl SweepProgram {
    /// Looks at these flows again and removes those that are over. Returns how many.
    pub fn flows(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_FLOWS, keys)
    }

    /// How many of these flows are over but for the rest of their ports.
    pub fn resting(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_RESTING, keys)
    }

    /// Looks at these flows again and removes those that are over but for the rest of their ports. Returns how many.
    pub fn cut_short(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_CUT_SHORT, keys)
    }

    /// Looks at these blocks again and removes those without ports in use. Returns how many.
    pub fn blocks(&self, keys: &[BlockKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_BLOCKS, keys)
    }

    /// Looks at these entries of `REVERSE` again and removes those that no flow has. Returns how many.
    pub fn orphans(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_REVERSE, keys)
    }

    /// Looks at these flows again and ends those whose slice is not this node's. Returns how many.
    pub fn revoked(&self, keys: &[FlowKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_REVOKED, keys)
    }

    /// Lets high-water marks that have been read begin anew, unless they have risen meanwhile. Returns how many did.
    pub fn peaks(&self, peaks: &[PeakKey]) -> Result<u32, EbpfError> {
        self.run(SWEEP_PEAKS, peaks)
    }

    /// Sets counts of pods and accounts right, and removes those that are not needed any more. Returns how many it did either with.
    pub fn loads(&self, fixes: &[LoadFix]) -> Result<u32, EbpfError> {
        self.run(SWEEP_LOADS, fixes)
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

pub(crate) fn classifier<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, EbpfError> {
    object.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(EbpfError::Missing(name))
}

pub(crate) fn xdp<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, EbpfError> {
    object.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(EbpfError::Missing(name))
}

pub(crate) fn sock_addr<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, EbpfError> {
    object.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(EbpfError::Missing(name))
}

/// `COUNTERS`, by index, summed over the CPUs.
pub(crate) fn sums(
    counters: &PerCpuArray<impl Borrow<MapData>, CounterValue>,
) -> Result<Vec<CounterValue>, MapError> {
    let sum = |index: usize| {
        let values = counters.get(&(index as u32), 0)?;
        Ok(values.iter().fold(CounterValue::default(), |sum, value| CounterValue {
            packets: sum.packets + value.packets,
            bytes: sum.bytes + value.bytes,
        }))
    };
    (0..Counter::ALL.len()).map(sum).collect()
}

/// An error with the causes it hides: aya's own texts stop at "syscall failed".
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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
