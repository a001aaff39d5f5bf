//! The data plane in the kernel: [`Plane`] by way of the loaded programs and their maps.

mod answers;
mod doubts;
pub mod kept;
mod resting;
mod runs;
mod six;

use crate::apply::{AnswerTable, Attached, Forget, Plane, PlaneError};
use crate::args::Args;
use crate::attach::Mode;
use crate::carry;
use crate::conntrack;
use crate::demand::Ports;
use crate::ebpf::{self, Dataplane, EbpfError, MapSizes};
use crate::fragments::{self, Fragments};
use crate::groups;
use crate::limited::Counted;
use crate::links::{Links, Pin};
use crate::meter::Maps;
use crate::network::{Device, Network};
use crate::observed::{
    Homes, NO_ALLOCATION, Observed, from_map, from_map6, from_network, to_map, to_map6, to_network,
};
use crate::ops::Op;
use crate::refused;
use crate::singles;
use crate::sweep::{self, Sweeper, Usage};
use crate::uplink::Devices;
use aegis_common::{
    AddressValue, Allocation6Value, AllocationValue, BindValue, BlockKey, BlockValue, Config, Config6,
    Counter, CounterValue, Destination6Key, DestinationKey, DestinationValue, FORWARD_TABLE,
    HOMES_PER_ADDRESS, HoldingValue, HostKey, HostValue, LeaseValue, LimitedValue, LoadKey, LoadValue,
    Network as Net6, NetworkValue, PeerValue, Pod6Key, Pod6Value, PodKey, PodValue, PortKey, PressureValue,
    RULES_COUNTED, RuleValue, SLOTS_PER_ADDRESS, SingleValue, SlotValue, SuffixValue, TO_POD, TO_UPLINK,
    VerdictKey, VerdictValue, incarnation,
};
use aegis_core::egress::Egress;
use answers::Answers;
use aya::maps::Map;
use aya::maps::lpm_trie::Key;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kept::Kept;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// The programs of one node, with what is attached where.
pub struct Kernel {
    dataplane: Dataplane,
    uplinks: BTreeMap<u32, (Device, Mode)>,
    pods: BTreeMap<u32, Device>,
    /// What `DEVICES` says.
    named: BTreeMap<u32, u32>,
    /// What has programs of an agent with another schema, until they are taken over.
    inherited: Attached,
    /// There is something to take over.
    inherits: bool,
    /// Flows that may be in the tables.
    flows: u32,
}

/// Loads the programs and makes the maps, or takes over what is pinned.
pub fn open(args: &Args) -> Result<Box<dyn Plane>, PlaneError> {
    let sizes = MapSizes {
        flows: args.max_flows,
        blocks: args.max_blocks,
        destinations: args.max_destinations,
        meters: args.max_meters,
        metered: args.usage_collector.is_some(),
        ..MapSizes::default()
    };
    let mut dataplane =
        Dataplane::load_as(&args.pin_root, args.schema(), &sizes, carry::STEPS).map_err(load)?;
    let flows = dataplane.table(FORWARD_TABLE).map_err(load)?.limit;
    let blocks = dataplane.max_entries("BLOCKS").map_err(load)?;
    let destinations = dataplane.max_entries("DESTINATIONS").map_err(load)?;
    let meters = dataplane.max_entries("METER_USE").map_err(load)?;
    for (map, flag, size, wanted) in [
        ("FORWARD", "--max-flows", flows, sizes.flows),
        ("BLOCKS", "--max-blocks", blocks, sizes.blocks),
        ("DESTINATIONS", "--max-destinations", destinations, sizes.destinations),
        ("METER_USE", "--max-meters", meters, sizes.meters),
    ] {
        if size != wanted {
            tracing::warn!(
                "{map} is pinned and keeps its size of {size}, though {flag} says {wanted}: to change it, drain the node, stop \
                 this agent, remove {} and start it again",
                args.pin_root.display()
            );
        }
    }
    let mut config = dataplane.array::<Config>("CONFIG").map_err(load)?;
    let mut value = config.get(&0, 0).map_err(load)?;
    if value.seed == 0 {
        // Made once, so that the order of ports stays the same over restarts and nobody can guess it.
        let mut seed = [0; 4];
        std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed)).map_err(load)?;
        value.seed = u32::from_ne_bytes(seed) | 1;
        config.set(0, value, 0).map_err(load)?;
    }
    if value.host_levels != 0
        && let Err(error) = name_own_pod(&mut dataplane, args, value.generation)
    {
        tracing::warn!(%error, "what this agent sends may be held like that of an unknown pod");
    }
    Ok(Box::new(Kernel {
        dataplane,
        uplinks: BTreeMap::new(),
        pods: BTreeMap::new(),
        named: BTreeMap::new(),
        inherited: Attached::default(),
        inherits: true,
        flows,
    }))
}

/// Sockets of pods that nobody has named yet are held from where something is covered; those of this agent's pod must not wait for
/// the API server's word.
fn name_own_pod(dataplane: &mut Dataplane, args: &Args, generation: u32) -> anyhow::Result<()> {
    let groups = groups::read(&args.cgroups)?;
    let Some(group) = groups.pods.get(&args.pod_uid) else { return Ok(()) };
    let value = HostValue { class: 0, incarnation: incarnation(&args.pod_uid) };
    let key = HostKey { group: group.number, generation, pad: 0 };
    Ok(dataplane.hash::<HostKey, HostValue>("HOSTS")?.insert(key, value, 0)?)
}

fn load(error: impl std::error::Error) -> PlaneError {
    PlaneError::Load(chain(&error))
}

/// An error with its causes, unless its text has them already.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl Kernel {
    fn for_each<K: aya::Pod, V: aya::Pod>(
        &self,
        map: &'static str,
        each: impl FnMut(&K, &V),
    ) -> Result<(), PlaneError> {
        let failed = |error: &dyn std::error::Error| PlaneError::Read { map, reason: chain(error) };
        let fd = self.dataplane.map_fd(map).map_err(|error| failed(&error))?;
        sweep::for_each(fd, each).map_err(|error| failed(&error))
    }

    fn read_policy(&self, observed: &mut Observed) -> Result<(), PlaneError> {
        let generations = &mut observed.generations;
        self.for_each("PODS", |key: &PodKey, value: &PodValue| {
            generations.entry(key.generation).or_default().pods.insert(from_map(key.address), *value);
        })?;
        self.for_each("HOSTS", |key: &HostKey, value: &HostValue| {
            generations.entry(key.generation).or_default().hosts.insert(key.group, *value);
        })?;
        self.for_each("DESTINATIONS", |key: &Key<DestinationKey>, value: &DestinationValue| {
            let (data, length) = (key.data(), key.prefix_len().saturating_sub(32));
            let destinations = &mut generations.entry(data.generation).or_default().destinations;
            destinations.extend(
                Ipv4Net::new(from_map(data.address), length as u8).map(|net| (net.into(), value.class)),
            );
        })?;
        self.for_each("PODS6", |key: &Pod6Key, value: &Pod6Value| {
            generations.entry(key.generation).or_default().pods6.insert(from_map6(key.address), *value);
        })?;
        self.for_each("DESTINATIONS6", |key: &Key<Destination6Key>, value: &DestinationValue| {
            let (data, length) = (key.data(), key.prefix_len().saturating_sub(32));
            let destinations = &mut generations.entry(data.generation).or_default().destinations;
            destinations.extend(
                Ipv6Net::new(from_map6(data.address), length as u8).map(|net| (net.into(), value.class)),
            );
        })?;
        self.for_each("PORTS", |key: &Key<PortKey>, value: &u32| {
            let (data, length) = (key.data(), key.prefix_len().saturating_sub(48));
            let ports = &mut generations.entry(data.generation).or_default().ports;
            ports.insert((data.protocol as u8, u16::from_be(data.port), length as u8), *value);
        })?;
        self.for_each("VERDICTS", |key: &VerdictKey, value: &VerdictValue| {
            let verdicts = &mut generations.entry(key.generation).or_default().verdicts;
            verdicts.insert((key.pod_class, key.destination_class, key.port_class), *value);
        })
    }

    fn hash<K: aya::Pod, V: aya::Pod>(
        &mut self,
        map: &'static str,
        key: K,
        value: Option<V>,
    ) -> Result<(), EbpfError> {
        let mut handle = self.dataplane.hash::<K, V>(map)?;
        let result = match value {
            Some(value) => handle.insert(key, value, 0),
            None => gone(handle.remove(&key)),
        };
        result.map_err(|source| EbpfError::Map { name: map.into(), source })
    }

    fn array<V: aya::Pod>(&mut self, map: &'static str, index: u32, value: V) -> Result<(), EbpfError> {
        let mut handle = self.dataplane.array::<V>(map)?;
        handle.set(index, value, 0).map_err(|source| EbpfError::Map { name: map.into(), source })
    }

    fn trie<K: aya::Pod, V: aya::Pod>(
        &mut self,
        map: &'static str,
        key: &Key<K>,
        value: Option<V>,
    ) -> Result<(), EbpfError> {
        let mut handle = self.dataplane.trie::<K, V>(map)?;
        let result = match value {
            Some(value) => handle.insert(key, value, 0),
            None => gone(handle.remove(key)),
        };
        result.map_err(|source| EbpfError::Map { name: map.into(), source })
    }

    /// Tells the programs between which devices the fast path goes: those on which nothing is wrong.
    fn name_devices(&mut self, errors: &BTreeMap<String, String>) -> Result<(), EbpfError> {
        let uplinks = self.uplinks.iter().map(|(index, (device, _))| (*index, device, TO_UPLINK));
        let pods = self.pods.iter().map(|(index, device)| (*index, device, TO_POD));
        let sound = uplinks.chain(pods).filter(|(_, device, _)| !errors.contains_key(&device.name));
        let named: BTreeMap<u32, u32> = sound.map(|(index, _, kind)| (index, kind)).collect();
        for (index, kind) in &named {
            if self.named.get(index) != Some(kind) {
                self.hash("DEVICES", *index, Some(*kind))?;
            }
        }
        let gone: Vec<u32> = self.named.keys().filter(|index| !named.contains_key(index)).copied().collect();
        for index in gone {
            self.hash::<u32, u32>("DEVICES", index, None)?;
        }
        self.named = named;
        Ok(())
    }

    /// Live generation of the policy; 0 before the first.
    fn generation(&mut self) -> u32 {
        let config = self.dataplane.array::<Config>("CONFIG").and_then(|config| {
            config.get(&0, 0).map_err(|source| EbpfError::Map { name: "CONFIG".into(), source })
        });
        config.map_or(0, |config| config.generation)
    }

    fn destination(
        &mut self,
        generation: u32,
        destination: IpNet,
        value: Option<DestinationValue>,
    ) -> Result<(), EbpfError> {
        let length = 32 + u32::from(destination.prefix_len());
        match destination.network() {
            IpAddr::V4(address) => {
                let key = Key::new(length, DestinationKey { generation, address: to_map(address) });
                self.trie("DESTINATIONS", &key, value)
            }
            IpAddr::V6(address) => {
                let key = Key::new(length, Destination6Key { generation, address: to_map6(address) });
                self.trie("DESTINATIONS6", &key, value)
            }
        }
    }

    fn network(&mut self, network: Egress, value: Option<NetworkValue>) -> Result<(), EbpfError> {
        // IPv4 addresses are elsewhere.
        to_network(network).map_or(Ok(()), |key| self.hash::<Net6, NetworkValue>("NETWORKS", key, value))
    }

    fn write_op(&mut self, op: &Op) -> Result<(), EbpfError> {
        match *op {
            Op::SetConfig(config) => self.array("CONFIG", 0, config),
            Op::SetPeer { index, value } => self.array("PEERS", index, value),
            Op::IndexPeer { address, index } => self.hash("PEER_INDEX", to_map(address), Some(index)),
            Op::UnindexPeer { address } => self.hash::<u32, u32>("PEER_INDEX", to_map(address), None),
            Op::SetSlot { index, slice, value } => {
                self.array("SLOTS", index * SLOTS_PER_ADDRESS + u32::from(slice), value)
            }
            Op::SetHomes { index, homes } => (0..HOMES_PER_ADDRESS)
                .zip(homes)
                .try_for_each(|(home, peer)| self.array("HOMES", index * HOMES_PER_ADDRESS + home, peer)),
            Op::SetAddress { address, value } => self.hash("ADDRESSES", to_map(address), Some(value)),
            Op::RemoveAddress { address } => {
                self.hash::<u32, AddressValue>("ADDRESSES", to_map(address), None)
            }
            Op::SetSingle { stand_in, address } => {
                let value = SingleValue { address: to_map6(address) };
                self.hash("SINGLES", to_map(stand_in), Some(value))
            }
            Op::RemoveSingle { stand_in } => self.hash::<u32, SingleValue>("SINGLES", to_map(stand_in), None),
            Op::SetHolding { address, value } => self.hash("HOLDINGS", to_map(address), Some(value)),
            Op::RemoveHolding { address } => {
                self.hash::<u32, HoldingValue>("HOLDINGS", to_map(address), None)
            }
            Op::SetBinds { address, value } => self.hash("BINDS", to_map(address), Some(value)),
            Op::RemoveBinds { address } => self.hash::<u32, BindValue>("BINDS", to_map(address), None),
            Op::SetGrowing { address } => self.hash("GROWING", to_map(address), Some(1u32)),
            Op::RemoveGrowing { address } => self.hash::<u32, u32>("GROWING", to_map(address), None),
            Op::SetLease(lease) => self.array("LEASE", 0, lease),
            Op::SetAllocation { index, value } => self.array("ALLOCATIONS", index, value),
            Op::SetPod { generation, address, value } => {
                self.hash("PODS", PodKey { generation, address: to_map(address) }, Some(value))
            }
            Op::Settle => {
                settle();
                Ok(())
            }
            Op::ForgetConnections { address } => {
                conntrack::forget(address).map(drop).map_err(EbpfError::Conntrack)
            }
            Op::RemovePod { generation, address } => {
                self.hash::<_, PodValue>("PODS", PodKey { generation, address: to_map(address) }, None)
            }
            Op::SetHost { generation, group, value } => {
                self.hash("HOSTS", HostKey { group, generation, pad: 0 }, Some(value))
            }
            Op::RemoveHost { generation, group } => {
                self.hash::<_, HostValue>("HOSTS", HostKey { group, generation, pad: 0 }, None)
            }
            Op::SetDestination { generation, destination, class } => {
                self.destination(generation, destination, Some(DestinationValue { class }))
            }
            Op::RemoveDestination { generation, destination } => {
                self.destination(generation, destination, None)
            }
            Op::SetConfig6(config) => self.array("CONFIG6", 0, config),
            Op::SetNetwork { network, value } => self.network(network, Some(value)),
            Op::RemoveNetwork { network } => self.network(network, None),
            Op::SetAllocation6 { index, value } => self.array("ALLOCATIONS6", index, value),
            Op::SetSuffix { suffix, address } => {
                let value = SuffixValue { address: to_map6(address) };
                self.hash("SUFFIXES", suffix.to_be(), Some(value))
            }
            Op::RemoveSuffix { suffix } => self.hash::<u32, SuffixValue>("SUFFIXES", suffix.to_be(), None),
            Op::SetPod6 { generation, address, value } => {
                self.hash("PODS6", Pod6Key { generation, address: to_map6(address) }, Some(value))
            }
            Op::RemovePod6 { generation, address } => {
                self.hash::<_, Pod6Value>("PODS6", Pod6Key { generation, address: to_map6(address) }, None)
            }
            Op::SetPort { generation, port, class } => {
                self.trie("PORTS", &port_key(generation, port), Some(class))
            }
            Op::RemovePort { generation, port } => {
                self.trie::<_, u32>("PORTS", &port_key(generation, port), None)
            }
            Op::SetVerdict { generation, verdict, value } => {
                self.hash("VERDICTS", verdict_key(generation, verdict), Some(value))
            }
            Op::RemoveVerdict { generation, verdict } => {
                self.hash::<_, VerdictValue>("VERDICTS", verdict_key(generation, verdict), None)
            }
        }
    }
}

/// Waits for an RCU grace period: programs run within read-side sections.
pub(crate) fn settle() {
    // SAFETY: no pointers. MEMBARRIER_CMD_GLOBAL waits for a grace period (`synchronize_rcu`).
    let waited = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) } == 0;
    if !waited {
        // Not to be had (with `nohz_full`, for example): no packet is in a program for as long as this.
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Removing what is not there is no failure.
fn gone(result: Result<(), aya::maps::MapError>) -> Result<(), aya::maps::MapError> {
    match result {
        Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(aya::maps::MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn port_key(generation: u32, (protocol, port, length): crate::observed::PortEntry) -> Key<PortKey> {
    let data = PortKey { generation, protocol: protocol.into(), port: port.to_be() };
    Key::new(48 + u32::from(length), data)
}

fn verdict_key(generation: u32, entry: crate::observed::VerdictEntry) -> VerdictKey {
    let (pod_class, destination_class, port_class) = entry;
    VerdictKey { generation, pod_class, destination_class, port_class }
}

impl Plane for Kernel {
    fn read(&mut self) -> Result<Observed, PlaneError> {
        let mut observed = Observed::default();
        self.for_each("CONFIG", |_: &u32, value: &Config| observed.config = *value)?;
        self.for_each("PEERS", |index: &u32, value: &PeerValue| {
            if value.address != 0 {
                observed.peers.insert(*index, *value);
            }
        })?;
        self.for_each("PEER_INDEX", |address: &u32, index: &u32| {
            observed.peer_index.insert(from_map(*address), *index);
        })?;
        self.for_each("ADDRESSES", |address: &u32, value: &AddressValue| {
            observed.addresses.insert(from_map(*address), *value);
        })?;
        self.for_each("SINGLES", |stand_in: &u32, value: &SingleValue| {
            observed.singles.extend([singles::entry(*stand_in, value.address)]);
        })?;
        self.for_each("SLOTS", |index: &u32, value: &SlotValue| {
            if *value != SlotValue::default() {
                let (address, slice) = (index / SLOTS_PER_ADDRESS, index % SLOTS_PER_ADDRESS);
                observed.slots.insert((address, slice as u8), *value);
            }
        })?;
        self.for_each("HOMES", |index: &u32, peer: &u32| {
            if *peer != 0 {
                let homes = observed.homes.entry(index / HOMES_PER_ADDRESS).or_insert_with(Homes::default);
                homes[(index % HOMES_PER_ADDRESS) as usize] = *peer;
            }
        })?;
        self.for_each("HOLDINGS", |address: &u32, value: &HoldingValue| {
            observed.holdings.insert(from_map(*address), *value);
        })?;
        self.for_each("BINDS", |address: &u32, value: &BindValue| {
            observed.binds.insert(from_map(*address), *value);
        })?;
        self.for_each("GROWING", |address: &u32, _: &u32| {
            observed.growing.insert(from_map(*address));
        })?;
        self.for_each("LEASE", |_: &u32, value: &LeaseValue| observed.lease = *value)?;
        self.for_each("ALLOCATIONS", |index: &u32, value: &AllocationValue| {
            if *value != NO_ALLOCATION {
                observed.allocations.insert(*index, *value);
            }
        })?;
        self.for_each("CONFIG6", |_: &u32, value: &Config6| observed.config6 = *value)?;
        self.for_each("NETWORKS", |network: &Net6, value: &NetworkValue| {
            observed.networks.insert(from_network(*network), *value);
        })?;
        self.for_each("SUFFIXES", |suffix: &u32, value: &SuffixValue| {
            observed.suffixes.insert(u32::from_be(*suffix), from_map6(value.address));
        })?;
        self.for_each("ALLOCATIONS6", |index: &u32, value: &Allocation6Value| {
            if value.count != 0 {
                observed.allocations6.insert(*index, *value);
            }
        })?;
        self.read_policy(&mut observed)?;
        Ok(observed)
    }

    fn write_some(&mut self, ops: &[Op]) -> (usize, Result<(), PlaneError>) {
        let Some(first) = ops.first() else { return (0, Ok(())) };
        if let Some((map, run)) = runs::of(ops) {
            return runs::write(&self.dataplane, map, run);
        }
        match self.write(first) {
            Ok(()) => (1, Ok(())),
            Err(error) => (0, Err(error)),
        }
    }

    fn write(&mut self, op: &Op) -> Result<(), PlaneError> {
        self.write_op(op).map_err(|error| PlaneError::Write { op: format!("{op:?}"), reason: chain(&error) })
    }

    fn counters(&self) -> Result<Vec<CounterValue>, PlaneError> {
        let failed =
            |error: &dyn std::error::Error| PlaneError::Read { map: "COUNTERS", reason: chain(error) };
        let map = self.dataplane.per_cpu::<CounterValue>("COUNTERS").map_err(|error| failed(&error))?;
        ebpf::sums(&map).map_err(|error| failed(&error))
    }

    fn pressure(&self, numbers: &BTreeSet<u32>) -> Result<BTreeMap<u32, PressureValue>, PlaneError> {
        let failed =
            |error: &dyn std::error::Error| PlaneError::Read { map: "PRESSURE", reason: chain(error) };
        let map = self.dataplane.per_cpu::<PressureValue>("PRESSURE").map_err(|error| failed(&error))?;
        let sum = |index: &u32| {
            let values = map.get(index, 0).map_err(|error| failed(&error))?;
            let sum = values.iter().fold(PressureValue::default(), |sum, value| PressureValue {
                refused: sum.refused + value.refused,
                waited: sum.waited + value.waited,
            });
            Ok((*index, sum))
        };
        numbers.iter().map(sum).collect()
    }

    fn limited(&self, numbers: &BTreeSet<u32>) -> Result<BTreeMap<u32, Counted>, PlaneError> {
        let failed =
            |error: &dyn std::error::Error| PlaneError::Read { map: "LIMITED", reason: chain(error) };
        let map = self.dataplane.per_cpu::<LimitedValue>("LIMITED").map_err(|error| failed(&error))?;
        let sum = |index: &u32| {
            let values = map.get(index, 0).map_err(|error| failed(&error))?;
            let sum = values.iter().fold(LimitedValue::default(), |sum, value| LimitedValue {
                pod_flows: sum.pod_flows + value.pod_flows,
                pod_rate: sum.pod_rate + value.pod_rate,
                account_flows: sum.account_flows + value.account_flows,
                account_rate: sum.account_rate + value.account_rate,
            });
            Ok((*index, Counted { limits: sum, ..Counted::default() }))
        };
        let mut counted: BTreeMap<u32, Counted> = numbers.iter().map(sum).collect::<Result<_, _>>()?;
        self.for_each("LOADS", |key: &LoadKey, load: &LoadValue| {
            if load.refused > 0
                && let Some((address, incarnation)) = key.whose_pod()
                && let Some(counted) = counted.get_mut(&key.allocation)
            {
                counted.pods.insert((from_map(address), incarnation), load.refused);
            }
        })?;
        Ok(counted)
    }

    fn rules(&self, count: usize) -> Result<[Vec<RuleValue>; 2], PlaneError> {
        let failed = |error: &dyn std::error::Error| PlaneError::Read { map: "RULES", reason: chain(error) };
        let map = self.dataplane.per_cpu::<RuleValue>("RULES").map_err(|error| failed(&error))?;
        let count = u32::try_from(count).unwrap_or(RULES_COUNTED).min(RULES_COUNTED);
        let sum = |index: u32| {
            let values = map.get(&index, 0).map_err(|error| failed(&error))?;
            Ok(values.iter().fold(RuleValue::default(), |sum, value| sum.plus(value)))
        };
        let half = |first: u32| (first..first + count).map(sum).collect::<Result<Vec<_>, PlaneError>>();
        Ok([half(0)?, half(RULES_COUNTED)?])
    }

    fn beat(&mut self) -> Result<u64, PlaneError> {
        let failed =
            |error: &dyn std::error::Error| PlaneError::Read { map: "COUNTERS", reason: chain(error) };
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_err(|e| failed(&e))?;
        let wrote = self.array("PULSE", 0, now.tv_sec() as u32);
        wrote.map_err(|error| PlaneError::Write { op: "PULSE".to_owned(), reason: chain(&error) })?;
        let map = self.dataplane.per_cpu::<CounterValue>("COUNTERS").map_err(|error| failed(&error))?;
        let sum = |counter: Counter| {
            let values = map.get(&(counter as u32), 0).map_err(|error| failed(&error))?;
            Ok::<u64, PlaneError>(values.iter().map(|value| value.packets).sum())
        };
        Ok(sum(Counter::PastHighWater)? + sum(Counter::DropWaiting)? + sum(Counter::RefuseNoSocketPort)?)
    }

    fn ports(&self) -> Result<Ports, PlaneError> {
        let mut usage = Usage::default();
        self.for_each("BLOCKS", |key: &BlockKey, value: &BlockValue| usage.add_block(key, value))?;
        Ok(usage.ports)
    }

    fn unresolved(&self, seconds: u32) -> Result<BTreeSet<Ipv4Addr>, PlaneError> {
        let failed = |error: nix::Error| PlaneError::Read { map: "UNRESOLVED", reason: error.to_string() };
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_err(failed)?;
        let mut found = BTreeSet::new();
        self.for_each("UNRESOLVED", |next_hop: &u32, wanted: &u32| {
            if (now.tv_sec() as u32).saturating_sub(*wanted) <= seconds {
                found.insert(from_map(*next_hop));
            }
        })?;
        Ok(found)
    }

    fn attach(&mut self, devices: &Devices, existing: &BTreeSet<u32>) -> BTreeMap<String, String> {
        let mut errors = BTreeMap::new();
        // A device keeps its programs for as long as it exists: a route that flaps must not uncover anything.
        self.uplinks.retain(|index, _| existing.contains(index));
        self.pods.retain(|index, _| existing.contains(index));
        if let Err(error) = self.dataplane.detach_all_but(existing) {
            errors.insert("pinned links".to_owned(), chain(&error));
        }
        let inherited = self.dataplane.inherited(existing);
        self.inherited = Attached::default();
        self.inherits = self.dataplane.inherits(existing);
        if self.inherits {
            // Programs of an agent with another schema go on until the own maps hold a policy: empty ones cover nothing.
            if self.generation() == 0 {
                let known = |index| devices.uplinks.get(&index).or(devices.pods.get(&index));
                self.inherited = by_pins(&inherited, |index| Some(known(index)?.name.clone()));
                return errors;
            }
            let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
            let now = now.map_or(0, |now| now.tv_sec() as u32);
            if let Err(error) = self.dataplane.take_over(existing, now) {
                errors.insert("pinned links".to_owned(), chain(&error));
            }
            self.inherits = self.dataplane.inherits(existing);
        }
        let same = |known: &Device, device: &Device| (&known.name, known.mac) == (&device.name, device.mac);
        for (index, device) in &devices.uplinks {
            if self.uplinks.get(index).is_some_and(|(known, _)| same(known, device)) {
                if let Err(error) = self.dataplane.check_uplink(&device.name, *index) {
                    errors.insert(device.name.clone(), chain(&error));
                }
                continue;
            }
            match self.dataplane.attach_uplink(&device.name, *index) {
                Ok(mode) => _ = self.uplinks.insert(*index, (device.clone(), mode)),
                Err(error) => _ = errors.insert(device.name.clone(), chain(&error)),
            }
        }
        for (index, device) in &devices.pods {
            if self.pods.get(index).is_some_and(|known| same(known, device)) {
                if let Err(error) = self.dataplane.check_pod_device(&device.name, *index) {
                    errors.insert(device.name.clone(), chain(&error));
                }
                continue;
            }
            match self.dataplane.attach_pod_device(&device.name, *index) {
                Ok(()) => _ = self.pods.insert(*index, device.clone()),
                Err(error) => _ = errors.insert(device.name.clone(), chain(&error)),
            }
        }
        if let Err(error) = self.name_devices(&errors) {
            errors.insert("the fast path".to_owned(), chain(&error));
        }
        errors
    }

    fn attach_sockets(&mut self, cgroups: &Path) -> Result<(), PlaneError> {
        self.dataplane.attach_sockets(&groups::hierarchy(cgroups)).map_err(load)
    }

    fn attached(&self) -> Attached {
        let mode = |mode: &Mode| match mode {
            Mode::Native => "Native".to_owned(),
            Mode::Generic => "Generic".to_owned(),
        };
        let mut attached = self.inherited.clone();
        let uplinks = self.uplinks.iter();
        attached
            .uplinks
            .extend(uplinks.map(|(index, (device, how))| (*index, (device.name.clone(), mode(how)))));
        attached.pods.extend(self.pods.iter().map(|(index, device)| (*index, device.name.clone())));
        attached
    }

    fn inherits(&self) -> bool {
        self.inherits
    }

    fn sweeper(&mut self) -> Result<Sweeper, PlaneError> {
        let failed = |error: &dyn std::error::Error| PlaneError::Sweeper(chain(error));
        let tables = Kept::new(&self.dataplane).map_err(|error| failed(&error))?;
        Sweeper::start(tables).map_err(|error| failed(&error))
    }

    fn meters(&self) -> Result<Maps, PlaneError> {
        Maps::open(&self.dataplane).map_err(|error| PlaneError::Read { map: "METERS", reason: chain(&error) })
    }

    fn fragments(&self) -> Result<Fragments, PlaneError> {
        let failed = |error: &dyn std::error::Error| PlaneError::Fragments(chain(error));
        let tables = || -> Result<fragments::Tables, EbpfError> {
            Ok(fragments::Tables {
                early: self.dataplane.handle("EARLY", Map::RingBuf)?,
                firsts: self.dataplane.handle("FRAGMENTS_IN", Map::LruHashMap)?,
                slots: self.dataplane.handle("SLOTS", Map::Array)?,
                peers: self.dataplane.handle("PEERS", Map::Array)?,
                config: self.dataplane.handle("CONFIG", Map::Array)?,
                program: self.dataplane.ingress()?,
            })
        };
        Fragments::start(tables().map_err(|error| failed(&error))?).map_err(|error| failed(&error))
    }

    fn answers(&self) -> Result<Box<dyn AnswerTable>, PlaneError> {
        let failed =
            |error: &dyn std::error::Error| PlaneError::Read { map: "ARP_ANSWERS", reason: chain(error) };
        Ok(Box::new(Answers::new(&self.dataplane).map_err(|error| failed(&error))?))
    }

    fn forget_refused(&self, mark: u32) -> Result<Forget, PlaneError> {
        let failed =
            |error: &dyn std::error::Error| PlaneError::Read { map: "FORWARD", reason: chain(error) };
        let forward = self.dataplane.forward().map_err(|error| failed(&error))?;
        let map = |name| {
            let map = self.dataplane.map_fd(name).map_err(|error| failed(&error))?;
            map.try_clone_to_owned().map_err(|error| failed(&error))
        };
        let (flows, suffixes, config) = (map("FLOWS6")?, map("SUFFIXES")?, map("CONFIG")?);
        Ok(Box::new(move || {
            let mut seed = 0;
            sweep::for_each(config.as_fd(), |_: &u32, config: &Config| seed = config.seed)?;
            let six = refused::Six { flows: flows.as_fd(), suffixes: suffixes.as_fd(), seed };
            refused::forget(&forward, six, mark)
        }))
    }

    fn sizes(&self) -> Vec<(&'static str, u64)> {
        let maps = [
            ("blocks", "BLOCKS"),
            ("pods", "PODS"),
            ("hosts", "HOSTS"),
            ("pods6", "PODS6"),
            ("flows6", "FLOWS6"),
            ("destinations", "DESTINATIONS"),
            ("ports", "PORTS"),
            ("verdicts", "VERDICTS"),
        ];
        let size = |(name, map)| Some((name, self.dataplane.max_entries(map).ok()?.into()));
        std::iter::once(("flows", self.flows.into())).chain(maps.into_iter().filter_map(size)).collect()
    }
}

/// Devices that have programs by what is pinned: programs of an earlier agent go on even if this one can't load its own.
pub fn pinned(args: &Args, network: &Network) -> Attached {
    let own = Links::new(&args.pin_root, args.schema());
    let all = own.others().into_iter().chain([own]);
    let pins: Vec<Pin> = all.filter_map(|links| links.pins().ok()).flatten().collect();
    by_pins(&pins, |index| Some(network.devices.get(&index)?.name.clone()))
}

/// Devices that have programs by what is pinned, if they have a name.
fn by_pins(pins: &[Pin], name: impl Fn(u32) -> Option<String>) -> Attached {
    let mut attached = Attached::default();
    for pin in pins {
        let Some(name) = name(pin.ifindex) else { continue };
        match pin.program.as_str() {
            "uplink_egress" => _ = attached.uplinks.insert(pin.ifindex, (name, "Unknown".to_owned())),
            "pod_ingress" => _ = attached.pods.insert(pin.ifindex, name),
            _ => {}
        }
    }
    attached
}
