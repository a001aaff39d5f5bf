//! The table of egress addresses for which the data plane answers ARP.

use crate::apply::ArpTable;
use crate::ebpf::{Dataplane, EbpfError};
use crate::observed::{from_map, to_map};
use crate::sweep;
use aegis_common::{ArpKey, ArpValue};
use aya::maps::{HashMap, Map, MapData};
use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

/// A map of its own: it is written by whoever listens to ARP, at any time.
pub(super) struct Answers {
    map: HashMap<MapData, ArpKey, ArpValue>,
    /// The same, to be read as a whole.
    fd: OwnedFd,
}

impl Answers {
    pub fn new(dataplane: &Dataplane) -> Result<Answers, EbpfError> {
        let failed = |error: io::Error| EbpfError::Map { name: "ARP_ANSWERS".into(), source: error.into() };
        let map = dataplane.handle("ARP_ANSWERS", Map::HashMap)?;
        Ok(Answers { map, fd: dataplane.map_fd("ARP_ANSWERS")?.try_clone_to_owned().map_err(failed)? })
    }
}

impl ArpTable for Answers {
    fn read(&self) -> io::Result<BTreeMap<(Ipv4Addr, u32), [u8; 6]>> {
        let mut found = BTreeMap::new();
        sweep::for_each(self.fd.as_fd(), |key: &ArpKey, value: &ArpValue| {
            found.insert((from_map(key.address), key.ifindex), value.mac);
        })?;
        Ok(found)
    }

    fn set(&mut self, address: Ipv4Addr, ifindex: u32, mac: Option<[u8; 6]>) -> io::Result<()> {
        let key = ArpKey { address: to_map(address), ifindex };
        let result = match mac {
            Some(mac) => self.map.insert(key, ArpValue { mac, pad: 0 }, 0),
            None => super::gone(self.map.remove(&key)),
        };
        result.map_err(io::Error::other)
    }
}
