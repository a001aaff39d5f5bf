//! The way to each peer: device and MAC of the next hop, and what keeps the kernel's neighbour table filled.

use crate::desired::PeerLink;
use crate::network::Network;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

/// How often resolution is provoked while a peer is not resolved.
const UNRESOLVED: Duration = Duration::from_secs(1);
/// How often a resolved peer is spoken to, so that a changed MAC is noticed and the entry is never collected.
const RESOLVED: Duration = Duration::from_secs(20);
/// Datagrams sent at a time.
const BURST: usize = 64;
/// The discard port (RFC 863).
const DISCARD: u16 = 9;

/// The way to each peer that the kernel can reach at the moment.
pub fn links(network: &Network, peers: impl IntoIterator<Item = Ipv4Addr>) -> BTreeMap<Ipv4Addr, PeerLink> {
    let link = |peer: Ipv4Addr| {
        if network.addresses.iter().any(|(_, own)| *own == peer) {
            return None;
        }
        let route = network.route(peer)?;
        let next_hop = route.gateway.unwrap_or(peer);
        let mac = *network.neighbours.get(&(route.device, next_hop))?;
        Some(PeerLink { mac, ifindex: route.device })
    };
    peers.into_iter().filter_map(|peer| Some((peer, link(peer)?))).collect()
}

/// Provokes the kernel to resolve peers, a few at a time.
#[derive(Debug, Default)]
pub struct Resolver {
    socket: Option<UdpSocket>,
    spoken: BTreeMap<Ipv4Addr, Instant>,
}

impl Resolver {
    /// Sends a datagram to the discard port of every peer that is due. `resolved` says which have a link.
    pub fn provoke(
        &mut self,
        peers: impl IntoIterator<Item = Ipv4Addr>,
        resolved: &BTreeMap<Ipv4Addr, PeerLink>,
        now: Instant,
    ) -> std::io::Result<()> {
        let peers: Vec<Ipv4Addr> = peers.into_iter().collect();
        self.spoken.retain(|peer, _| peers.contains(peer));
        let due: Vec<Ipv4Addr> = peers
            .into_iter()
            .filter(|peer| {
                let pause = if resolved.contains_key(peer) { RESOLVED } else { UNRESOLVED };
                self.spoken.get(peer).is_none_or(|last| now.duration_since(*last) >= pause)
            })
            .take(BURST)
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.set_nonblocking(true)?;
                socket
            }
        };
        for peer in due {
            // A failure (no route, an earlier ICMP error) is the state that this is to end; it is tried again.
            let _ = socket.send_to(&[], (peer, DISCARD));
            self.spoken.insert(peer, now);
        }
        self.socket = Some(socket);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Route;

    #[test]
    fn a_peer_on_the_link_is_its_own_next_hop_and_others_have_the_gateway() {
        let near = Ipv4Addr::new(192, 0, 2, 2);
        let far = Ipv4Addr::new(198, 51, 100, 2);
        let silent = Ipv4Addr::new(192, 0, 2, 3);
        let own = Ipv4Addr::new(192, 0, 2, 1);
        let gateway = Ipv4Addr::new(192, 0, 2, 254);
        let network = Network {
            addresses: vec![(2, own)],
            routes: vec![
                Route { destination: "192.0.2.0/24".parse().unwrap(), gateway: None, device: 2, metric: 0 },
                Route {
                    destination: "0.0.0.0/0".parse().unwrap(),
                    gateway: Some(gateway),
                    device: 2,
                    metric: 0,
                },
            ],
            neighbours: [((2, near), [2; 6]), ((2, gateway), [9; 6]), ((2, own), [1; 6])].into(),
            ..Network::default()
        };
        let peers = [near, far, silent, own];
        let found = links(&network, peers);
        assert_eq!(found.len(), 2);
        assert_eq!(found[&near], PeerLink { mac: [2; 6], ifindex: 2 });
        assert_eq!(found[&far], PeerLink { mac: [9; 6], ifindex: 2 });
    }
}
