//! The routes that announce an address, in a real kernel: made, put back, removed, and nobody else's touched.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_node_agent::announce::routes::{MAIN, bring, wanted};
use aegis_node_agent::network;
use netns_support::{Namespace, need_root};
use rtnetlink::Handle;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

const A: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const B: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

fn with_netlink(node: &Namespace, work: impl AsyncFnOnce(Handle) + Send) {
    node.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            work(handle).await;
        });
    });
}

/// Brings the routes of these addresses, as the agent does: from what the kernel has. Returns how many went wrong.
async fn announce(handle: &Handle, table: u32, addresses: &[Ipv4Addr]) -> usize {
    let present = network::read(handle).await.unwrap().announced;
    let addresses: BTreeSet<Ipv4Addr> = addresses.iter().copied().collect();
    bring(handle, &wanted(table, &addresses), &present).await.len()
}

#[test]
fn routes_come_stay_and_go() {
    need_root();
    let node = Namespace::new("node");
    with_netlink(&node, async |handle| {
        assert_eq!(announce(&handle, 180, &[A, B]).await, 0);
        let tables = || [node.output("ip route show table 180"), node.output("ip route show table main")];
        let [outer, main] = tables();
        assert!(outer.contains("blackhole 203.0.113.1 proto 174"), "{outer}");
        assert!(main.contains("blackhole 203.0.113.2 proto 174 metric 4294901760"), "{main}");
        let present = network::read(&handle).await.unwrap().announced;
        assert_eq!(present, [(180, A), (180, B), (MAIN, A), (MAIN, B)].into());

        node.run("ip route del blackhole 203.0.113.1 table 180; ip route flush table main");
        assert_eq!(network::read(&handle).await.unwrap().announced, [(180, B)].into());
        assert_eq!(announce(&handle, 180, &[A, B]).await, 0);
        assert_eq!(tables(), [outer, main], "they are put back");

        assert_eq!(announce(&handle, 180, &[B]).await, 0);
        assert!(!tables().concat().contains("203.0.113.1"), "{:?}", tables());
        // Another table, one that the header of a message has no room for.
        assert_eq!(announce(&handle, 1000, &[B]).await, 0);
        assert_eq!(network::read(&handle).await.unwrap().announced, [(1000, B), (MAIN, B)].into());
        assert_eq!(announce(&handle, 0, &[B]).await, 0);
        assert_eq!(network::read(&handle).await.unwrap().announced, [].into());
    });
}

#[test]
fn routes_of_others_are_neither_replaced_nor_removed() {
    need_root();
    let node = Namespace::new("node");
    node.run(
        "ip route add blackhole 203.0.113.1 table 180 proto static; \
         ip route add blackhole 203.0.113.1 metric 5 proto static; ip route add blackhole 203.0.113.9 table 180",
    );
    with_netlink(&node, async |handle| {
        assert_eq!(announce(&handle, 180, &[A, B]).await, 1, "one is in the way in table 180");
        let main = node.output("ip route show table main");
        assert!(main.contains("203.0.113.1 proto static metric 5") && main.contains("proto 174"), "{main}");
        assert_eq!(announce(&handle, 180, &[]).await, 0);
        let left = node.output("ip route show table 180") + &node.output("ip route show table main");
        assert_eq!(left.matches("blackhole").count(), 3, "{left}");
        assert!(!left.contains("proto 174"), "{left}");
    });
}

#[test]
fn the_route_that_keeps_packets_from_looping_gives_way_to_any_other() {
    need_root();
    let (node, router) = (Namespace::new("node"), Namespace::new("router"));
    node.link("eth0", &router, "eth0");
    node.run("ip addr add 192.0.2.1/24 dev eth0; ip route add default via 192.0.2.254");
    with_netlink(&node, async |handle| {
        let way = || node.output("ip route get 203.0.113.1 2>&1 || true");
        assert!(way().contains("192.0.2.254"), "{}", way());
        announce(&handle, 180, &[A]).await;
        assert!(!way().contains("192.0.2.254"), "what arrived would go back to the router: {}", way());
        node.run("ip route add 203.0.113.1/32 via 192.0.2.7 metric 4000000000");
        assert!(way().contains("192.0.2.7"), "{}", way());
    });
}
