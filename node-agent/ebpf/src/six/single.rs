//! Single IPv6 addresses: what leaves from one gets a port of this node's, as over IPv4, and by the same tables. Only what has ports
//! (TCP, UDP, ICMPv6 echo), and errors about it, can leave.

pub mod arrive;
pub mod leave;

use super::lookup::{self, PODS6, SUFFIXES};
use crate::maps::ALLOCATIONS;
use aegis_common::*;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, LruHashMap};

/// Single egress addresses, by their stand-ins.
#[map]
static SINGLES: HashMap<u32, SingleValue> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
/// Origins of flows, by their stand-ins: for whoever reads the flows. No program asks.
#[map]
static ORIGINS6: LruHashMap<u32, SingleValue> = LruHashMap::with_max_entries(65536, 0);

/// The address that a stand-in is of.
#[inline(always)]
fn address_of(stand_in: u32) -> Option<Address6> {
    // SAFETY: copied at once; a stand-in is another's only when no flow names it.
    unsafe { SINGLES.get(&stand_in) }.map(|single| single.address)
}

/// Whether an address is a single egress address.
#[inline(always)]
pub fn is(address: &Address6) -> bool {
    lookup::config().is_some_and(|config| config.singles != 0)
        && address_of(stand_in(address, 0)).is_some_and(|own| own == *address)
}

/// What neighbours' questions for an address are answered by: see `NdpKey`.
#[inline(always)]
pub fn network_of_question(target: &Address6) -> Network {
    if is(target) { [0, stand_in(target, 0)] } else { network_of(target) }
}

/// Whether an allocation has a single address in which this node has slices.
#[inline(always)]
pub fn has(allocation: u32) -> bool {
    ALLOCATIONS.get(allocation).is_some_and(|allocation| allocation.singles != 0)
}

/// Whether a pod with this suffix is there and of this incarnation. A function of its own for the verifier's sake, like `take` in
/// `ports`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn has_pod(generation: u32, suffix: u32, incarnation: u32) -> u32 {
    // SAFETY: copied at once.
    let Some(pod) = (unsafe { SUFFIXES.get(&suffix) }).copied() else { return 0 };
    let key = Pod6Key { generation, address: pod.address };
    // SAFETY: read at once.
    u32::from(unsafe { PODS6.get(&key) }.is_some_and(|pod| pod.incarnation == incarnation))
}
