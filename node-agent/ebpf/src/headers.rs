//! Protocol headers as they are on the wire (multi-byte fields in network byte order), and reading them from an skb.
//!
//! They are read where they are, which costs nothing, as long as they are in the skb's linear part; writing goes by helpers, since a
//! program that writes where headers are has the kernel copy every cloned skb for it, also of those that it only lets pass.
//!
//! They have their natural alignment, although in a frame they have not: BPF on the architectures that Aegis supports
//! loads unaligned words, while a packed type would be read byte by byte.

pub use aegis_common::{ACK, FIN, RST, SYN};
use aya_ebpf::programs::TcContext;

pub const ETH_LEN: usize = 14;
pub const ETH_P_IP: u16 = 0x0800u16.to_be();
pub const ETH_P_ARP: u16 = 0x0806u16.to_be();
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;

/// "Don't fragment" and "more fragments" bits, and the offset, of `Ipv4::fragment` in host order.
pub const DF: u16 = 0x4000;
pub const MF: u16 = 0x2000;
pub const OFFSET: u16 = 0x1fff;

pub const ICMP_ECHO_REPLY: u8 = 0;
pub const ICMP_UNREACHABLE: u8 = 3;
pub const ICMP_ECHO: u8 = 8;
pub const ICMP_TIME_EXCEEDED: u8 = 11;
pub const ICMP_PARAMETER_PROBLEM: u8 = 12;

/// Ethernet II (IEEE 802.3).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub kind: u16,
}

/// IPv4 without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    pub version_length: u8,
    pub tos: u8,
    pub total_length: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

impl Ipv4 {
    /// Length of the header in bytes, `None` if the header can't be one.
    #[inline(always)]
    pub fn header_length(&self) -> Option<usize> {
        let length = usize::from(self.version_length & 15) * 4;
        (self.version_length >> 4 == 4 && length >= 20).then_some(length)
    }

    #[inline(always)]
    pub fn total_length(&self) -> u16 {
        u16::from_be(self.total_length)
    }

    /// A fragment other than the first: it has no transport header.
    #[inline(always)]
    pub fn is_later_fragment(&self) -> bool {
        u16::from_be(self.fragment) & OFFSET != 0
    }

    /// The first of several fragments.
    #[inline(always)]
    pub fn is_first_fragment(&self) -> bool {
        u16::from_be(self.fragment) & (OFFSET | MF) == MF
    }
}

/// The first eight bytes of a transport header: ports, or type, code, checksum and identifier of ICMP.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Transport {
    pub bytes: [u8; 8],
}

impl Transport {
    #[inline(always)]
    pub fn source_port(&self) -> u16 {
        u16::from_be_bytes([self.bytes[0], self.bytes[1]])
    }

    #[inline(always)]
    pub fn destination_port(&self) -> u16 {
        u16::from_be_bytes([self.bytes[2], self.bytes[3]])
    }

    #[inline(always)]
    pub fn icmp_type(&self) -> u8 {
        self.bytes[0]
    }

    #[inline(always)]
    pub fn icmp_id(&self) -> u16 {
        u16::from_be_bytes([self.bytes[4], self.bytes[5]])
    }
}

/// Whether the ICMP type is an error message, which quotes the packet it is about (RFC 792).
#[inline(always)]
pub fn is_icmp_error(kind: u8) -> bool {
    kind == ICMP_UNREACHABLE || kind == ICMP_TIME_EXCEEDED || kind == ICMP_PARAMETER_PROBLEM
}

/// An outgoing IPv4 packet in an skb.
pub struct Packet {
    pub ip: Ipv4,
    /// Length in bytes. What the kernel will cut into segments may be longer than the header can say, which is 0 then
    /// ("BIG TCP").
    pub length: u32,
    /// Offset of the transport header from the start of the frame.
    pub transport_offset: usize,
}

impl Packet {
    /// Reads the IP header; `None` if it is not whole or not sound.
    #[inline(always)]
    pub fn read(ctx: &TcContext) -> Option<Packet> {
        let ip: Ipv4 = read(ctx, ETH_LEN)?;
        let header_length = ip.header_length()?;
        let mut length = u32::from(ip.total_length());
        if length == 0 && segment_size(ctx) != 0 {
            length = ctx.len().wrapping_sub(ETH_LEN as u32);
        }
        if (length as usize) < header_length {
            return None;
        }
        Some(Packet { ip, length, transport_offset: ETH_LEN + header_length })
    }

    /// Whether the packet goes on for this many bytes after the IP header (what follows in the frame is padding).
    #[inline(always)]
    pub fn has(&self, bytes: usize) -> bool {
        self.transport_offset - ETH_LEN + bytes <= self.length as usize
    }

    /// Reads the start of the transport header.
    #[inline(always)]
    pub fn transport(&self, ctx: &TcContext) -> Option<Transport> {
        if !self.has(8) {
            return None;
        }
        read(ctx, self.transport_offset)
    }

    /// Reads the TCP flags.
    #[inline(always)]
    pub fn tcp_flags(&self, ctx: &TcContext) -> Option<u8> {
        if !self.has(20) {
            return None;
        }
        // Two bytes: of one the verifier does not understand the bounds as they are compiled.
        read::<[u8; 2]>(ctx, self.transport_offset + 12).map(|bytes| bytes[1])
    }
}

/// Copies a `T` out of a frame.
#[inline(always)]
pub fn read<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + offset + size_of::<T>() <= end {
        // SAFETY: within the frame; BPF has no alignment demands on packet memory here.
        return Some(unsafe { ((start + offset) as *const T).read_unaligned() });
    }
    ctx.load(offset).ok()
}

/// Bytes of payload that each segment gets into which the kernel or the device will cut the packet; 0 = it is not cut.
#[inline(always)]
pub fn segment_size(ctx: &TcContext) -> u32 {
    // SAFETY: a field of the context, which is valid while the program runs.
    unsafe { (*ctx.skb.skb).gso_size }
}

/// Length of the largest packet that this one is or will be cut into. The kernel makes TCP segments smaller by as much as is
/// `added` to their headers.
#[inline(always)]
pub fn largest(ctx: &TcContext, packet: &Packet, added: u32) -> u32 {
    let segment = segment_size(ctx);
    if segment == 0 {
        return packet.length;
    }
    let start = (packet.transport_offset - ETH_LEN) as u32;
    if packet.ip.protocol != TCP {
        return start + 8 + segment;
    }
    let Ok(offset) = ctx.load::<u8>(packet.transport_offset + 12) else { return u32::MAX };
    start + u32::from(offset >> 4) * 4 + segment.saturating_sub(added)
}

/// The skb's mark.
#[inline(always)]
pub fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: a field of the context, which is valid while the program runs.
    unsafe { (*ctx.skb.skb).mark }
}
