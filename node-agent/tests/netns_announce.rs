//! The routes that announce an address, in a real kernel: made, put back, removed, and nobody else's touched.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_node_agent::announce::routes::{Key, MAIN, bring, wanted};
use aegis_node_agent::network;
use ipnet::IpNet;
use netns_support::{Namespace, need_root};
use rtnetlink::Handle;
use std::collections::BTreeSet;

const A: &str = "203.0.113.1/32";
const B: &str = "203.0.113.2/32";

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
async fn announce(handle: &Handle, table: u32, destinations: &[&str]) -> usize {
    let present = network::read(handle).await.unwrap().announced;
    let destinations: BTreeSet<IpNet> = destinations.iter().map(|it| it.parse().unwrap()).collect();
    bring(handle, &wanted(table, &destinations), &present).await.len()
}

fn keys(all: &[(u32, &str)]) -> BTreeSet<Key> {
    all.iter().map(|(table, destination)| (*table, destination.parse().unwrap())).collect()
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
        assert_eq!(present, keys(&[(180, A), (180, B), (MAIN, A), (MAIN, B)]));

        node.run("ip route del blackhole 203.0.113.1 table 180; ip route flush table main");
        assert_eq!(network::read(&handle).await.unwrap().announced, keys(&[(180, B)]));
        assert_eq!(announce(&handle, 180, &[A, B]).await, 0);
        assert_eq!(tables(), [outer, main], "they are put back");

        assert_eq!(announce(&handle, 180, &[B]).await, 0);
        assert!(!tables().concat().contains("203.0.113.1"), "{:?}", tables());
        // Another table, one that the header of a message has no room for.
        assert_eq!(announce(&handle, 1000, &[B]).await, 0);
        assert_eq!(network::read(&handle).await.unwrap().announced, keys(&[(1000, B), (MAIN, B)]));
        assert_eq!(announce(&handle, 0, &[B]).await, 0);
        assert_eq!(network::read(&handle).await.unwrap().announced, keys(&[]));
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

#[test]
fn routes_to_a_64_and_a_slice_of_it_come_stay_and_go() {
    const WHOLE: &str = "2001:db8:1:2::/64";
    const SLICE: &str = "2001:db8:1:2:4::/80";
    need_root();
    let (node, router) = (Namespace::new("node"), Namespace::new("router"));
    node.link("eth0", &router, "eth0");
    node.run("ip addr add 2001:db8::1/64 dev eth0 nodad; ip route add default via 2001:db8::fe");
    // Somebody else's, in the way of nothing and in the way of one.
    node.run(
        "ip -6 route add blackhole 2001:db8:1:2::/64 metric 5 proto static; \
         ip -6 route add blackhole 2001:db8:1:9::/64 table 180 proto static",
    );
    with_netlink(&node, async |handle| {
        assert_eq!(announce(&handle, 180, &[A, WHOLE, SLICE]).await, 0);
        let tables = || {
            [node.output("ip -6 route show table 180"), node.output("ip -6 route show table main proto 174")]
        };
        let [outer, main] = tables();
        for destination in [WHOLE, SLICE] {
            assert!(
                outer.contains(&format!("blackhole {destination} dev lo proto 174 metric 1024")),
                "{outer}"
            );
            let route = format!("blackhole {destination} dev lo metric 4278124544");
            assert!(main.contains(&route), "{main}");
        }
        let all = keys(&[(180, A), (MAIN, A), (180, WHOLE), (MAIN, WHOLE), (180, SLICE), (MAIN, SLICE)]);
        assert_eq!(network::read(&handle).await.unwrap().announced, all);

        node.run("ip -6 route flush table main proto 174");
        assert_eq!(
            network::read(&handle).await.unwrap().announced,
            keys(&[(180, A), (MAIN, A), (180, WHOLE), (180, SLICE)])
        );
        assert_eq!(announce(&handle, 180, &[A, WHOLE, SLICE]).await, 0);
        assert_eq!(tables(), [outer, main], "they are put back");

        node.run("ip -6 route del blackhole 2001:db8:1:2::/64 metric 5");
        let way = || node.output("ip -6 route get 2001:db8:1:2:7::1 2>&1 || true");
        assert!(!way().contains("2001:db8::fe"), "what arrived would go back to the router: {}", way());
        node.run("ip -6 route add 2001:db8:1:2::/64 via 2001:db8::7 metric 4000000000");
        assert!(way().contains("2001:db8::7"), "any other route wins: {}", way());

        assert_eq!(announce(&handle, 180, &["2001:db8:1:9::/64"]).await, 1, "one is in the way in table 180");
        assert_eq!(announce(&handle, 180, &[]).await, 0);
        let left = node.output("ip -6 route show table 180") + &node.output("ip -6 route show table main");
        assert!(!left.contains("proto 174") && left.contains("2001:db8:1:9::/64"), "{left}");
    });
}
