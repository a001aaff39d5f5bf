//! Keeps out what the table `ip6 aegis` has not looked at: a rule of the kernel's routing drops packets that come from an uplink and
//! still bear the mark. The table takes it away from what was asked for and drops the rest, so the rule only matters while the table is
//! missing: somebody has flushed the ruleset, and the agent is not there to put it back. Like the table it outlives the agent.

use crate::announce::routes::PROTOCOL;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::Handle;
use std::collections::{BTreeMap, BTreeSet};

/// Before the rules of anybody else but the kernel's own.
const PRIORITY: u32 = 4;

/// A rule: name of the uplink, and bit of the mark.
pub type Key = (String, u32);

/// The key of a rule, if it is one of the agent's.
pub fn key(rule: &RuleMessage) -> Option<Key> {
    let (mut device, mut mark, mut ours) = (None, 0, false);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Iifname(name) => device = Some(name.clone()),
            RuleAttribute::FwMark(bits) => mark = *bits,
            RuleAttribute::Protocol(protocol) => ours = *protocol == RouteProtocol::Other(PROTOCOL),
            _ => {}
        }
    }
    (ours && rule.header.action == RuleAction::Blackhole).then_some((device?, mark))
}

fn message((device, mark): &Key) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.action = RuleAction::Blackhole;
    message.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::Iifname(device.clone()),
        RuleAttribute::FwMark(*mark),
        RuleAttribute::FwMask(*mark),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    message
}

/// Brings the kernel from what is present to what is wanted. Gives what failed.
pub async fn bring(
    handle: &Handle,
    wanted: &BTreeSet<Key>,
    present: &BTreeSet<Key>,
) -> BTreeMap<Key, String> {
    let mut errors = BTreeMap::new();
    // A node is never without, between two marks or names of a device.
    for key in wanted.difference(present) {
        let mut request = handle.rule().add();
        *request.message_mut() = message(key);
        if let Err(error) = request.execute().await {
            errors.insert(key.clone(), error.to_string());
        }
    }
    for key in present.difference(wanted) {
        // One that somebody else has just removed is what was wanted.
        let _ = handle.rule().del(message(key)).execute().await;
    }
    errors
}
