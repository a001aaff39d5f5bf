//! Asking a resolver.

use super::message::{self, Answer, MessageError};
use hickory_proto::op::Message;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// Port of DNS.
pub const PORT: u16 = 53;
/// Time for which a resolver is waited for. Whoever asks through the agent tries again by himself.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Room for a datagram.
const DATAGRAM: usize = 65_535;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The network.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The message.
    #[error("{0}")]
    Message(#[from] MessageError),
    /// Silence.
    #[error("no answer within {} seconds", TIMEOUT.as_secs())]
    Timeout,
}

/// How to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By datagrams.
    Udp,
    /// By a connection.
    Tcp,
}

/// Asks; gives the answer as it came, with the query's own number, and what it says.
///
/// It is asked from a port, and under a number, that nobody knows: whoever asks through the agent knows his own, and could forge the
/// answer by which others' traffic would go somewhere else.
pub async fn ask(
    resolver: SocketAddr,
    query: &[u8],
    parsed: &Message,
    way: Way,
) -> Result<(Vec<u8>, Answer), AskError> {
    let (number, mut query, mut parsed) = (random(), query.to_vec(), parsed.clone());
    let own = parsed.metadata.id;
    set_number(&mut query, number);
    parsed.metadata.id = number;
    let asked = async {
        match way {
            Way::Udp => by_datagrams(resolver, &query, &parsed).await,
            Way::Tcp => by_connection(resolver, &query, &parsed).await,
        }
    };
    let (mut answer, read) = tokio::time::timeout(TIMEOUT, asked).await.map_err(|_| AskError::Timeout)??;
    set_number(&mut answer, own);
    Ok((answer, read))
}

fn set_number(message: &mut [u8], number: u16) {
    if let Some(field) = message.first_chunk_mut::<2>() {
        *field = number.to_be_bytes();
    }
}

/// A number that cannot be guessed: the keys of the standard library's hashes are the system's.
pub fn random() -> u16 {
    (RandomState::new().build_hasher().finish() >> 16) as u16
}

async fn by_datagrams(
    resolver: SocketAddr,
    query: &[u8],
    parsed: &Message,
) -> Result<(Vec<u8>, Answer), AskError> {
    let any: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Only what comes from there is received.
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        match message::read(parsed, answer) {
            Ok(read) => return Ok((answer.to_vec(), read)),
            // Somebody else's, or a late one.
            Err(MessageError::Other) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn by_connection(
    resolver: SocketAddr,
    query: &[u8],
    parsed: &Message,
) -> Result<(Vec<u8>, Answer), AskError> {
    let mut stream = TcpStream::connect(resolver).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    let read = message::read(parsed, &answer)?;
    Ok((answer, read))
}

/// Reads a message with its length in front.
pub async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes one.
pub async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_differ() {
        let numbers: std::collections::HashSet<u16> = (0..1000).map(|_| super::random()).collect();
        assert!(numbers.len() > 900, "{}", numbers.len());
    }
}
