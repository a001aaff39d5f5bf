//! Many writes to one map of the policy by few system calls: a generation is a hundred thousand.

use super::{chain, port_key, verdict_key};
use crate::apply::PlaneError;
use crate::ebpf::Dataplane;
use crate::observed::{to_map, to_map6};
use crate::ops::Op;
use crate::raw::{self, bytes};
use aegis_common::{Destination6Key, DestinationKey, DestinationValue};
use aya::maps::lpm_trie::Key;
use ipnet::IpNet;
use std::net::IpAddr;

/// Fewer than these are as quick one by one.
const FEW: usize = 4;

/// The map that a write is to, and whether it removes something; `None` if it is to none of those with many entries.
fn kind(op: &Op) -> Option<(&'static str, bool)> {
    let destinations = |v4: bool| if v4 { "DESTINATIONS" } else { "DESTINATIONS6" };
    Some(match op {
        Op::SetVerdict { .. } => ("VERDICTS", false),
        Op::RemoveVerdict { .. } => ("VERDICTS", true),
        Op::SetDestination { destination, .. } => (destinations(destination.addr().is_ipv4()), false),
        Op::RemoveDestination { destination, .. } => (destinations(destination.addr().is_ipv4()), true),
        Op::SetPort { .. } => ("PORTS", false),
        Op::RemovePort { .. } => ("PORTS", true),
        _ => return None,
    })
}

/// The writes to the same map at the beginning of these, if there are many.
pub fn of(ops: &[Op]) -> Option<(&'static str, &[Op])> {
    let first = kind(ops.first()?)?;
    let length = ops.iter().take_while(|op| kind(op) == Some(first)).count();
    (length >= FEW).then(|| (first.0, &ops[..length]))
}

/// Does them, in order. Gives how many, and why no more.
pub fn write(dataplane: &Dataplane, map: &'static str, run: &[Op]) -> (usize, Result<(), PlaneError>) {
    let failed = |at: usize, reason: String| {
        let op = run.get(at).map_or_else(|| map.to_owned(), |op| format!("{op:?}"));
        (at, Err(PlaneError::Write { op, reason }))
    };
    let fd = match dataplane.map_fd(map) {
        Ok(fd) => fd,
        Err(error) => return failed(0, chain(&error)),
    };
    let map = match raw::Map::of(fd) {
        Ok(map) => map,
        Err(error) => return failed(0, error.to_string()),
    };
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    run.iter().for_each(|op| enter(op, &mut keys, &mut values));
    let (done, result) = match run.first().and_then(kind) {
        Some((_, true)) => map.delete_many(&keys),
        _ => map.update_many(&keys, &values),
    };
    match result {
        Ok(()) => (done, Ok(())),
        Err(error) => failed(done, error.to_string()),
    }
}

/// Adds key and value; no value where something is removed.
fn enter(op: &Op, keys: &mut Vec<u8>, values: &mut Vec<u8>) {
    match *op {
        Op::SetVerdict { generation, verdict, value } => {
            keys.extend_from_slice(bytes(&verdict_key(generation, verdict)));
            values.extend_from_slice(bytes(&value));
        }
        Op::RemoveVerdict { generation, verdict } => {
            keys.extend_from_slice(bytes(&verdict_key(generation, verdict)));
        }
        Op::SetDestination { generation, destination, class } => {
            enter_destination(generation, destination, keys);
            values.extend_from_slice(bytes(&DestinationValue { class }));
        }
        Op::RemoveDestination { generation, destination } => {
            enter_destination(generation, destination, keys);
        }
        Op::SetPort { generation, port, class } => {
            keys.extend_from_slice(bytes(&port_key(generation, port)));
            values.extend_from_slice(bytes(&class));
        }
        Op::RemovePort { generation, port } => {
            keys.extend_from_slice(bytes(&port_key(generation, port)));
        }
        _ => {}
    }
}

fn enter_destination(generation: u32, destination: IpNet, keys: &mut Vec<u8>) {
    let length = 32 + u32::from(destination.prefix_len());
    match destination.network() {
        IpAddr::V4(address) => {
            let data = DestinationKey { generation, address: to_map(address) };
            keys.extend_from_slice(bytes(&Key::new(length, data)));
        }
        IpAddr::V6(address) => {
            let data = Destination6Key { generation, address: to_map6(address) };
            keys.extend_from_slice(bytes(&Key::new(length, data)));
        }
    }
}
