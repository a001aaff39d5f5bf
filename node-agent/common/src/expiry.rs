//! When a flow is over.

use crate::{ForwardValue, ReverseValue, SEEN_ACK, SEEN_FIN, SEEN_RST, SEEN_SYN, Timeouts};

/// Seconds that a port rests, where no allocation says otherwise ([`Timeouts::rest`]), after its flow timed out without being
/// closed or its state was lost (RFC 6888 REQ-8).
pub const REST: u32 = 120;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What has become of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// TCP: segments passed both ways.
    Established,
    /// TCP: being opened, or closed by one side only, or by an RST that only the outside has seen.
    Transitory,
    /// TCP: closed by FIN both ways, or by an RST in which the pod had a part.
    Closed,
    /// UDP.
    Datagrams,
    /// ICMP echo.
    Echo,
}

/// Phase of a flow, from what both directions saw (RFC 5382 section 5, RFC 7857 section 2).
///
/// An RST from outside may be anybody's, since sequence numbers are not followed: of an established connection it proves
/// nothing before the pod agrees (RFC 7857 section 2.2). A connection that the pod has not yet acknowledged is refused by it.
#[inline(always)]
pub fn phase(protocol: u8, out: u8, back: u8) -> Phase {
    match protocol {
        TCP if out & SEEN_RST != 0 || out & back & SEEN_FIN != 0 => Phase::Closed,
        TCP if back & SEEN_RST != 0 && (out & SEEN_FIN != 0 || out & SEEN_ACK == 0) => Phase::Closed,
        TCP if (out | back) & (SEEN_FIN | SEEN_RST) != 0 => Phase::Transitory,
        TCP if out & SEEN_ACK != 0 && back & (SEEN_SYN | SEEN_ACK) != 0 => Phase::Established,
        TCP => Phase::Transitory,
        UDP => Phase::Datagrams,
        _ => Phase::Echo,
    }
}

/// Whether the flow's port may be used for another flow. `now` is in seconds since boot, like the flow's times.
#[inline(always)]
pub fn expired(
    protocol: u8,
    forward: &ForwardValue,
    reverse: &ReverseValue,
    timeouts: &Timeouts,
    now: u32,
) -> bool {
    let last = if forward.last_seen > reverse.last_seen { forward.last_seen } else { reverse.last_seen };
    let idle = now.saturating_sub(last);
    let limit = match phase(protocol, forward.seen, reverse.seen) {
        Phase::Closed => timeouts.tcp_closed,
        Phase::Established => timeouts.tcp_established.saturating_add(timeouts.rest),
        Phase::Transitory => timeouts.tcp_transitory.saturating_add(timeouts.rest),
        Phase::Datagrams => timeouts.udp.saturating_add(timeouts.rest),
        Phase::Echo => timeouts.icmp.saturating_add(timeouts.rest),
    };
    idle > limit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(out: u8, back: u8, last: u32) -> (ForwardValue, ReverseValue) {
        let forward = ForwardValue { seen: out, last_seen: last, ..Default::default() };
        (forward, ReverseValue { seen: back, last_seen: last / 2, ..Default::default() })
    }

    #[test]
    fn each_phase_has_its_limit() {
        let timeouts = Timeouts::default();
        let cases = [
            (6, SEEN_SYN, 0, 240 + REST),
            (6, SEEN_SYN | SEEN_ACK, SEEN_SYN, 7440 + REST),
            (6, SEEN_SYN | SEEN_ACK, SEEN_SYN | SEEN_ACK, 7440 + REST),
            (6, SEEN_SYN | SEEN_ACK | SEEN_FIN, SEEN_SYN | SEEN_ACK, 240 + REST),
            (6, SEEN_SYN | SEEN_ACK | SEEN_FIN, SEEN_SYN | SEEN_ACK | SEEN_FIN, 10),
            (6, SEEN_SYN | SEEN_ACK | SEEN_RST, SEEN_SYN | SEEN_ACK, 10),
            (6, SEEN_SYN | SEEN_ACK, SEEN_SYN | SEEN_ACK | SEEN_RST, 240 + REST),
            (6, SEEN_SYN | SEEN_ACK | SEEN_FIN, SEEN_SYN | SEEN_ACK | SEEN_RST, 10),
            (6, SEEN_SYN, SEEN_RST, 10),
            (17, 0, 0, 300 + REST),
            (1, 0, 0, 60 + REST),
        ];
        for (protocol, out, back, limit) in cases {
            let (forward, reverse) = flow(out, back, 1000);
            let at = |now| expired(protocol, &forward, &reverse, &timeouts, now);
            assert!(!at(1000 + limit), "{protocol} {out} {back}: still within {limit} s");
            assert!(at(1001 + limit), "{protocol} {out} {back}: over after {limit} s");
        }
    }

    #[test]
    fn the_rest_is_what_the_allocation_says() {
        for rest in [0, 7, 3600] {
            let timeouts = Timeouts { rest, ..Timeouts::default() };
            for (protocol, out, back, limit) in [
                (17, 0, 0, 300 + rest),
                (1, 0, 0, 60 + rest),
                (6, SEEN_SYN, 0, 240 + rest),
                (6, SEEN_SYN, SEEN_RST, 10),
            ] {
                let (forward, reverse) = flow(out, back, 1000);
                assert!(
                    !expired(protocol, &forward, &reverse, &timeouts, 1000 + limit),
                    "{protocol}, rest {rest}"
                );
                assert!(
                    expired(protocol, &forward, &reverse, &timeouts, 1001 + limit),
                    "{protocol}, rest {rest}"
                );
            }
        }
    }

    #[test]
    fn either_direction_keeps_a_flow() {
        let reverse = ReverseValue { last_seen: 5000, ..Default::default() };
        let forward = ForwardValue { last_seen: 1, ..Default::default() };
        assert!(!expired(17, &forward, &reverse, &Timeouts::default(), 5001));
    }

    #[test]
    fn a_time_before_the_last_packet_is_not_over() {
        let (forward, reverse) = flow(0, 0, 100);
        assert!(!expired(17, &forward, &reverse, &Timeouts::default(), 50));
    }
}
