//! Egress addresses: what is dedicated to an allocation as one thing.

use ipnet::{IpNet, Ipv6Net};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Length of the prefix of an IPv6 egress address.
pub const NETWORK_LENGTH: u8 = 64;

/// An egress address: one IPv4 address, one IPv6 /64, or one IPv6 address by itself.
///
/// All have 252 slices, and a slice has one holder. Of an IPv4 address and of a single IPv6 one a slice is 256 ports. Of a /64 it
/// is the part whose bits 64 to 79 are the slice's index, so that the slice is the number by which a node is known in the /64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Egress {
    /// One IPv4 address.
    V4(Ipv4Addr),
    /// One /64, by its upper half.
    V6(u64),
    /// One IPv6 address by itself, a /128; its ports are cut like those of an IPv4 address.
    Single(Ipv6Addr),
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

    /// Field of `spec.addresses` that says how many.
    pub(crate) fn field(self) -> &'static str {
        match self {
            Family::V4 => "spec.addresses.ipv4",
            Family::V6 => "spec.addresses.ipv6",
        }
    }
}

/// What an egress address is, and so what its slices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An IPv4 address.
    Address,
    /// An IPv6 /64.
    Network,
    /// A single IPv6 address.
    Single,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Address, Kind::Network, Kind::Single];

    /// What is taken from a prefix of this range: of an IPv6 one /64s, unless it is one address.
    pub fn of(range: &IpNet) -> Kind {
        match range {
            IpNet::V4(_) => Kind::Address,
            IpNet::V6(range) if range.prefix_len() == range.max_prefix_len() => Kind::Single,
            IpNet::V6(_) => Kind::Network,
        }
    }

    /// IPv4 or IPv6.
    pub fn family(self) -> Family {
        match self {
            Kind::Address => Family::V4,
            Kind::Network | Kind::Single => Family::V6,
        }
    }

    /// Whether its slices are ports.
    pub fn has_ports(self) -> bool {
        match self {
            Kind::Address | Kind::Single => true,
            Kind::Network => false,
        }
    }

    /// The egress address of this kind that contains an address of its family.
    pub(crate) fn containing(self, address: IpAddr) -> Egress {
        match (self, address) {
            (Kind::Single, IpAddr::V6(address)) => Egress::Single(address),
            (_, address) => Egress::containing(address),
        }
    }

    /// The egress address with this place among all of its kind.
    pub(crate) fn at(self, place: u128) -> Egress {
        match self {
            Kind::Address => Egress::V4(Ipv4Addr::from_bits(u32::try_from(place).unwrap_or(u32::MAX))),
            Kind::Network => Egress::V6(u64::try_from(place).unwrap_or(u64::MAX)),
            Kind::Single => Egress::Single(Ipv6Addr::from_bits(place)),
        }
    }
}

impl Egress {
    /// The IPv4 address, or the /64 that contains an IPv6 one. Whether a single address of it is one by itself, only prefixes
    /// and objects can tell.
    pub fn containing(address: IpAddr) -> Egress {
        match address {
            IpAddr::V4(address) => Egress::V4(address),
            IpAddr::V6(address) => Egress::V6(network(address)),
        }
    }

    /// What it is.
    pub fn kind(self) -> Kind {
        match self {
            Egress::V4(_) => Kind::Address,
            Egress::V6(_) => Kind::Network,
            Egress::Single(_) => Kind::Single,
        }
    }

    /// IPv4 or IPv6.
    pub fn family(self) -> Family {
        self.kind().family()
    }

    /// Whether its slices are ports.
    pub fn has_ports(self) -> bool {
        self.kind().has_ports()
    }

    /// The address, if it is an IPv4 one.
    pub fn v4(self) -> Option<Ipv4Addr> {
        match self {
            Egress::V4(address) => Some(address),
            Egress::V6(_) | Egress::Single(_) => None,
        }
    }

    /// All of it as a range.
    pub fn range(self) -> IpNet {
        match self {
            Egress::V4(address) => IpNet::from(IpAddr::V4(address)),
            Egress::V6(network) => Ipv6Net::new_assert(first(network), NETWORK_LENGTH).into(),
            Egress::Single(address) => IpNet::from(IpAddr::V6(address)),
        }
    }

    /// Whether two have an address in common: they are the same, or one is a single address in the other, a /64.
    pub fn overlaps(self, other: Egress) -> bool {
        self.overlapping().into_iter().any(|range| range.contains(&other))
    }

    /// All that have an address in common with it, as ranges of their order.
    pub(crate) fn overlapping(self) -> [RangeInclusive<Egress>; 2] {
        let others = match self {
            Egress::V4(_) => self..=self,
            Egress::V6(network) => {
                let last = first(network).to_bits() | u128::from(u64::MAX);
                Egress::Single(first(network))..=Egress::Single(last.into())
            }
            Egress::Single(address) => Egress::V6(network(address))..=Egress::V6(network(address)),
        };
        [self..=self, others]
    }

    /// Name of its `EgressAddress`: a name of an object has no colons. That of a single IPv6 address has all eight groups with
    /// all digits, that of a /64 four at most.
    pub fn object_name(self) -> String {
        match self {
            Egress::V4(address) => address.to_string(),
            Egress::V6(network) => first(network).to_string().trim_end_matches("::").replace(':', "-"),
            Egress::Single(address) => address.segments().map(|group| format!("{group:04x}")).join("-"),
        }
    }

    /// The one whose `EgressAddress` bears this name, if there is one.
    pub fn of_object(name: &str) -> Option<Egress> {
        let groups = name.replace('-', ":");
        let found = name.parse().or_else(|_| format!("{groups}::/64").parse()).or_else(|_| groups.parse());
        found.ok().filter(|found: &Egress| found.object_name() == name)
    }

    /// Place among all of its kind.
    pub(crate) fn place(self) -> u128 {
        match self {
            Egress::V4(address) => address.to_bits().into(),
            Egress::V6(network) => network.into(),
            Egress::Single(address) => address.to_bits(),
        }
    }

    /// The bytes that tell it from others.
    pub(crate) fn bytes(self) -> Vec<u8> {
        match self {
            Egress::V4(address) => address.octets().to_vec(),
            Egress::V6(network) => network.to_be_bytes().to_vec(),
            Egress::Single(address) => address.octets().to_vec(),
        }
    }
}

/// The upper half of an address.
fn network(address: Ipv6Addr) -> u64 {
    (address.to_bits() >> 64) as u64
}

/// The first address of a /64.
fn first(network: u64) -> Ipv6Addr {
    Ipv6Addr::from_bits(u128::from(network) << 64)
}

/// `203.0.113.1`, `2001:db8:1:2::/64`, `2001:db8::7`.
impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Egress::V4(address) => address.fmt(f),
            Egress::V6(network) => write!(f, "{}/{NETWORK_LENGTH}", first(*network)),
            Egress::Single(address) => address.fmt(f),
        }
    }
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Neither an address nor a /64 without host bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither an address nor an IPv6 /64")]
pub struct NoEgress;

impl FromStr for Egress {
    type Err = NoEgress;

    fn from_str(text: &str) -> Result<Egress, NoEgress> {
        match text.parse() {
            Ok(IpAddr::V4(address)) => return Ok(Egress::V4(address)),
            Ok(IpAddr::V6(address)) => return Ok(Egress::Single(address)),
            Err(_) => {}
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
            ("2001:db8::7", "2001-0db8-0000-0000-0000-0000-0000-0007"),
            ("2001:db8:1:2::", "2001-0db8-0001-0002-0000-0000-0000-0000"),
            ("fd00:1:2:3:4:5:6:7", "fd00-0001-0002-0003-0004-0005-0006-0007"),
        ] {
            let egress: Egress = text.parse().unwrap();
            assert_eq!((egress.to_string().as_str(), egress.object_name().as_str()), (text, name));
            assert_eq!(egress.kind().at(egress.place()), egress);
            assert_eq!(Kind::of(&egress.range()), egress.kind());
            assert_eq!(Egress::of_object(name), Some(egress));
        }
        for name in [
            "one",
            "2001-db8-1-2-3",
            "2001-DB8",
            "2001-db8-0-0",
            "2001-db8-0-0-0-0-0-7",
            "2001-0DB8-0000-0000-0000-0000-0000-0007",
            "2001-0db8--0007",
            "2001:db8::7",
        ] {
            assert_eq!(Egress::of_object(name), None, "{name}");
        }
    }

    #[test]
    fn only_whole_ones_are_read() {
        for text in
            ["2001:db8::/65", "2001:db8::/63", "2001:db8::1/64", "2001:db8::1/128", "203.0.113.1/32", ""]
        {
            assert_eq!(text.parse::<Egress>(), Err(NoEgress), "{text}");
        }
    }

    #[test]
    fn a_single_one_is_read_in_any_spelling_and_written_in_one() {
        for text in ["2001:db8::7", "2001:DB8:0:0::7", "2001:0db8:0000:0000:0000:0000:0000:0007"] {
            assert_eq!(text.parse::<Egress>().unwrap().to_string(), "2001:db8::7");
        }
        let single: Egress = "2001:db8::7".parse().unwrap();
        assert_eq!((single.kind(), single.family(), single.has_ports()), (Kind::Single, Family::V6, true));
        assert_eq!((single.range().to_string().as_str(), single.v4()), ("2001:db8::7/128", None));
        let network: Egress = "2001:db8::/64".parse().unwrap();
        assert_eq!((network.kind(), network.has_ports()), (Kind::Network, false));
    }

    #[test]
    fn a_single_one_and_its_64_overlap() {
        let of = |text: &str| text.parse::<Egress>().unwrap();
        let alike = ["2001:db8::/64", "2001:db8::", "2001:db8::7", "2001:db8::ffff:ffff:ffff:ffff"].map(of);
        let others =
            ["2001:db8:0:1::/64", "2001:db8:0:1::", "2001:db7:ffff:ffff:ffff::", "192.0.2.7"].map(of);
        for (at, one) in alike.iter().enumerate() {
            assert!(one.overlaps(*one));
            assert!(others.iter().all(|other| !one.overlaps(*other) && !other.overlaps(*one)), "{one}");
            let single = |other: usize| other == 0 || at == 0 || other == at;
            for (other, two) in alike.iter().enumerate() {
                assert_eq!(one.overlaps(*two), single(other), "{one} {two}");
            }
        }
    }

    #[test]
    fn an_address_lies_in_one() {
        let of = |text: &str| Egress::containing(text.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
    }
}
