//! The way to a peer on real links: it is found by provoking the kernel, and follows the peer's MAC.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_node_agent::desired::PeerLink;
use aegis_node_agent::neighbour::{Resolver, links};
use aegis_node_agent::network;
use netns_support::{Namespace, need_root};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const BEHIND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

#[test]
fn peers_are_resolved_and_followed() {
    need_root();
    let (node, peer) = (Namespace::new("node"), Namespace::new("peer"));
    node.link("eth0", &peer, "eth0");
    node.run("ip addr add 192.0.2.1/24 dev eth0; ip route add 198.51.100.0/24 via 192.0.2.2");
    peer.run("ip link set eth0 address 02:00:00:00:00:07; ip addr add 192.0.2.2/24 dev eth0");
    node.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, mut changes) =
                rtnetlink::new_multicast_connection(&network::GROUPS).unwrap();
            tokio::spawn(connection);
            let mut resolver = Resolver::default();
            let mut wait_for = async |mac: [u8; 6]| {
                let patience = Instant::now() + Duration::from_secs(20);
                loop {
                    let network = network::read(&handle).await.unwrap();
                    let found = links(&network, [PEER, BEHIND]);
                    let index = network.device("eth0").unwrap().index;
                    if found.get(&PEER) == Some(&PeerLink { mac, ifindex: index }) {
                        assert_eq!(found[&BEHIND], PeerLink { mac, ifindex: index });
                        return;
                    }
                    assert!(Instant::now() < patience, "{found:?}");
                    resolver.provoke([PEER, BEHIND], &found, Instant::now()).unwrap();
                    // Woken by the kernel, or once a second as the event loop is.
                    let change = futures::StreamExt::next(&mut changes);
                    let _ = tokio::time::timeout(Duration::from_secs(1), change).await;
                }
            };
            wait_for([2, 0, 0, 0, 0, 7]).await;
            // A peer that was replaced says so by a gratuitous answer, or the kernel's entry is flushed.
            peer.run("ip link set eth0 address 02:00:00:00:00:08");
            node.run("ip neigh flush all");
            wait_for([2, 0, 0, 0, 0, 8]).await;
        });
    });
}
