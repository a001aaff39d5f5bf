//! Connections between a pod and an origin.

use super::Namespace;
use super::path::ORIGIN;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Lets this process have as many open files as it may.
pub fn many_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a structure of this call's own.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}

/// Accepts connections on a port of the origin until it is dropped, and holds each until the pod closes it.
pub struct Origin {
    stop: Arc<AtomicBool>,
}

impl Origin {
    pub fn on(namespace: &Namespace, port: u16) -> Origin {
        let listener = namespace.enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SocketAddr::from((ORIGIN, port)).into()).unwrap();
            socket.listen(16384).unwrap();
            TcpListener::from(socket)
        });
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut held: Vec<TcpStream> = Vec::new();
            let mut turn = 0u32;
            while !stopped.load(Ordering::Relaxed) {
                let mut idle = true;
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).unwrap();
                    held.push(stream);
                    idle = false;
                }
                turn += 1;
                if idle || turn.is_multiple_of(64) {
                    held.retain_mut(|stream| {
                        matches!(stream.read(&mut [0; 16]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
                    });
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Origin { stop }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Opens a connection to the origin (from within the pod's namespace).
pub fn connect(port: u16, patience: Duration) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::from((ORIGIN, port)), patience)
}
