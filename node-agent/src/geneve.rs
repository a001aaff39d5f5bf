//! Packets that the agent itself sends through the tunnel between nodes.

/// A Geneve header (RFC 8926) of IPv4 without options: the network identifier says what the receiver is to do.
pub fn header(vni: u32) -> [u8; 8] {
    let mut header = [0, 0, 0x08, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&(vni << 8).to_be_bytes());
    header
}
