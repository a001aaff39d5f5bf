//! What a node forwards for others: one that holds slices for one that does not, beside one that forwards and masquerades in the
//! kernel. Frames come from the other node's link, in the tunnel here and plain there, and what leaves is counted on it.

use crate::measure::busy;
use crate::netns_support::Namespace;
use crate::netns_support::path::{EGRESS, NODE, ORIGIN, attach, holding, inputs};
use crate::netns_support::plane::{Bpffs, bring};
use crate::packet::{Packet, geneve};
use crate::tiny::{self, Sender};
use aegis_common::{Timeouts, VNI_GATEWAY};
use aegis_node_agent::desired::desired;
use aegis_node_agent::ethtool;
use aegis_node_agent::objects::NodeRecord;
use aegis_node_agent::ops::Known;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// A pod of the other node.
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 5);
const FLOWS: u16 = 16;
const TIME: Duration = Duration::from_secs(2);
/// Frames of one call.
const CALL: u32 = 1 << 14;

#[derive(Debug, Default)]
pub struct Through {
    pub packets: f64,
    pub packet_ns: f64,
}

/// Two nodes on one link, the first of which forwards for the second.
struct Link {
    gateway: Namespace,
    /// The other node and the router.
    rest: Namespace,
    _sink: tiny::Attached,
}

impl Link {
    fn new() -> Link {
        let (gateway, rest) = (Namespace::new("gateway"), Namespace::new("rest"));
        gateway.link("eth0", &rest, "eth0");
        gateway.run(&format!(
            "ip addr add {NODE}/24 dev eth0; ip route add default via 192.0.2.9; \
             sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0"
        ));
        rest.run(&format!("ip addr add 192.0.2.9/24 dev eth0; ip addr add {OTHER}/24 dev eth0"));
        // Nobody answers ARP: the sink takes everything.
        let mac = hex(&mac(&rest));
        for address in ["192.0.2.9".to_owned(), OTHER.to_string()] {
            gateway.run(&format!("ip neigh replace {address} lladdr {mac} dev eth0 nud permanent"));
        }
        let sink = rest.enter(|| tiny::on("eth0", tiny::DROP));
        Link { gateway, rest, _sink: sink }
    }

    /// Sends frames for a while.
    fn measure(&self, frames: &[Vec<u8>]) -> Through {
        self.rest.enter(|| {
            let sender = Sender::through("eth0", frames);
            let arrived = || ethtool::sum("eth0", "_xdp_drops").unwrap() as f64;
            // Flows are made.
            sender.send(CALL);
            let (begin, work, start) = (arrived(), busy(), Instant::now());
            while start.elapsed() < TIME {
                sender.send(CALL);
            }
            let packets = arrived() - begin;
            Through {
                packets: packets / start.elapsed().as_secs_f64(),
                packet_ns: (busy() - work) * 1e9 / packets,
            }
        })
    }
}

fn mac(namespace: &Namespace) -> [u8; 6] {
    let text = namespace.output("ip -o link show eth0");
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn hex(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn packets() -> impl Iterator<Item = Packet> {
    (0..FLOWS).map(|flow| Packet::udp((POD, 20_000 + flow), (ORIGIN, 9000), &[0; 18]))
}

/// The data plane of a node that holds all slices.
pub fn ours() -> Through {
    let link = Link::new();
    let bpffs = Bpffs::new(&link.gateway.name);
    let _plane = link.gateway.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut plane = bpffs.open_sized(1 << 16, 1 << 10);
        let mut inputs = inputs(vec![holding(4, 255, "n0")], Timeouts::default());
        inputs.nodes.insert("n1".to_owned(), NodeRecord { addresses: vec![OTHER], ..NodeRecord::default() });
        inputs.tunnels.insert("n1".to_owned(), OTHER);
        bring(plane.as_mut(), &desired(&inputs), &Known::default());
        attach(plane.as_mut(), &runtime);
        plane
    });
    let macs = (mac(&link.rest), mac(&link.gateway));
    let frames: Vec<Vec<u8>> = packets()
        .map(|packet| {
            let mut inner = vec![0xff, 0x91, 0x81, 0x01];
            inner.extend(EGRESS.octets());
            inner.extend(packet.bytes());
            let mut frame = geneve((OTHER, NODE), macs, 0xc123, VNI_GATEWAY, &inner);
            // Two words of options, which are critical.
            frame[42..44].copy_from_slice(&[2, 0x40]);
            frame
        })
        .collect();
    link.measure(&frames)
}

/// A node that forwards and masquerades.
pub fn masquerade() -> Through {
    let link = Link::new();
    link.gateway.run(
        "nft \"table ip reference { chain post { type nat hook postrouting priority srcnat; oifname eth0 ip saddr 10.244.0.0/16 meta l4proto udp masquerade to :1024-65535; }; }\"",
    );
    let _pass = link.gateway.enter(|| tiny::on("eth0", tiny::PASS));
    let (to, from) = (mac(&link.gateway), mac(&link.rest));
    let frames: Vec<Vec<u8>> = packets()
        .map(|packet| {
            let mut frame = packet.frame();
            frame[..6].copy_from_slice(&to);
            frame[6..12].copy_from_slice(&from);
            frame
        })
        .collect();
    link.measure(&frames)
}
