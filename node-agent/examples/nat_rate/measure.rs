//! The loads, and what they give.

use crate::netns_support::path::{ORIGIN, Row};
use crate::netns_support::traffic::{Origin, connect};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long each load lasts.
const TIME: Duration = Duration::from_secs(2);
/// Origins of the connections: one has too few ports for all that rest.
const ORIGINS: u16 = 16;

/// What goes through in a second.
#[derive(Debug, Default)]
pub struct Rates {
    pub one_flow: f64,
    pub packets: f64,
    pub packet_ns: f64,
    pub connections: f64,
    pub connection_us: f64,
    pub bulk_out: f64,
    pub bulk_in: f64,
}

/// CPU time of the machine so far, in seconds.
pub fn busy() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap();
    let fields = text.lines().next().unwrap().split_whitespace().skip(1);
    let ticks: Vec<f64> = fields.map(|field| field.parse().unwrap()).collect();
    // All but idle and waiting, in hundredths.
    (ticks.iter().take(8).sum::<f64>() - ticks[3] - ticks[4]) / 100.0
}

/// Packets that have reached the origin.
fn arrived(row: &Row) -> f64 {
    let text = row.origin.output("cat /proc/net/dev");
    let line = text.lines().find(|line| line.trim_start().starts_with("eth0:")).unwrap();
    line.split(':').nth(1).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

pub fn rates(row: &Row) -> Rates {
    let (one_flow, _) = datagrams(row, 1);
    let (packets, packet_ns) = datagrams(row, 16);
    let (connections, connection_us) = connections(row);
    Rates {
        one_flow,
        packets,
        packet_ns,
        connections,
        connection_us,
        bulk_out: bulk(row, true),
        bulk_in: bulk(row, false),
    }
}

/// Datagrams of 18 bytes (the smallest frame), and the CPU time that each takes in nanoseconds.
fn datagrams(row: &Row, flows: u16) -> (f64, f64) {
    let sinks: Vec<UdpSocket> =
        row.origin.enter(|| (0..flows).map(|flow| UdpSocket::bind((ORIGIN, 9000 + flow)).unwrap()).collect());
    let sockets: Vec<UdpSocket> = row.pod.enter(|| {
        (0..flows)
            .map(|flow| {
                let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
                socket.connect((ORIGIN, 9000 + flow)).unwrap();
                socket
            })
            .collect()
    });
    // A question and an answer: from then on the flow is established.
    for (socket, sink) in sockets.iter().zip(&sinks) {
        socket.send(b"x").unwrap();
        let (_, from) = sink.recv_from(&mut [0; 8]).unwrap();
        sink.send_to(b"x", from).unwrap();
        socket.recv(&mut [0; 8]).unwrap();
    }
    let (begin, work) = (arrived(row), busy());
    let start = Instant::now();
    row.pod.enter(|| {
        let payload = [0u8; 18];
        let mut vector = libc::iovec { iov_base: payload.as_ptr() as *mut _, iov_len: payload.len() };
        // SAFETY: all-zero is a valid value of these plain C structures.
        let mut messages: [libc::mmsghdr; 64] = unsafe { std::mem::zeroed() };
        for message in &mut messages {
            message.msg_hdr.msg_iov = &raw mut vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        while start.elapsed() < TIME {
            for socket in &sockets {
                // SAFETY: the messages and what they point to outlive the call.
                unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), 64, 0) };
            }
        }
    });
    let packets = arrived(row) - begin;
    (packets / start.elapsed().as_secs_f64(), (busy() - work) * 1e9 / packets)
}

/// Connections that are opened and reset, and the CPU time that each takes in microseconds.
fn connections(row: &Row) -> (f64, f64) {
    let _origins: Vec<Origin> = (0..ORIGINS).map(|at| Origin::on(&row.origin, 7000 + at)).collect();
    let (count, work) = (AtomicU64::new(0), busy());
    let start = Instant::now();
    row.pod.enter(|| {
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let count = &count;
                scope.spawn(move || {
                    let mut at = thread;
                    while start.elapsed() < TIME {
                        at = (at + 1) % ORIGINS;
                        let stream = connect(7000 + at, Duration::from_secs(1)).unwrap();
                        // A reset at the end: no port of the pod waits.
                        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
    });
    let count = count.into_inner() as f64;
    (count / start.elapsed().as_secs_f64(), (busy() - work) * 1e6 / count)
}

/// One connection that carries as much as it can, from the pod or to it, in Gbit/s.
fn bulk(row: &Row, out: bool) -> f64 {
    let listener = row.origin.enter(|| TcpListener::bind((ORIGIN, 6000)).unwrap());
    let opening = std::thread::spawn(move || listener.accept().unwrap().0);
    let of_pod = row.pod.enter(|| TcpStream::connect((ORIGIN, 6000)).unwrap());
    let of_origin = opening.join().unwrap();
    let (mut from, mut to) = if out { (of_pod, of_origin) } else { (of_origin, of_pod) };
    let reader = std::thread::spawn(move || {
        let (mut buffer, mut total, start) = (vec![0; 1 << 18], 0usize, Instant::now());
        while let Ok(length @ 1..) = to.read(&mut buffer) {
            total += length;
        }
        total as f64 * 8e-9 / start.elapsed().as_secs_f64()
    });
    let (buffer, start) = (vec![0; 1 << 18], Instant::now());
    while start.elapsed() < TIME {
        from.write_all(&buffer).unwrap();
    }
    drop(from);
    reader.join().unwrap()
}

/// What happens up to the last port.
#[derive(Debug, Default)]
pub struct Fill {
    pub opened: f64,
    pub early_us: f64,
    pub late_us: f64,
    pub slowest_us: f64,
    pub refused_ms: f64,
    pub failed: f64,
}

/// How long a connection is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
const PORTS: usize = 4096;
const PORT: u16 = 8080;

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    (work(), start.elapsed().as_secs_f64() * 1e6)
}

fn percentile(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values
        .get(((values.len() * percent) / 100).min(values.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

/// Opens as many connections to one origin as there are ports, then one more, and then closes and opens for a minute with 99 % of
/// the ports in use.
pub fn fill(row: &Row) -> Fill {
    let _origin = Origin::on(&row.origin, PORT);
    row.pod.enter(|| {
        let (mut open, mut early, mut late) = (VecDeque::new(), Vec::new(), Vec::new());
        for _ in 0..PORTS {
            let (result, us) = timed(|| connect(PORT, PATIENCE));
            let Ok(stream) = result else { continue };
            open.push_back(stream);
            match open.len() * 100 / PORTS {
                8..=12 => early.push(us),
                98.. => late.push(us),
                _ => (),
            }
        }
        let opened = open.len() as f64;
        let (_, refused) = timed(|| connect(PORT, PATIENCE));
        open.drain(..PORTS / 100);
        std::thread::sleep(PATIENCE);
        let (start, mut failed) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(60) {
            drop(open.pop_front());
            match connect(PORT, PATIENCE) {
                Ok(stream) => open.push_back(stream),
                Err(_) => failed += 1,
            }
            std::thread::sleep(Duration::from_millis(150));
        }
        Fill {
            opened,
            early_us: percentile(early, 50),
            slowest_us: percentile(late.clone(), 100),
            late_us: percentile(late, 50),
            refused_ms: refused / 1000.0,
            failed: f64::from(failed),
        }
    })
}
