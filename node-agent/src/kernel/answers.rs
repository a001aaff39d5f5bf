//! The tables of egress addresses for which the data plane answers: ARP for IPv4, neighbour solicitations for IPv6.

use crate::apply::{AnswerTable, Answering};
use crate::ebpf::{Dataplane, EbpfError};
use crate::observed::{from_map, from_network, to_map, to_network};
use crate::singles::{self, Singles};
use crate::sweep;
use aegis_common::{ArpKey, ArpValue, NdpKey, NdpValue, SingleValue};
use aegis_core::egress::Egress;
use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Maps of their own: they are written by whoever listens on the link, at any time.
pub(super) struct Answers {
    arp: Table<ArpKey, ArpValue>,
    ndp: Table<NdpKey, NdpValue>,
    singles: OwnedFd,
}

struct Table<K: Pod, V: Pod> {
    map: HashMap<MapData, K, V>,
    /// The same, to be read as a whole.
    fd: OwnedFd,
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn new(dataplane: &Dataplane, name: &'static str) -> Result<Table<K, V>, EbpfError> {
        let failed = |error: io::Error| EbpfError::Map { name: name.into(), source: error.into() };
        let map = dataplane.handle(name, Map::HashMap)?;
        Ok(Table { map, fd: dataplane.map_fd(name)?.try_clone_to_owned().map_err(failed)? })
    }

    fn set(&mut self, key: K, value: Option<V>) -> io::Result<()> {
        let result = match value {
            Some(value) => self.map.insert(key, value, 0),
            None => super::gone(self.map.remove(&key)),
        };
        result.map_err(io::Error::other)
    }
}

impl Answers {
    pub fn new(dataplane: &Dataplane) -> Result<Answers, EbpfError> {
        let failed = |error: io::Error| EbpfError::Map { name: "SINGLES".into(), source: error.into() };
        Ok(Answers {
            arp: Table::new(dataplane, "ARP_ANSWERS")?,
            ndp: Table::new(dataplane, "NDP_ANSWERS")?,
            singles: dataplane.map_fd("SINGLES")?.try_clone_to_owned().map_err(failed)?,
        })
    }
}

impl AnswerTable for Answers {
    fn read(&self) -> io::Result<BTreeMap<(Egress, u32), Answering>> {
        let mut found = BTreeMap::new();
        sweep::for_each(self.arp.fd.as_fd(), |key: &ArpKey, value: &ArpValue| {
            let answer = Answering { mac: value.mac, multicast: false };
            found.insert((from_map(key.address).into(), key.ifindex), answer);
        })?;
        let mut singles = Singles::new();
        sweep::for_each(self.singles.as_fd(), |stand_in: &u32, value: &SingleValue| {
            singles.extend([singles::entry(*stand_in, value.address)]);
        })?;
        sweep::for_each(self.ndp.fd.as_fd(), |key: &NdpKey, value: &NdpValue| {
            let answer = Answering { mac: value.mac, multicast: value.multicast != 0 };
            let egress = match key.network {
                [0, stand_in] => singles::egress(from_map(stand_in), &singles),
                network => from_network(network),
            };
            found.insert((egress, key.ifindex), answer);
        })?;
        Ok(found)
    }

    fn set(&mut self, address: Egress, ifindex: u32, value: Option<Answering>) -> io::Result<()> {
        let network = match address {
            Egress::V4(address) => {
                let value = value.map(|value| ArpValue { mac: value.mac, pad: 0 });
                return self.arp.set(ArpKey { address: to_map(address), ifindex }, value);
            }
            Egress::Single(address) => [0, to_map(singles::stand_in(address))],
            Egress::V6(_) => to_network(address).unwrap_or_default(),
        };
        let value = value.map(|value| NdpValue { mac: value.mac, multicast: u16::from(value.multicast) });
        self.ndp.set(NdpKey { network, ifindex }, value)
    }
}
