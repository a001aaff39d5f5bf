//! ARP packets (RFC 826) in Ethernet frames: reading what others say of an address, and what this node says.

use super::election::{Heard, Mac};
use std::net::Ipv4Addr;

/// Ethernet type of ARP.
pub const ETHERTYPE: u16 = 0x0806;
/// Every station of the link.
pub const BROADCAST: Mac = [0xff; 6];
/// Ethernet and IPv4, with the lengths of their addresses.
const START: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 0];
const QUESTION: u16 = 1;
const ANSWER: u16 = 2;
const NOBODY: Mac = [0; 6];
/// Bytes of a frame: 14 of Ethernet, 28 of ARP.
const LENGTH: usize = 42;

/// What a frame says of an address: which, whose MAC, and whether it claims the address or only asks who has it.
pub fn read(frame: &[u8]) -> Option<(Ipv4Addr, Mac, Heard)> {
    let frame: &[u8; LENGTH] = frame.first_chunk()?;
    let bytes = |at: usize| [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
    let operation = u16::from_be_bytes([frame[20], frame[21]]);
    let known = frame[12..14] == ETHERTYPE.to_be_bytes()
        && frame[14..20] == START[..6]
        && matches!(operation, QUESTION | ANSWER);
    let mac: Mac = frame[22..28].try_into().ok()?;
    let (sender, target) = (Ipv4Addr::from(bytes(28)), Ipv4Addr::from(bytes(38)));
    match known {
        false => None,
        true if !sender.is_unspecified() => Some((sender, mac, Heard::Claim)),
        true if operation == ANSWER => None,
        true if frame[32..38] == mac => Some((target, mac, Heard::HandOver)),
        true => Some((target, mac, Heard::Question)),
    }
}

/// A question for an address by one that has none itself (RFC 5227 section 1.1: a probe), for all to hear.
pub fn question(mac: Mac, address: Ipv4Addr) -> [u8; LENGTH] {
    frame(mac, Ipv4Addr::UNSPECIFIED, NOBODY, address)
}

/// A question by one that wants somebody else to have the address. Everybody answers it like any other; what tells the agents
/// is the field that a question leaves empty.
pub fn hand_over(mac: Mac, address: Ipv4Addr) -> [u8; LENGTH] {
    frame(mac, Ipv4Addr::UNSPECIFIED, mac, address)
}

/// Tells that an address is here (RFC 5227 section 1.1: an announcement), for all to hear.
pub fn announcement(mac: Mac, address: Ipv4Addr) -> [u8; LENGTH] {
    frame(mac, address, NOBODY, address)
}

fn frame(mac: Mac, sender: Ipv4Addr, target_mac: Mac, target: Ipv4Addr) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    let parts: [&[u8]; 9] = [
        &BROADCAST,
        &mac,
        &ETHERTYPE.to_be_bytes(),
        &START[..6],
        &QUESTION.to_be_bytes(),
        &mac,
        &sender.octets(),
        &target_mac,
        &target.octets(),
    ];
    for (place, byte) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *place = *byte;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);

    #[test]
    fn what_is_said_is_what_others_hear() {
        assert_eq!(read(&question(MAC, ADDRESS)), Some((ADDRESS, MAC, Heard::Question)));
        assert_eq!(read(&hand_over(MAC, ADDRESS)), Some((ADDRESS, MAC, Heard::HandOver)));
        assert_eq!(read(&announcement(MAC, ADDRESS)), Some((ADDRESS, MAC, Heard::Claim)));
        let expected =
            "ffffffffffff 020000000007 0806 0001 0800 06 04 0001 020000000007 cb007107 000000000000 cb007107";
        let bytes: String = announcement(MAC, ADDRESS).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(bytes, expected.replace(' ', ""));
    }

    #[test]
    fn answers_claim_and_other_frames_say_nothing() {
        let changed = |at: usize, byte: u8| {
            let mut frame = announcement(MAC, ADDRESS);
            frame[at] = byte;
            frame
        };
        assert_eq!(read(&changed(21, 2)), Some((ADDRESS, MAC, Heard::Claim)), "an answer");
        assert_eq!(
            read(&changed(41, 9)),
            Some((ADDRESS, MAC, Heard::Claim)),
            "who asks for another claims too"
        );
        for (at, byte) in [(13, 0), (15, 6), (16, 0x86), (18, 8), (21, 3)] {
            assert_eq!(read(&changed(at, byte)), None, "byte {at}");
        }
        assert_eq!(read(&announcement(MAC, ADDRESS)[..41]), None);
        let mut answer = question(MAC, ADDRESS);
        answer[21] = 2;
        assert_eq!(read(&answer), None, "an answer by nobody");
    }
}
