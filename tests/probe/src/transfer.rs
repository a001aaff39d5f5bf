//! Bulk data with a digest: both sides compute it, so a byte that a wrong checksum let through is noticed.

use std::io;
use std::net::SocketAddr;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::command::{DOWNLOAD, UPLOAD};

const BLOCK: usize = 1 << 16;
/// Bytes of a SHA-256.
const DIGEST: usize = 32;

/// Bytes without short repetition, so that swapped segments change the digest (xorshift).
fn block(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(BLOCK / 8).flatten().collect()
}

/// Sends so many bytes and returns their digest.
async fn send(stream: &mut TcpStream, bytes: u64) -> io::Result<[u8; DIGEST]> {
    let mut hash = Sha256::new();
    let mut left = bytes;
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    while left > 0 {
        let block = block(seed);
        let part = &block[..BLOCK.min(usize::try_from(left).unwrap_or(BLOCK))];
        hash.update(part);
        stream.write_all(part).await?;
        left -= part.len() as u64;
        seed = seed.wrapping_add(0x1234_5678_9abc_def1);
    }
    Ok(hash.finalize().into())
}

/// Receives so many bytes and returns their digest.
async fn receive(stream: &mut TcpStream, bytes: u64) -> io::Result<[u8; DIGEST]> {
    let mut hash = Sha256::new();
    let mut left = bytes;
    let mut buffer = vec![0; BLOCK];
    while left > 0 {
        let room = BLOCK.min(usize::try_from(left).unwrap_or(BLOCK));
        let count = stream.read(&mut buffer[..room]).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hash.update(&buffer[..count]);
        left -= count as u64;
    }
    Ok(hash.finalize().into())
}

/// Server's side of a download.
pub async fn serve_download(stream: &mut TcpStream) -> io::Result<()> {
    let bytes = stream.read_u64().await?;
    let digest = send(stream, bytes).await?;
    stream.write_all(&digest).await
}

/// Server's side of an upload.
pub async fn serve_upload(stream: &mut TcpStream) -> io::Result<()> {
    let bytes = stream.read_u64().await?;
    let digest = receive(stream, bytes).await?;
    stream.write_all(&digest).await
}

/// Downloads and checks.
pub async fn download(to: SocketAddr, bytes: u64) -> io::Result<()> {
    let mut stream = begin(to, DOWNLOAD, bytes).await?;
    let digest = receive(&mut stream, bytes).await?;
    compare(&mut stream, digest).await
}

/// Uploads and checks.
pub async fn upload(to: SocketAddr, bytes: u64) -> io::Result<()> {
    let mut stream = begin(to, UPLOAD, bytes).await?;
    let digest = send(&mut stream, bytes).await?;
    compare(&mut stream, digest).await
}

async fn begin(to: SocketAddr, purpose: u8, bytes: u64) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.write_u8(purpose).await?;
    stream.write_u64(bytes).await?;
    Ok(stream)
}

async fn compare(stream: &mut TcpStream, ours: [u8; DIGEST]) -> io::Result<()> {
    let mut theirs = [0; DIGEST];
    stream.read_exact(&mut theirs).await?;
    if ours == theirs { Ok(()) } else { Err(io::Error::other("wrong_digest")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_differ() {
        assert_eq!(block(1).len(), BLOCK);
        assert_ne!(block(1), block(3));
        assert_ne!(block(1)[..1448], block(1)[1448..2896]);
    }

    #[tokio::test]
    async fn a_wrong_digest_is_noticed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            for right in [true, false] {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert_eq!(stream.read_u8().await.unwrap(), DOWNLOAD);
                if right {
                    serve_download(&mut stream).await.unwrap();
                } else {
                    let bytes = stream.read_u64().await.unwrap();
                    send(&mut stream, bytes).await.unwrap();
                    stream.write_all(&[7; DIGEST]).await.unwrap();
                }
            }
        });
        download(to, 300_000).await.unwrap();
        assert_eq!(download(to, 300_000).await.unwrap_err().to_string(), "wrong_digest");
        server.await.unwrap();
    }
}
