//! A packet socket for the ARP packets of one device.

use super::arp;
use super::election::{Heard, Mac};
use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// Frames that are taken in at a time, so that whoever floods a link does not stop everything else.
const BURST: usize = 256;

/// One uplink, as far as ARP is concerned.
#[derive(Clone, Debug)]
pub struct Link {
    socket: Arc<OwnedFd>,
    ifindex: u32,
    /// MAC of the device.
    pub mac: Mac,
}

impl Link {
    /// Opens the socket: needs CAP_NET_RAW.
    pub fn open(ifindex: u32, mac: Mac) -> io::Result<Link> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // No protocol yet: nothing is to be received before the socket is bound to its device.
        // SAFETY: plain arguments.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that has just been opened, and is nobody else's.
        let socket = Arc::new(unsafe { OwnedFd::from_raw_fd(socket) });
        let link = Link { socket, ifindex, mac };
        let address = link.address();
        // SAFETY: the address outlives the call and has the size that is given.
        let bound = unsafe {
            libc::bind(
                link.socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(link) }
    }

    fn address(&self) -> libc::sockaddr_ll {
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = arp::ETHERTYPE.to_be();
        address.sll_ifindex = self.ifindex as i32;
        address.sll_halen = 6;
        address.sll_addr[..6].copy_from_slice(&arp::BROADCAST);
        address
    }

    /// Asks everybody on the link for an address.
    pub fn ask(&self, address: Ipv4Addr) -> io::Result<()> {
        self.send(&arp::question(self.mac, address))
    }

    /// Asks for somebody else to take an address.
    pub fn hand_over(&self, address: Ipv4Addr) -> io::Result<()> {
        self.send(&arp::hand_over(self.mac, address))
    }

    /// Tells everybody on the link that an address is here.
    pub fn announce(&self, address: Ipv4Addr) -> io::Result<()> {
        self.send(&arp::announcement(self.mac, address))
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let address = self.address();
        // SAFETY: frame and address outlive the call and have the sizes that are given.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// What others have said since the last call, to all or to this node. What a switch delivers of their answers to others is
    /// nothing new, and would come at any time.
    pub fn heard(&self) -> Vec<(Ipv4Addr, Mac, Heard)> {
        let mut heard = Vec::new();
        for _ in 0..BURST {
            let mut frame = [0; 64];
            // A device that is down is an error once, and then there is nothing to hear.
            match nix::sys::socket::recv(
                self.socket.as_raw_fd(),
                &mut frame,
                nix::sys::socket::MsgFlags::empty(),
            ) {
                Ok(length) => {
                    let said = frame
                        .get(..length)
                        .filter(|frame| frame.starts_with(&arp::BROADCAST) || frame.starts_with(&self.mac));
                    heard.extend(said.and_then(arp::read));
                }
                Err(nix::Error::EINTR) => {}
                Err(_) => break,
            }
        }
        heard
    }
}

/// Waits until there is something to hear on one of the links, for so many milliseconds at most.
pub fn wait(links: &[Link], milliseconds: u16) {
    let mut polled: Vec<libc::pollfd> = links
        .iter()
        .map(|link| libc::pollfd { fd: link.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 })
        .collect();
    // SAFETY: the array outlives the call and has the length that is given; the descriptors are open.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, i32::from(milliseconds)) };
}
