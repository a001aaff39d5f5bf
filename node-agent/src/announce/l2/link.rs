//! A packet socket for what is said on one device of the addresses of one family: by ARP, or between IPv6 neighbours.

use super::election::{Heard, Mac};
use super::{arp, ndp};
use aegis_core::egress::{Egress, Family};
use std::io;
use std::mem::size_of;
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// Frames that are taken in at a time, so that whoever floods a link does not stop everything else.
const BURST: usize = 256;

/// Of IPv6, only solicitations and advertisements are for this socket: nothing else is even copied. (Load a byte of the frame,
/// compare it, else go to the end.)
const NEIGHBOURS: [libc::sock_filter; 9] = [
    filter(LOAD, 0, 0, 20),
    filter(EQUAL, 0, 6, 58),
    filter(LOAD, 0, 0, 21),
    filter(EQUAL, 0, 4, 255),
    filter(LOAD, 0, 0, 54),
    filter(EQUAL, 1, 0, 135),
    filter(EQUAL, 0, 1, 136),
    filter(RETURN, 0, 0, u32::MAX),
    filter(RETURN, 0, 0, 0),
];
const LOAD: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

const fn filter(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// One uplink, as far as one family is concerned.
#[derive(Clone, Debug)]
pub struct Link {
    socket: Arc<OwnedFd>,
    ifindex: u32,
    family: Family,
    /// MAC of the device.
    pub mac: Mac,
}

impl Link {
    /// Opens the socket: needs CAP_NET_RAW.
    pub fn open(ifindex: u32, mac: Mac, family: Family) -> io::Result<Link> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // No protocol yet: nothing is to be received before the socket is bound to its device.
        // SAFETY: plain arguments.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that has just been opened, and is nobody else's.
        let socket = Arc::new(unsafe { OwnedFd::from_raw_fd(socket) });
        let link = Link { socket, ifindex, family, mac };
        if family == Family::V6 {
            link.listen_to_neighbours()?;
        }
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

    /// What nodes say of a /64 is sent to these groups, and only that is to be received.
    fn listen_to_neighbours(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: NEIGHBOURS.len() as libc::c_ushort,
            filter: NEIGHBOURS.as_ptr().cast_mut(),
        };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        for group in [ndp::SEAT_GROUP, ndp::ALL_NODES] {
            // SAFETY: all-zero is a valid value of this plain C structure.
            let mut member: libc::packet_mreq = unsafe { std::mem::zeroed() };
            member.mr_ifindex = self.ifindex as i32;
            member.mr_type = libc::PACKET_MR_MULTICAST as libc::c_ushort;
            member.mr_alen = 6;
            member.mr_address[..6].copy_from_slice(&group);
            self.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &member)?;
        }
        Ok(())
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: the value outlives the call and has the size that is given; what a filter points to is constant.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                option,
                core::ptr::from_ref(value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn address(&self) -> libc::sockaddr_ll {
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        let protocol = match self.family {
            Family::V4 => arp::ETHERTYPE,
            Family::V6 => ndp::ETHERTYPE,
        };
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = self.ifindex as i32;
        address.sll_halen = 6;
        address.sll_addr[..6].copy_from_slice(&arp::BROADCAST);
        address
    }

    /// Asks everybody on the link for an address.
    pub fn ask(&self, egress: Egress) -> io::Result<()> {
        match egress {
            Egress::V4(address) => self.send(&arp::question(self.mac, address)),
            Egress::V6(_) | Egress::Single(_) => self.send_some(ndp::question(self.mac, egress)),
        }
    }

    /// Asks for somebody else to take an address.
    pub fn hand_over(&self, egress: Egress) -> io::Result<()> {
        match egress {
            Egress::V4(address) => self.send(&arp::hand_over(self.mac, address)),
            Egress::V6(_) | Egress::Single(_) => self.send_some(ndp::hand_over(self.mac, egress)),
        }
    }

    /// Tells everybody on the link that an address is here.
    pub fn announce(&self, egress: Egress) -> io::Result<()> {
        match egress {
            Egress::V4(address) => self.send(&arp::announcement(self.mac, address)),
            Egress::V6(_) | Egress::Single(_) => self.send_some(ndp::announcement(self.mac, egress)),
        }
    }

    /// Tells everybody on the link at which MAC an address of a /64 is.
    pub fn tell(&self, address: Ipv6Addr, mac: Mac) -> io::Result<()> {
        self.send(&ndp::advertisement(self.mac, address, mac))
    }

    /// Whether what is said of an address is said here.
    pub fn is_for(&self, egress: Egress) -> bool {
        self.family == egress.family()
    }

    fn send_some<const N: usize>(&self, frame: Option<[u8; N]>) -> io::Result<()> {
        frame.map_or(Ok(()), |frame| self.send(&frame))
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
    pub fn heard(&self) -> Vec<(Egress, Mac, Heard)> {
        let mut heard = Vec::new();
        for _ in 0..BURST {
            let mut frame = [0; 128];
            // A device that is down is an error once, and then there is nothing to hear.
            match nix::sys::socket::recv(
                self.socket.as_raw_fd(),
                &mut frame,
                nix::sys::socket::MsgFlags::empty(),
            ) {
                Ok(length) => {
                    let said =
                        frame.get(..length).filter(|frame| is_group(frame) || frame.starts_with(&self.mac));
                    heard.extend(said.and_then(|frame| match self.family {
                        Family::V4 => {
                            arp::read(frame).map(|(address, mac, said)| (address.into(), mac, said))
                        }
                        Family::V6 => ndp::read(frame),
                    }));
                }
                Err(nix::Error::EINTR) => {}
                Err(_) => break,
            }
        }
        heard
    }
}

/// Whether a frame is for more than one.
fn is_group(frame: &[u8]) -> bool {
    frame.first().is_some_and(|first| first & 1 != 0)
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
