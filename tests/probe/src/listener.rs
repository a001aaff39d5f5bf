//! The server's side: TCP and UDP ports that answer and record.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::command::{DOWNLOAD, ECHO, REPLY, SINK, UPLOAD, WHO};
use crate::records::{Records, Tuple};
use crate::transfer;

/// Records that all listeners write.
pub type Shared = Arc<Mutex<Records>>;

/// The records; a thread that crashed while it held them has left them usable.
pub fn lock(records: &Shared) -> MutexGuard<'_, Records> {
    records.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves TCP and UDP on a port until the process ends, over both families where there are both.
pub fn start(port: u16, records: &Shared) -> anyhow::Result<()> {
    serve((Ipv4Addr::UNSPECIFIED, port).into(), records)?;
    if std::path::Path::new("/proc/net/if_inet6").exists() {
        serve((Ipv6Addr::UNSPECIFIED, port).into(), records)?;
    }
    Ok(())
}

fn serve(address: SocketAddr, records: &Shared) -> anyhow::Result<()> {
    let listener = tcp(address).with_context(|| format!("listen on TCP {address}"))?;
    let socket = udp(address).with_context(|| format!("listen on UDP {address}"))?;
    tokio::spawn(accept(listener, address.port(), records.clone()));
    tokio::spawn(answer(socket, address.port(), records.clone()));
    Ok(())
}

/// A socket for one family only.
fn socket(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM)?;
    socket.set_reuse_address(true)?;
    // Several processes may serve a port together: one has descriptors for so many connections.
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    // Thousands of connections come at once.
    socket.listen(4096)?;
    TcpListener::from_std(socket.into())
}

fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(address, Type::DGRAM)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(4 << 20)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

async fn accept(listener: TcpListener, port: u16, records: Shared) {
    loop {
        match listener.accept().await {
            Ok((stream, source)) => {
                let index = lock(&records).opened(Tuple { source, port }, now_ms());
                let records = records.clone();
                tokio::spawn(async move {
                    // However it ends, it has ended: the client knows why.
                    let _ = converse(stream, source).await;
                    lock(&records).closed(index, now_ms());
                });
            }
            Err(error) => {
                eprintln!("accept on port {port}: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }
}

async fn converse(mut stream: TcpStream, source: SocketAddr) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match stream.read_u8().await? {
        ECHO => {
            let (mut reader, mut writer) = stream.split();
            tokio::io::copy(&mut reader, &mut writer).await?;
        }
        WHO => stream.write_all(format!("{source}\n").as_bytes()).await?,
        DOWNLOAD => transfer::serve_download(&mut stream).await?,
        UPLOAD => transfer::serve_upload(&mut stream).await?,
        b'G' => {
            let mut rest = [0; 4096];
            let _ = stream.read(&mut rest).await?;
            let body = format!("{source}\n");
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await?;
        }
        _ => return Ok(()),
    }
    // The client closes first, so that the port it used rests on its side, as with most protocols.
    let _ = stream.read_u8().await;
    Ok(())
}

async fn answer(socket: UdpSocket, port: u16, records: Shared) {
    let mut buffer = vec![0; 65_536];
    loop {
        let (length, source) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An ICMP error of an earlier answer shows up here; the next datagram is none the worse.
            Err(_) => continue,
        };
        lock(&records).datagram(Tuple { source, port }, now_ms());
        let received = &buffer[..length];
        let reply = match received {
            [WHO, ..] => format!("{source}\n").into_bytes(),
            [REPLY, a, b, c, d, ..] => vec![b'r'; u32::from_be_bytes([*a, *b, *c, *d]).min(65_000) as usize],
            [SINK, ..] => continue,
            other => other.to_vec(),
        };
        if let Err(error) = socket.send_to(&reply, source).await {
            eprintln!("answer to {source}: {error}");
        }
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}
