//! The real programs and maps: what is written is read back, a second time there is nothing to write, and a new agent
//! finds everything pinned.
#![allow(clippy::unwrap_used, reason = "in a test a failure is what unwrap is for")]

mod netns_support;

use aegis_common::{VerdictKey, VerdictValue};
use aegis_core::model::{Address, AllocationName, Holding, State};
use aegis_core::policy::{Binding, BindingName, Pod, PortRange, Workloads};
use aegis_node_agent::apply::Plane;
use aegis_node_agent::desired::{Inputs, PeerLink, desired};
use aegis_node_agent::ethtool;
use aegis_node_agent::network;
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::ops::Known;
use aegis_node_agent::tcx;
use aegis_node_agent::uplink::{Devices, devices};
use netns_support::Namespace;
use netns_support::plane::{Bpffs, bring};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};

/// A node with many pods and bindings; `variant` changes some of everything.
fn inputs(pods: u8, bindings: u8, variant: u8) -> Inputs {
    let own = Ipv4Addr::new(192, 0, 2, 1);
    let name = |number: u8| AllocationName { account: "shop".into(), name: format!("a{number}") };
    let holding =
        |first, last, node: &str, state| Holding { first, last, node: node.into(), epoch: 1, state };
    let address = |number: u8| {
        let address = Ipv4Addr::new(203, 0, 113, number);
        let mut holdings = vec![holding(4, 11, "n0", State::Held), holding(12, 19, "n1", State::Held)];
        if variant % 2 == 1 {
            holdings[0].last = 7;
            holdings.insert(1, holding(8, 11, "n0", State::Draining));
        }
        let epoch = i64::from(variant) + 1;
        (
            address,
            Address {
                address: address.into(),
                prefix: "p".into(),
                allocation: name(number % 4),
                epoch,
                holdings,
                fence: None,
            },
        )
    };
    Inputs {
        node: "n0".into(),
        pods: (0..pods)
            .map(|number| Pod {
                account: "shop".into(),
                name: format!("pod{number}"),
                uid: format!("u{number}"),
                labels: [("app".to_owned(), format!("l{}", (number + variant) % bindings.max(1)))].into(),
                addresses: vec![Ipv4Addr::new(10, 244, 1, number + 2).into()],
                ..Pod::default()
            })
            .collect(),
        bindings: (0..bindings)
            .map(|number| Binding {
                name: BindingName { account: "shop".into(), name: format!("b{number}") },
                allocation: name(number % 4),
                enabled: true,
                workloads: Workloads {
                    labels: [("app".to_owned(), format!("l{number}"))].into(),
                    ..Workloads::default()
                },
                cidrs: vec![format!("198.51.100.{}/28", (number % 8) * 16).parse().unwrap()],
                hosts: Vec::new(),
                ports: vec![PortRange { protocol: 6, first: 443, last: 450 + u16::from(number + variant) }],
                use_node_address: number % 5 == 0,
                binds: false,
                generation: 1,
            })
            .collect(),
        addresses: (0..8).map(address).collect(),
        nodes: [("n0", own), ("n1", Ipv4Addr::new(192, 0, 2, 2 + variant % 2))]
            .map(|(name, address)| {
                (name.to_owned(), NodeRecord { addresses: vec![address], ..Default::default() })
            })
            .into(),
        internal: vec!["10.96.0.0/16".parse().unwrap()],
        links: [(Ipv4Addr::new(192, 0, 2, 2), PeerLink { mac: [2, 0, 0, 0, 0, 9], ifindex: 3 })].into(),
        tunnel_address: Some(own),
        pod_ranges: vec!["10.244.1.0/24".parse().unwrap()],
        uplink_mtu: Some(1500),
        mark: 0x1000,
        tunnel_port: 6081,
        refusals_per_second: 100,
        ..Inputs::default()
    }
}

#[test]
fn what_is_written_is_read_back_and_found_again() {
    let bpffs = Bpffs::new("maps");
    let mut plane = bpffs.open();
    let seed = plane.read().unwrap().config.seed;
    assert_ne!(seed, 0);
    let known = Known::default();
    for variant in [0, 1, 2, 5] {
        let wanted = desired(&inputs(110, 20, variant));
        let (expected, writes, took) = bring(plane.as_mut(), &wanted, &known);
        println!("variant {variant}: {writes} writes in {took:?}");
        assert!(writes > 100);
        assert_eq!(plane.read().unwrap(), expected, "variant {variant}");
        assert_eq!(expected.live().pods.len(), 110);
        assert_eq!(bring(plane.as_mut(), &wanted, &known).1, 0, "variant {variant} again");
    }
    // One pod more: one write.
    let (_, writes, took) = bring(plane.as_mut(), &desired(&inputs(111, 20, 5)), &known);
    println!("one pod: {writes} writes in {took:?}");
    assert_eq!(writes, 1);

    let before = plane.read().unwrap();
    drop(plane);
    let mut plane = bpffs.open();
    assert_eq!(plane.read().unwrap(), before);
    // A restarted agent knows nothing but what the maps tell.
    assert_eq!(bring(plane.as_mut(), &desired(&inputs(111, 20, 5)), &Known::default()).1, 0);
    assert_eq!(before.config.seed, seed);
}

async fn look() -> (Devices, BTreeSet<u32>) {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    tokio::spawn(connection);
    let network = network::read(&handle).await.unwrap();
    let own = Some(Ipv4Addr::new(192, 0, 2, 1));
    let found = devices(&network, &[], own, &["10.244.1.0/24".parse().unwrap()], &[]);
    (found, network.devices.keys().copied().collect())
}

/// A node with its uplink, and what that leads to.
fn node_and_router() -> (Namespace, Namespace) {
    let (node, router) = (Namespace::new("node"), Namespace::new("router"));
    node.link("eth0", &router, "eth0");
    node.run("ip addr add 192.0.2.1/24 dev eth0; ip route add default via 192.0.2.254");
    (node, router)
}

/// Makes the bridge of the node's pods.
const BRIDGE: &str = "ip link add cni0 type bridge; ip addr add 10.244.1.1/24 dev cni0; ip link set cni0 up";

#[test]
fn devices_get_their_programs_when_they_come_and_lose_them_when_they_go() {
    let bpffs = Bpffs::new("links");
    let (node, router) = node_and_router();
    node.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut plane = bpffs.open();
        let attach = |plane: &mut dyn Plane| {
            let (found, existing) = runtime.block_on(look());
            assert!(plane.attach(&found, &existing).is_empty());
            plane.attached()
        };
        let first = attach(plane.as_mut());
        let uplinks: Vec<_> = first.uplinks.into_values().collect();
        assert_eq!(uplinks, [("eth0".to_owned(), "Native".to_owned())]);
        assert!(first.pods.is_empty());

        node.run(BRIDGE);
        assert!(attach(plane.as_mut()).pods.into_values().eq(["cni0"]));
        // A new agent takes the links over.
        drop(plane);
        let mut plane = bpffs.open();
        assert!(attach(plane.as_mut()).pods.into_values().eq(["cni0"]));
        let pins = || std::fs::read_dir(bpffs.folder("links")).unwrap().count();
        assert_eq!(pins(), 4);

        router.run("ip addr add 192.0.2.254/24 dev eth0; ping -c 1 -W 5 192.0.2.1 >/dev/null");
        assert!(ethtool::sum("eth0", "_xdp_packets").unwrap() > 0, "the driver counts what XDP sees");
        assert_eq!(ethtool::sum("eth0", "_xdp_tx_errors").unwrap(), 0);
        assert!(ethtool::sum("eth9", "_xdp_tx_errors").is_err());

        node.run("ip link del cni0");
        assert!(attach(plane.as_mut()).pods.is_empty());
        assert_eq!(pins(), 3);
        node.run(BRIDGE);
        assert!(attach(plane.as_mut()).pods.into_values().eq(["cni0"]));
    });
}

/// Ids of the programs of a device's hook, the one that runs first first.
fn order(device: &str, hook: tcx::Hook) -> Vec<u32> {
    let index = nix::net::if_::if_nametoindex(device).unwrap();
    tcx::programs(index, hook).unwrap()
}

/// Does something while a thread beside looks all the time.
fn while_watching<T>(look: impl Fn() + Sync, act: impl FnOnce() -> T) -> T {
    /// Also when `act` fails.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                look();
            }
        });
        let _done = Done(&done);
        act()
    })
}

#[test]
fn our_programs_come_first_and_say_so_if_they_do_not() {
    let bpffs = Bpffs::new("order");
    let (node, _router) = node_and_router();
    node.run(BRIDGE);
    node.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (found, existing) = runtime.block_on(look());
        let others = Bpffs::new("others");
        // Stands for somebody else's program: it puts itself first too.
        let come_first = || {
            let pods = Devices { pods: found.pods.clone(), ..Devices::default() };
            let mut plane = others.open();
            assert_eq!(plane.attach(&pods, &existing), [].into());
            (plane, order("cni0", tcx::Hook::Ingress)[0])
        };
        let (_other, other_id) = come_first();
        assert_eq!(order("cni0", tcx::Hook::Ingress), [other_id]);

        let mut plane = bpffs.open();
        assert_eq!(plane.attach(&found, &existing), [].into());
        let ours = order("cni0", tcx::Hook::Ingress);
        assert_eq!((ours.len(), ours[1]), (2, other_id), "ours runs first");
        assert_eq!(plane.attach(&found, &existing), [].into());

        // Somebody comes before us: said by device. A new agent takes the place again, without a moment without; once is no
        // proof, since what the kernel does later it may do soon.
        let (mut before, mut late_id) = (ours[0], 0);
        for _ in 0..10 {
            late_id = come_first().1;
            let errors = plane.attach(&found, &existing);
            assert_eq!(errors.keys().collect::<Vec<_>>(), ["cni0"]);
            assert!(errors["cni0"].contains(&format!("program {late_id}")), "{errors:?}");
            drop(plane);
            plane = bpffs.open();
            let again = while_watching(
                || assert_ne!(order("cni0", tcx::Hook::Ingress), [late_id]),
                || {
                    assert_eq!(plane.attach(&found, &existing), [].into());
                    order("cni0", tcx::Hook::Ingress)
                },
            );
            assert_eq!(again[1..], [late_id], "the old program of ours is gone");
            assert_ne!(std::mem::replace(&mut before, again[0]), again[0]);
            assert_eq!(plane.attach(&found, &existing), [].into());
        }
        // In its place a program is replaced, not attached anew.
        drop(plane);
        let mut plane = bpffs.open();
        assert_eq!(plane.attach(&found, &existing), [].into());
        assert_eq!(order("cni0", tcx::Hook::Ingress)[1..], [late_id]);
    });
}

#[test]
fn programs_of_another_schema_run_until_there_is_a_policy_and_are_replaced_in_place() {
    let bpffs = Bpffs::new("schema");
    let (node, _router) = node_and_router();
    node.run(BRIDGE);
    node.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (found, existing) = runtime.block_on(look());
        let mut plane = bpffs.open();
        assert_eq!(plane.attach(&found, &existing), [].into());
        drop(plane);
        let other = bpffs.0.join("aegis/v1");
        std::fs::rename(bpffs.folder(""), &other).unwrap();
        let hooks = || [order("cni0", tcx::Hook::Ingress), order("eth0", tcx::Hook::Egress)].concat();
        let before = hooks();
        assert_eq!(before.len(), 2);

        let mut plane = bpffs.open();
        assert_eq!(plane.attach(&found, &existing), [].into());
        assert_eq!(hooks(), before, "the maps are empty: nothing would be covered");
        let attached = plane.attached();
        assert_eq!((attached.uplinks.len(), attached.pods.len()), (1, 1));
        bring(plane.as_mut(), &desired(&inputs(2, 1, 0)), &Known::default());
        // No hook is ever empty.
        while_watching(
            || assert_eq!(hooks().len(), 2),
            || assert_eq!(plane.attach(&found, &existing), [].into()),
        );
        let after = hooks();
        assert!(after.len() == 2 && after.iter().all(|id| !before.contains(id)), "{before:?} {after:?}");
        assert!(!other.exists());
        assert_eq!(plane.attached().uplinks.into_values().next().unwrap().1, "Native");
        assert_eq!(std::fs::read_dir(bpffs.folder("links")).unwrap().count(), 4);
        assert_eq!(plane.attach(&found, &existing), [].into());
    });
}

#[test]
fn a_scan_finds_every_entry_of_a_map_larger_than_one_batch() {
    let bpffs = Bpffs::new("scan");
    drop(bpffs.open());
    let path = bpffs.folder("maps/VERDICTS");
    let map = aya::maps::Map::HashMap(aya::maps::MapData::from_pin(&path).unwrap());
    let mut verdicts: aya::maps::HashMap<_, VerdictKey, VerdictValue> = map.try_into().unwrap();
    for number in 0..10_000u32 {
        let key = VerdictKey { generation: 1, pod_class: number, destination_class: 0, port_class: 0 };
        verdicts.insert(key, VerdictValue { binding: number, ..VerdictValue::default() }, 0).unwrap();
    }
    let map = aya::maps::MapData::from_pin(&path).unwrap();
    let mut seen = BTreeSet::new();
    let each = |key: &VerdictKey, value: &VerdictValue| {
        assert_eq!(key.pod_class, value.binding);
        assert!(seen.insert(key.pod_class), "twice");
    };
    aegis_node_agent::sweep::for_each(std::os::fd::AsFd::as_fd(map.fd()), each).unwrap();
    assert_eq!(seen.len(), 10_000);
}
