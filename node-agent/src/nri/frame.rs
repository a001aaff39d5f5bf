//! Frames: the multiplexer that carries two connections in one, and the messages of ttrpc in each of these. Pure.
//!
//! ```text
//! multiplexer: connection u32 | length u32 | length bytes of what is sent over that connection
//! ttrpc:       length u32 | stream u32 | kind u8 | flags u8 | length bytes of a message      (all big-endian)
//! ```
//!
//! A message may be spread over several frames of the multiplexer: each connection is a stream of bytes.

use std::collections::BTreeMap;

/// Connection over which the runtime calls the plugin.
pub const TO_PLUGIN: u32 = 1;
/// Connection over which the plugin calls the runtime.
pub const TO_RUNTIME: u32 = 2;

/// Kind of a message that asks.
pub const REQUEST: u8 = 1;
/// Kind of one that answers.
pub const RESPONSE: u8 = 2;

/// Longest message of ttrpc.
const MAX_MESSAGE: usize = 4 << 20;
/// Header of a message.
const HEADER: usize = 10;
/// Most bytes in a frame that is sent: the reference reads into buffers of this size, and fails where one is too small.
const MAX_SENT: usize = 4096;

/// What is wrong with what came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No peer that keeps to the protocol sends such a length.
    #[error("a length of {0} bytes")]
    Length(usize),
}

/// A message of ttrpc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The call that it belongs to.
    pub stream: u32,
    /// [`REQUEST`] or [`RESPONSE`]; others belong to what nobody here asks for.
    pub kind: u8,
    /// Contents.
    pub body: Vec<u8>,
}

/// The message as it is sent over a connection.
pub fn encode(connection: u32, message: &Message) -> Vec<u8> {
    let length = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(message.stream.to_be_bytes());
    bytes.extend([message.kind, 0]);
    bytes.extend(&message.body);
    let framed = bytes.chunks(MAX_SENT).flat_map(|chunk| {
        let length = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
        [&connection.to_be_bytes()[..], &length.to_be_bytes(), chunk].concat()
    });
    framed.collect()
}

/// Puts messages together again from whatever pieces the bytes come in.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Of the frame that is not complete yet.
    trunk: Vec<u8>,
    /// Of each connection, what is no complete message yet.
    connections: BTreeMap<u32, Vec<u8>>,
}

impl Decoder {
    /// Takes bytes; gives the messages that are complete by them, with their connections.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<(u32, Message)>, FrameError> {
        self.trunk.extend(bytes);
        let mut messages = Vec::new();
        while let Some((connection, length)) = header(&self.trunk) {
            let length = length as usize;
            if length > HEADER + MAX_MESSAGE {
                return Err(FrameError::Length(length));
            }
            let Some(payload) = self.trunk.get(8..8 + length) else { break };
            if connection == TO_PLUGIN || connection == TO_RUNTIME {
                let stream = self.connections.entry(connection).or_default();
                stream.extend(payload);
                take_messages(connection, stream, &mut messages)?;
            }
            self.trunk.drain(..8 + length);
        }
        Ok(messages)
    }
}

fn take_messages(
    connection: u32,
    stream: &mut Vec<u8>,
    messages: &mut Vec<(u32, Message)>,
) -> Result<(), FrameError> {
    while let Some((length, call)) = header(stream) {
        let length = length as usize;
        if length > MAX_MESSAGE {
            return Err(FrameError::Length(length));
        }
        let (Some(kind), Some(body)) = (stream.get(8), stream.get(HEADER..HEADER + length)) else { break };
        messages.push((connection, Message { stream: call, kind: *kind, body: body.to_vec() }));
        stream.drain(..HEADER + length);
    }
    Ok(())
}

/// The two numbers that both kinds of header begin with.
fn header(bytes: &[u8]) -> Option<(u32, u32)> {
    let (first, rest) = bytes.split_first_chunk::<4>()?;
    let (second, _) = rest.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*first), u32::from_be_bytes(*second)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(stream: u32, kind: u8, body: &[u8]) -> Message {
        Message { stream, kind, body: body.to_vec() }
    }

    #[test]
    fn a_message_has_both_headers() {
        let bytes = encode(TO_RUNTIME, &message(5, REQUEST, b"ab"));
        assert_eq!(bytes, [0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 0, 2, 0, 0, 0, 5, 1, 0, b'a', b'b']);
    }

    #[test]
    fn pieces_of_any_size_make_the_same_messages() {
        let sent = [
            (TO_PLUGIN, message(1, REQUEST, &[7; 3 * MAX_SENT])),
            (TO_RUNTIME, message(1, RESPONSE, b"")),
            (TO_PLUGIN, message(3, REQUEST, b"x")),
        ];
        let bytes: Vec<u8> = sent.iter().flat_map(|(connection, it)| encode(*connection, it)).collect();
        for size in [1, 3, 7, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let got: Vec<_> = bytes.chunks(size).flat_map(|piece| decoder.push(piece).unwrap()).collect();
            assert_eq!(got, sent, "pieces of {size}");
        }
    }

    #[test]
    fn connections_may_alternate_within_a_message() {
        let whole = encode(TO_PLUGIN, &message(1, REQUEST, b"hello"));
        let (head, tail) = whole[8..].split_at(4);
        let frame = |connection: u32, bytes: &[u8]| {
            [&connection.to_be_bytes()[..], &(bytes.len() as u32).to_be_bytes(), bytes].concat()
        };
        let other = encode(TO_RUNTIME, &message(1, RESPONSE, b""));
        let unknown = frame(9, b"whatever");
        let bytes = [frame(TO_PLUGIN, head), unknown, other, frame(TO_PLUGIN, tail)].concat();
        let got = Decoder::default().push(&bytes).unwrap();
        let expected = [(TO_RUNTIME, message(1, RESPONSE, b"")), (TO_PLUGIN, message(1, REQUEST, b"hello"))];
        assert_eq!(got, expected);
    }

    #[test]
    fn lengths_that_nobody_sends_end_the_connection() {
        let frame = [0, 0, 0, 1, 0xff, 0, 0, 0];
        assert_eq!(Decoder::default().push(&frame), Err(FrameError::Length(0xff00_0000)));
        let message = [0, 0, 0, 1, 0, 0, 0, 10, 0x01, 0, 0, 0, 0, 0, 0, 1, 1, 0];
        assert_eq!(Decoder::default().push(&message), Err(FrameError::Length(0x0100_0000)));
    }
}
