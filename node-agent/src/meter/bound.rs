//! Connections of sockets that have the egress address themselves (`mode: Bind`): programs count when one begins, and nobody tells
//! them when it is over. So it is looked for, among the kernel's sockets.

use super::read::{entries, map};
use super::uses::Uses;
use crate::ebpf::{Dataplane, EbpfError};
use crate::observed::{from_map, to_map};
use crate::raw;
use crate::sockets::{self, Connection};
use aegis_common::{BindValue, FlowKey, MeterKey, REST_METER, metered_egress};
use aegis_core::slice::SliceSet;
use aya::maps::MapError;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

const TCP: u8 = 6;

/// What is metered of them.
#[derive(Debug)]
pub(super) struct Bound {
    meters: OwnedFd,
    binds: OwnedFd,
    /// Without a socket at the last look.
    absent: HashSet<FlowKey>,
    look_again: Instant,
    /// Whether programs count them at all.
    metered: bool,
}

impl Bound {
    pub(super) fn open(dataplane: &Dataplane) -> Result<Bound, EbpfError> {
        let own = |name| dataplane.map_fd(name)?.try_clone_to_owned().map_err(EbpfError::Carry);
        Ok(Bound {
            meters: own("BOUND_METERS")?,
            binds: own("BINDS")?,
            absent: HashSet::new(),
            look_again: Instant::now(),
            metered: dataplane.is_metered(),
        })
    }

    /// Ends what is over, and counts what lives and has no meter among the rest of its address: it began when none was given out.
    /// `index` says the meters' numbers.
    ///
    /// # Errors
    /// A map cannot be read or written.
    pub(super) fn look(
        &mut self,
        used: &Uses,
        index: impl FnOnce() -> Result<BTreeMap<MeterKey, u32>, MapError>,
    ) -> Result<(), MapError> {
        let now = Instant::now();
        if !self.metered || now < self.look_again {
            return Ok(());
        }
        self.look_again = now + sockets::PERIOD;
        let binds: BTreeMap<u32, BindValue> = entries(self.binds.as_fd())?;
        // First those that have meters: each of their sockets is there already.
        let mut have = HashMap::new();
        crate::sweep::for_each(self.meters.as_fd(), |key: &FlowKey, number: &u32| {
            _ = have.insert(*key, *number);
        })
        .map_err(MapError::IoError)?;
        if binds.is_empty() && have.is_empty() {
            return Ok(());
        }
        let addresses: BTreeSet<_> = binds.keys().map(|address| from_map(*address)).collect();
        let listed = match sockets::list(&addresses) {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(%error, "cannot list sockets: those that are gone are counted as in use");
                return Ok(());
            }
        };
        let live = listed.iter().filter_map(key_of).filter(|key| is_kept(key, &binds)).collect();
        let (over, new) = compare(&have, &live, &mut self.absent);
        let meters = map(self.meters.as_fd())?;
        for key in over {
            // A program may have removed it, and then has ended it too.
            if let Some(number) = meters.take::<u32>(raw::bytes(&key)).map_err(MapError::IoError)? {
                used.end(number);
            }
        }
        if !new.is_empty() {
            let index = index()?;
            for key in new {
                let number = rest_of(key.local, &index);
                if meters.insert_new(raw::bytes(&key), raw::bytes(&number)).map_err(MapError::IoError)? {
                    used.begin(number);
                }
            }
        }
        self.look_again = sockets::next_look(now);
        Ok(())
    }
}

/// Those with a meter of which no socket is left, at this look and the one before; and the sockets without. `absent` is remembered
/// from one look to the next: a socket that is just being connected is not listed on every kernel.
fn compare(
    have: &HashMap<FlowKey, u32>,
    live: &HashSet<FlowKey>,
    absent: &mut HashSet<FlowKey>,
) -> (Vec<FlowKey>, Vec<FlowKey>) {
    let now: HashSet<FlowKey> = have.keys().filter(|key| !live.contains(key)).copied().collect();
    let over = now.intersection(absent).copied().collect();
    *absent = now;
    (over, live.iter().filter(|key| !have.contains_key(key)).copied().collect())
}

/// The key that a flow would have; `None` while there is no far end.
fn key_of(connection: &Connection) -> Option<FlowKey> {
    let Connection { near, far } = connection;
    (far.port() != 0).then(|| FlowKey {
        local: to_map(*near.ip()),
        remote: to_map(*far.ip()),
        local_port: near.port(),
        remote_port: far.port(),
        protocol: TCP,
        pad: [0; 3],
    })
}

/// Whether its port is in a slice for sockets: of others nothing gets out.
fn is_kept(key: &FlowKey, binds: &BTreeMap<u32, BindValue>) -> bool {
    let slice = (key.local_port >> 8) as u8;
    binds.get(&key.local).is_some_and(|value| SliceSet::from_words(value.kept).contains(slice))
}

/// The meter for the rest of an address.
fn rest_of(egress: u32, index: &BTreeMap<MeterKey, u32>) -> u32 {
    let egress = metered_egress(egress);
    let rest = index.iter().find(|(key, _)| key.egress == egress && key.remote == [0; 4] && key.flags == 0);
    rest.map_or(REST_METER, |(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddrV4;

    fn key(near: &str, far: &str) -> FlowKey {
        let end = |it: &str| -> SocketAddrV4 { it.parse().unwrap() };
        key_of(&Connection { near: end(near), far: end(far) }).unwrap()
    }

    #[test]
    fn a_connection_is_over_when_two_looks_find_no_socket() {
        let [a, b] = ["203.0.113.1:1280", "203.0.113.1:1281"].map(|near| key(near, "198.51.100.1:443"));
        let have = HashMap::from([(a, 7)]);
        let (none, mut absent) = (HashSet::new(), HashSet::new());
        assert_eq!(compare(&have, &none, &mut absent), (vec![], vec![]), "it may just begin");
        assert_eq!(compare(&have, &HashSet::from([a]), &mut absent), (vec![], vec![]));
        assert_eq!(compare(&have, &none, &mut absent), (vec![], vec![]), "in a row");
        assert_eq!(compare(&have, &HashSet::from([b]), &mut absent), (vec![a], vec![b]));
        assert_eq!(compare(&HashMap::new(), &none, &mut absent), (vec![], vec![]));
    }

    #[test]
    fn only_connections_from_slices_for_sockets_count_and_without_a_meter_the_rest_of_the_address_does() {
        let bound = key("203.0.113.1:1280", "198.51.100.1:443");
        let kept = SliceSet::range(5, 5).words();
        let binds = BTreeMap::from([(bound.local, BindValue { open: [0; 4], kept })]);
        assert!(is_kept(&bound, &binds));
        assert!(!is_kept(&key("203.0.113.1:1024", "198.51.100.1:443"), &binds));
        assert!(!is_kept(&key("203.0.113.2:1280", "198.51.100.1:443"), &binds));
        let listens =
            Connection { near: "203.0.113.1:1280".parse().unwrap(), far: "0.0.0.0:0".parse().unwrap() };
        assert_eq!(key_of(&listens), None);

        let rest = MeterKey { egress: metered_egress(bound.local), allocation: 3, ..MeterKey::default() };
        let index = BTreeMap::from([(MeterKey { remote_port: 443, remote: [1; 4], ..rest }, 4), (rest, 5)]);
        assert_eq!(rest_of(bound.local, &index), 5);
        assert_eq!(rest_of(bound.local + 1, &index), REST_METER);
    }
}
