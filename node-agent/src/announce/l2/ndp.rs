//! Messages between IPv6 neighbours (RFC 4861) in Ethernet frames: what nodes say to each other of a /64 or a single address, and
//! what they tell others of addresses in it.
//!
//! Nodes speak of a /64 by one address in it that no pod has ([`seat`]), of a single address by itself: a solicitation for it asks
//! who answers, an advertisement of it claims it.

use super::election::{Heard, Mac};
use crate::observed::{from_map6, to_network};
use aegis_core::egress::Egress;
use std::net::Ipv6Addr;

/// Ethernet type of IPv6.
pub const ETHERTYPE: u16 = 0x86dd;
/// MAC of the group in which whoever is asked for by a [`seat`] is: the same for all of them.
pub const SEAT_GROUP: Mac = [0x33, 0x33, 0xff, 0x0a, 0xe9, 0x15];
/// MAC of all nodes of a link.
pub const ALL_NODES: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ICMPV6: u8 = 58;
/// Nothing that has passed a router has this hop limit.
const FROM_THE_LINK: u8 = 255;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Of an advertisement: it takes the place of what was known.
const OVERRIDE: u32 = 0x2000_0000;
/// Of a solicitation, in the word that it leaves empty: somebody else is to answer.
const HAND_OVER: u32 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// An option that is for the sender only (RFC 3971 section 5.3.2): its MAC. An answer, which names a MAC, so takes no more room than
/// the question.
const NONCE: u8 = 14;
/// Bytes of a frame: 14 of Ethernet, 40 of IPv6, 24 of a message, 8 of an option.
const LENGTH: usize = 86;
const START: usize = 54;

/// The address by which nodes speak of a /64 or of a single address.
pub fn seat(egress: Egress) -> Option<Ipv6Addr> {
    match egress {
        Egress::Single(address) => Some(address),
        _ => to_network(egress).map(|network| from_map6(aegis_common::seat(network))),
    }
}

/// What a frame says of a /64, or of an address that may be a single one: which, whose MAC, and whether it claims it or only asks
/// who has it.
pub fn read(frame: &[u8]) -> Option<(Egress, Mac, Heard)> {
    let (head, message) = (frame.get(..START)?, frame.get(START..)?);
    let length = usize::from(u16::from_be_bytes([head[18], head[19]]));
    let message = message.get(..length).filter(|message| message.len() >= 24)?;
    let known = head[12..14] == ETHERTYPE.to_be_bytes()
        && head[14] >> 4 == 6
        && (head[20], head[21]) == (ICMPV6, FROM_THE_LINK)
        && message[1] == 0
        && sum(&head[22..], message) == 0xffff;
    let address = |bytes: &[u8]| <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from);
    let (source, target) = (address(&head[22..38])?, address(&message[8..24])?);
    if !known {
        return None;
    }
    let network = Egress::containing(target.into());
    let egress = if seat(network) == Some(target) { network } else { Egress::Single(target) };
    let sender: Mac = head[6..12].try_into().ok()?;
    match message[0] {
        ADVERTISEMENT => {
            let option = message.get(24..32).filter(|option| option[..2] == [TARGET_LINK_ADDRESS, 1]);
            let mac = option.and_then(|option| option[2..].try_into().ok());
            Some((egress, mac.unwrap_or(sender), Heard::Claim))
        }
        SOLICITATION if source.is_unspecified() => {
            let heard = if message[7] == HAND_OVER as u8 { Heard::HandOver } else { Heard::Question };
            Some((egress, sender, heard))
        }
        _ => None,
    }
}

/// A question for a /64 by one that has no address in it, for all to hear.
pub fn question(mac: Mac, egress: Egress) -> Option<[u8; LENGTH]> {
    solicitation(mac, egress, 0)
}

/// A question by one that wants somebody else to have the /64. It is answered like any other.
pub fn hand_over(mac: Mac, egress: Egress) -> Option<[u8; LENGTH]> {
    solicitation(mac, egress, HAND_OVER)
}

/// Tells that a /64 is here, for all to hear.
pub fn announcement(mac: Mac, egress: Egress) -> Option<[u8; LENGTH]> {
    seat(egress).map(|seat| advertisement(mac, seat, mac))
}

/// Tells that an address is at a MAC (RFC 4861 section 7.2.6), for all to hear; `own` is the sender's.
pub fn advertisement(own: Mac, address: Ipv6Addr, mac: Mac) -> [u8; LENGTH] {
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // What has a source within an egress /64 the uplink lets out for pods only.
    frame(
        ALL_NODES,
        own,
        [link_local(own), all],
        (ADVERTISEMENT, OVERRIDE, address),
        (TARGET_LINK_ADDRESS, mac),
    )
}

/// Address that a device with this MAC has by itself (RFC 4291 appendix A).
fn link_local([a, b, c, d, e, f]: Mac) -> Ipv6Addr {
    let word = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, word(a ^ 2, b), word(c, 0xff), word(0xfe, d), word(e, f))
}

fn solicitation(mac: Mac, egress: Egress, word: u32) -> Option<[u8; LENGTH]> {
    let seat = seat(egress)?;
    let low = seat.to_bits() as u32 & 0xff_ffff;
    let group = Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000 | u128::from(low));
    let addresses = [Ipv6Addr::UNSPECIFIED, group];
    // Of the groups of single addresses nodes are no members: all of the link hear of these.
    let to = if let Egress::Single(_) = egress { ALL_NODES } else { SEAT_GROUP };
    Some(frame(to, mac, addresses, (SOLICITATION, word, seat), (NONCE, mac)))
}

fn frame(
    to: Mac,
    own: Mac,
    [source, destination]: [Ipv6Addr; 2],
    (kind, word, target): (u8, u32, Ipv6Addr),
    (option, mac): (u8, Mac),
) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    let parts: [&[u8]; 12] = [
        &to,
        &own,
        &ETHERTYPE.to_be_bytes(),
        &[0x60, 0, 0, 0, 0, (LENGTH - START) as u8, ICMPV6, FROM_THE_LINK],
        &source.octets(),
        &destination.octets(),
        &[kind, 0, 0, 0],
        &word.to_be_bytes(),
        &target.octets(),
        &[option, 1],
        &mac,
        &[],
    ];
    for (place, byte) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *place = *byte;
    }
    let checksum = !sum(&frame[22..START], &frame[START..]);
    frame[START + 2..START + 4].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Sum over a message and its pseudo-header (RFC 8200 section 8.1), in ones' complement.
fn sum(addresses: &[u8], message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        bytes.chunks(2).map(word).sum()
    };
    let mut sum = words(addresses) + words(message) + message.len() as u64 + u64::from(ICMPV6);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];
    /// 2001:db8:1:2::/64
    const NETWORK: Egress = Egress::V6(0x2001_0db8_0001_0002);

    #[test]
    fn what_is_said_is_what_others_hear() {
        let frames = [question(MAC, NETWORK), hand_over(MAC, NETWORK), announcement(MAC, NETWORK)];
        let heard = frames.map(|frame| read(&frame.unwrap()));
        let expected = [Heard::Question, Heard::HandOver, Heard::Claim];
        assert_eq!(heard, expected.map(|heard| Some((NETWORK, MAC, heard))));
        let bytes_of_question = "3333ff0ae915 020000000007 86dd 60000000 0020 3a ff 00000000000000000000000000000000 \
                        ff0200000000000000000001ff0ae915 87 00 6a9c 00000000 20010db80001000200000000000ae915 \
                        0e 01 020000000007";
        let bytes: String =
            question(MAC, NETWORK).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(bytes, bytes_of_question.replace(' ', ""));
        let address: Ipv6Addr = "2001:db8:1:2:4:1::1".parse().unwrap();
        let single = Egress::Single(address);
        let other = read(&advertisement(MAC, address, OTHER));
        assert_eq!(other, Some((single, OTHER, Heard::Claim)), "of a pod, if it is no single address");
        let frames = [question(MAC, single), hand_over(MAC, single), announcement(MAC, single)];
        let heard = frames.map(|frame| read(&frame.unwrap()));
        assert_eq!(heard, expected.map(|heard| Some((single, MAC, heard))));
        assert_eq!(question(MAC, "203.0.113.7".parse().unwrap()), None);
        assert_eq!(link_local(MAC).to_string(), "fe80::ff:fe00:7");
    }

    #[test]
    fn the_mac_that_is_told_counts_and_other_frames_say_nothing() {
        let claim = advertisement(MAC, seat(NETWORK).unwrap(), OTHER);
        assert_eq!(read(&claim), Some((NETWORK, OTHER, Heard::Claim)));
        for at in [12, 14, 19, 20, 21, 40, 54, 55, 57, 60, 70, 77, 85] {
            let mut changed = claim;
            changed[at] ^= 0x81;
            assert_eq!(read(&changed), None, "byte {at}");
        }
        for length in [0, 53, 54, 77, 85] {
            assert_eq!(read(&claim[..length]), None, "{length} bytes");
        }
        let mut padded = claim.to_vec();
        padded.resize(120, 7);
        assert_eq!(read(&padded), Some((NETWORK, OTHER, Heard::Claim)));
    }
}
