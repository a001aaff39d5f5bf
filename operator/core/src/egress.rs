//! Egress addresses: what is dedicated to an allocation as one thing.

use ipnet::{IpNet, Ipv6Net};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Length of the prefix of an IPv6 egress address.
pub const NETWORK_LENGTH: u8 = 64;

/// An egress address: one IPv4 address, or one IPv6 /64.
///
/// Both have 252 slices, and a slice has one holder. Of an IPv4 address a slice is 256 ports. Of a /64 it is the part whose
/// bits 64 to 79 are the slice's index, so that the slice is the number by which a node is known in the /64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Egress {
    /// One IPv4 address.
    V4(Ipv4Addr),
    /// One /64, by its upper half.
    V6(u64),
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// Family of a range.
    pub fn of(range: &IpNet) -> Family {
        match range {
            IpNet::V4(_) => Family::V4,
            IpNet::V6(_) => Family::V6,
        }
    }

    /// The egress address with this place among all of its family.
    pub(crate) fn at(self, place: u64) -> Egress {
        match self {
            Family::V4 => Egress::V4(Ipv4Addr::from_bits(u32::try_from(place).unwrap_or(u32::MAX))),
            Family::V6 => Egress::V6(place),
        }
    }

    /// Field of `spec.addresses` that says how many.
    pub(crate) fn field(self) -> &'static str {
        match self {
            Family::V4 => "spec.addresses.ipv4",
            Family::V6 => "spec.addresses.ipv6",
        }
    }
}

impl Egress {
    /// The egress address that contains an address.
    pub fn containing(address: IpAddr) -> Egress {
        match address {
            IpAddr::V4(address) => Egress::V4(address),
            IpAddr::V6(address) => Egress::V6((address.to_bits() >> 64) as u64),
        }
    }

    /// IPv4 or IPv6.
    pub fn family(self) -> Family {
        match self {
            Egress::V4(_) => Family::V4,
            Egress::V6(_) => Family::V6,
        }
    }

    /// The address, if it is an IPv4 one.
    pub fn v4(self) -> Option<Ipv4Addr> {
        match self {
            Egress::V4(address) => Some(address),
            Egress::V6(_) => None,
        }
    }

    /// All of it as a range.
    pub fn range(self) -> IpNet {
        match self {
            Egress::V4(address) => IpNet::from(IpAddr::V4(address)),
            Egress::V6(_) => Ipv6Net::new_assert(self.first(), NETWORK_LENGTH).into(),
        }
    }

    /// Name of its `EgressAddress`: a name of an object has no colons.
    pub fn object_name(self) -> String {
        match self {
            Egress::V4(address) => address.to_string(),
            Egress::V6(_) => self.first().to_string().trim_end_matches("::").replace(':', "-"),
        }
    }

    /// The one whose `EgressAddress` bears this name, if there is one.
    pub fn of_object(name: &str) -> Option<Egress> {
        let found = name.parse().or_else(|_| format!("{}::/64", name.replace('-', ":")).parse());
        found.ok().filter(|found: &Egress| found.object_name() == name)
    }

    /// Place among all of its family.
    pub(crate) fn place(self) -> u64 {
        match self {
            Egress::V4(address) => address.to_bits().into(),
            Egress::V6(network) => network,
        }
    }

    /// The bytes that tell it from others.
    pub(crate) fn bytes(self) -> Vec<u8> {
        match self {
            Egress::V4(address) => address.octets().to_vec(),
            Egress::V6(network) => network.to_be_bytes().to_vec(),
        }
    }

    fn first(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(u128::from(self.place()) << 64)
    }
}

/// `203.0.113.1`, `2001:db8:1:2::/64`.
impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Egress::V4(address) => address.fmt(f),
            Egress::V6(_) => write!(f, "{}/{NETWORK_LENGTH}", self.first()),
        }
    }
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Neither an IPv4 address nor a /64 without host bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither an IPv4 address nor an IPv6 /64")]
pub struct NoEgress;

impl FromStr for Egress {
    type Err = NoEgress;

    fn from_str(text: &str) -> Result<Egress, NoEgress> {
        if let Ok(address) = text.parse() {
            return Ok(Egress::V4(address));
        }
        let range: Ipv6Net = text.parse().map_err(|_| NoEgress)?;
        let whole = range.prefix_len() == NETWORK_LENGTH && range.addr() == range.network();
        if whole { Ok(Egress::containing(range.addr().into())) } else { Err(NoEgress) }
    }
}

impl From<Ipv4Addr> for Egress {
    fn from(address: Ipv4Addr) -> Egress {
        Egress::V4(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_names_an_object() {
        for (text, name) in [
            ("203.0.113.1", "203.0.113.1"),
            ("2001:db8:1:2::/64", "2001-db8-1-2"),
            ("2001:db8::/64", "2001-db8"),
            ("2001:db8:0:1::/64", "2001-db8-0-1"),
            ("2001:0:0:1::/64", "2001-0-0-1"),
            ("fd00::/64", "fd00"),
        ] {
            let egress: Egress = text.parse().unwrap();
            assert_eq!((egress.to_string().as_str(), egress.object_name().as_str()), (text, name));
            assert_eq!(egress.family().at(egress.place()), egress);
            assert_eq!(Egress::of_object(name), Some(egress));
        }
        for name in ["one", "2001-db8-1-2-3", "2001-DB8", "2001-db8-0-0"] {
            assert_eq!(Egress::of_object(name), None, "{name}");
        }
    }

    #[test]
    fn only_whole_ones_are_read() {
        for text in ["2001:db8::", "2001:db8::/65", "2001:db8::/63", "2001:db8::1/64", "203.0.113.1/32", ""] {
            assert_eq!(text.parse::<Egress>(), Err(NoEgress), "{text}");
        }
    }

    #[test]
    fn an_address_lies_in_one() {
        let of = |text: &str| Egress::containing(text.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
    }
}
