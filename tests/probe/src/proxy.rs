//! A forward proxy: `CONNECT` of HTTP (RFC 9110 section 9.3.6), and nothing else of it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use anyhow::{Context, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader as AsyncBufReader};
use tokio::net::{TcpListener, TcpStream as AsyncTcpStream};

/// Bytes of a request's head that are read.
const HEAD: u64 = 8192;

/// Serves on a TCP port until the process is killed.
pub fn run(port: u16) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await.context("listen")?;
        loop {
            let (client, from) = listener.accept().await.context("accept")?;
            tokio::spawn(async move {
                if let Err(error) = relay(client).await {
                    eprintln!("{from}: {error}");
                }
            });
        }
    })
}

async fn relay(mut client: AsyncTcpStream) -> io::Result<()> {
    let mut client = AsyncBufReader::new(&mut client);
    let mut request = String::new();
    let mut head = (&mut client).take(HEAD);
    head.read_line(&mut request).await?;
    let mut line = request.clone();
    while !line.trim().is_empty() {
        line.clear();
        head.read_line(&mut line).await?;
    }
    let Some(target) = target(&request) else {
        return client.get_mut().write_all(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n").await;
    };
    match AsyncTcpStream::connect(target).await {
        Ok(mut origin) => {
            client.get_mut().write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
            tokio::io::copy_bidirectional(&mut client, &mut origin).await.map(drop)
        }
        Err(error) => {
            let answer = format!("HTTP/1.1 502 Bad Gateway\r\n\r\n{error}\n");
            client.get_mut().write_all(answer.as_bytes()).await
        }
    }
}

fn target(request: &str) -> Option<&str> {
    request.strip_prefix("CONNECT ")?.split(' ').next()
}

/// Connects to a server through a proxy.
pub fn connect(proxy: SocketAddr, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(proxy)?;
    stream.write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes())?;
    // By bytes, so that nothing of what follows the head is lost.
    let mut head = Vec::new();
    let mut bytes = BufReader::with_capacity(1, &mut stream).take(HEAD);
    while !head.ends_with(b"\r\n\r\n") && bytes.read_until(b'\n', &mut head)? > 0 {}
    let head = String::from_utf8_lossy(&head).into_owned();
    ensure!(head.starts_with("HTTP/1.1 200"), "{proxy}: {}", head.trim());
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_its_target() {
        assert_eq!(target("CONNECT 198.51.100.7:443 HTTP/1.1\r\n"), Some("198.51.100.7:443"));
        assert_eq!(target("GET / HTTP/1.1\r\n"), None);
    }

    #[test]
    fn bytes_go_both_ways_and_a_failure_is_told() {
        let origin = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = origin.local_addr().unwrap();
        let proxy: SocketAddr = ([127, 0, 0, 1], 7098).into();
        std::thread::spawn(move || run(proxy.port()));
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while TcpStream::connect(proxy).is_err() {
            assert!(std::time::Instant::now() < end);
        }
        let mut near = connect(proxy, to).unwrap();
        let (mut far, _) = origin.accept().unwrap();
        far.write_all(b"first").unwrap();
        near.write_all(b"second").unwrap();
        let (mut first, mut second) = ([0; 5], [0; 6]);
        near.read_exact(&mut first).unwrap();
        far.read_exact(&mut second).unwrap();
        assert_eq!((&first, &second), (b"first", b"second"));
        drop(origin);
        assert!(connect(proxy, to).unwrap_err().to_string().contains("502"));
    }
}
