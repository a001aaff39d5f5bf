//! ICMP echo by a raw socket.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::connections::milliseconds;
use crate::packet::{checksum, protocol};

/// Echo requests one after another; each has its time to be answered. Blocks: run it on a thread of its own.
pub fn ping(
    to: Ipv4Addr,
    count: u16,
    bytes: usize,
    identifier: Option<u16>,
    limit: Duration,
) -> io::Result<Value> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    let identifier = identifier.unwrap_or(crate::listener::now_ms() as u16 ^ std::process::id() as u16);
    let (mut received, mut slowest, mut errors) = (0, Duration::ZERO, Vec::new());
    for sequence in 0..count {
        let begin = Instant::now();
        socket.send_to(&request(identifier, sequence, bytes), &SocketAddrV4::new(to, 0).into())?;
        match await_answer(&socket, identifier, sequence, begin + limit)? {
            Some(Answer::Reply) => {
                received += 1;
                slowest = slowest.max(begin.elapsed());
            }
            Some(Answer::Error(kind, code)) => errors.push(format!("{kind}/{code}")),
            None => {}
        }
    }
    Ok(json!({
        "sent": count,
        "received": received,
        "slowest_ms": milliseconds(slowest),
        "identifier": identifier,
        "errors": errors,
    }))
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Reply,
    Error(u8, u8),
}

fn request(identifier: u16, sequence: u16, bytes: usize) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.resize(8 + bytes, b'p');
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

fn await_answer(socket: &Socket, identifier: u16, sequence: u16, end: Instant) -> io::Result<Option<Answer>> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 65_536];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // SAFETY: the kernel has filled the first `length` bytes.
        let packet = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        if let Some(answer) = classify(packet, identifier, sequence) {
            return Ok(Some(answer));
        }
    }
}

/// Whether a packet, from its IPv4 header on, answers this request: the reply, or an error that quotes it.
fn classify(packet: &[u8], identifier: u16, sequence: u16) -> Option<Answer> {
    let ours = [identifier.to_be_bytes(), sequence.to_be_bytes()].concat();
    let icmp = packet.get(usize::from(*packet.first()? & 0xf) * 4..)?;
    match icmp.first()? {
        0 => (icmp.get(4..8)? == ours).then_some(Answer::Reply),
        kind @ (3 | 11 | 12) => {
            let quoted = icmp.get(8..)?;
            let inner = quoted.get(usize::from(*quoted.first()? & 0xf) * 4..)?;
            let matches =
                quoted.get(9)? == &protocol::ICMP && inner.first()? == &8 && inner.get(4..8)? == ours;
            matches.then(|| Answer::Error(*kind, icmp[1]))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Payload, build};

    #[test]
    fn replies_and_errors_are_told_apart_from_others() {
        let end: SocketAddrV4 = "198.51.100.10:0".parse().unwrap();
        let sent = build("10.0.0.1:2000".parse().unwrap(), end, Payload::Echo, 7);
        let mut reply = sent.clone();
        reply[20] = 0;
        assert_eq!(classify(&reply, 2000, 7), Some(Answer::Reply));
        assert_eq!(classify(&reply, 2001, 7), None);
        assert_eq!(classify(&reply, 2000, 8), None);
        assert_eq!(classify(&sent, 2000, 7), None, "our own request is no answer");
        let error = [&sent[..20], &[3, 13, 0, 0, 0, 0, 0, 0], &sent[..]].concat();
        assert_eq!(classify(&error, 2000, 7), Some(Answer::Error(3, 13)));
        assert_eq!(classify(&error, 2000, 9), None);
        assert_eq!(classify(&[0x45; 10], 1, 1), None);
    }
}
