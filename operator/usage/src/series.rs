//! Series: what is counted apart, as the store has it.

use crate::sql::Value;
use aegis_usage_report::Key;
use ipnet::IpNet;
use sha2::{Digest as _, Sha256};
use std::net::{IpAddr, SocketAddr};

/// Columns of a series after its number and digest.
pub(crate) const COLUMNS: [&str; 10] =
    ["node", "address", "origin", "protocol", "rule", "account", "allocation", "site", "pod", "reason"];

/// Those that totals do not tell apart.
pub(crate) const SUMMED: [&str; 3] = ["origin", "rule", "pod"];

/// What a series is found by.
pub(crate) type Digest = [u8; 16];

/// The columns of a key, of a node, for flows refused for a reason; or for all the rest, without one.
pub(crate) fn columns(node: &str, key: &Key, reason: &str) -> [Value; COLUMNS.len()] {
    [
        node.into(),
        key.address.map(address).unwrap_or_default().into(),
        key.origin.map(origin).unwrap_or_default().into(),
        key.protocol.name().into(),
        key.rule.as_str().into(),
        key.account.as_str().into(),
        key.allocation.as_str().into(),
        key.site.as_str().into(),
        key.pod.as_str().into(),
        reason.into(),
    ]
}

/// Digest of [`columns`], each with its length so that no two rows are the same text. Of each row of each report: nothing is allocated.
pub(crate) fn digest(node: &str, key: &Key, reason: &str) -> Digest {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    let (mut address, mut origin) = (Octets::default(), Octets::default());
    add(node.as_bytes());
    add(key.address.map_or(&[][..], |it| address.of_address(it)));
    add(key.origin.map_or(&[][..], |it| origin.of_origin(it)));
    let rest = [key.protocol.name(), &key.rule, &key.account, &key.allocation, &key.site, &key.pod, reason];
    for text in rest {
        add(text.as_bytes());
    }
    let mut digest = Digest::default();
    digest.copy_from_slice(&hash.finalize()[..16]);
    digest
}

/// Room for an address or origin as the store has it.
#[derive(Default)]
struct Octets([u8; 19]);

impl Octets {
    fn of_address(&mut self, address: IpAddr) -> &[u8] {
        let length = self.put(address);
        &self.0[..length]
    }

    fn of_origin(&mut self, origin: SocketAddr) -> &[u8] {
        let length = self.put(origin.ip());
        self.0[length..length + 2].copy_from_slice(&origin.port().to_be_bytes());
        &self.0[..length + 2]
    }

    fn put(&mut self, address: IpAddr) -> usize {
        let mut put = |family, octets: &[u8]| {
            self.0[0] = family;
            self.0[1..=octets.len()].copy_from_slice(octets);
            1 + octets.len()
        };
        match address {
            IpAddr::V4(address) => put(4, &address.octets()),
            IpAddr::V6(address) => put(6, &address.octets()),
        }
    }
}

/// 4 or 6, and the octets: in the order of addresses, and no range of one family has any of the other.
pub(crate) fn address(address: IpAddr) -> Vec<u8> {
    Octets::default().of_address(address).to_vec()
}

/// The address, and two bytes of port.
pub(crate) fn origin(origin: SocketAddr) -> Vec<u8> {
    Octets::default().of_origin(origin).to_vec()
}

/// First and last address of a range, as [`address`] has them.
pub(crate) fn range(range: &IpNet) -> (Vec<u8>, Vec<u8>) {
    let last = match range {
        IpNet::V4(range) => IpAddr::V4(range.broadcast()),
        IpNet::V6(range) => IpAddr::V6(range.broadcast()),
    };
    (address(range.network()), address(last))
}

/// The address, if there is one.
pub(crate) fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes {
        [4, octets @ ..] => Some(IpAddr::from(<[u8; 4]>::try_from(octets).ok()?)),
        [6, octets @ ..] => Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?)),
        _ => None,
    }
}

/// The origin, if there is one.
pub(crate) fn read_origin(bytes: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = bytes.split_last_chunk()?;
    Some(SocketAddr::new(read_address(ip)?, u16::from_be_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_written() {
        for text in ["192.0.2.1:443", "[2001:db8::7]:1", "255.255.255.255:65535", "[::]:0"] {
            let written: SocketAddr = text.parse().unwrap();
            assert_eq!(read_origin(&origin(written)), Some(written));
            assert_eq!(read_address(&address(written.ip())), Some(written.ip()));
        }
        assert_eq!(read_origin(&[]), None);
        assert_eq!(read_address(&[]), None);
    }

    #[test]
    fn a_range_is_from_its_first_to_its_last_address() {
        let within = |net: &str, ip: &str| {
            let (first, last) = range(&net.parse().unwrap());
            let ip = address(ip.parse().unwrap());
            first <= ip && ip <= last
        };
        assert!(within("192.0.2.8/29", "192.0.2.15") && !within("192.0.2.8/29", "192.0.2.16"));
        assert!(within("0.0.0.0/0", "255.255.255.255") && !within("0.0.0.0/0", "2001:db8::1"));
        assert!(within("2001:db8::/32", "2001:db8:ffff::1"));
        assert!(!within("::/0", "192.0.2.1") && within("::/0", "::ffff:192.0.2.1"));
    }

    /// Stores that exist have digests of the columns.
    #[test]
    fn a_digest_is_that_of_the_columns() {
        let key = |address: &str, origin: &str| Key {
            address: address.parse().ok(),
            origin: origin.parse().ok(),
            protocol: aegis_usage_report::Protocol::Udp,
            rule: "binding/partner".into(),
            account: "shop".into(),
            allocation: "partner".into(),
            site: "west".into(),
            pod: "web-0".into(),
        };
        for key in
            [key("192.0.2.1", "198.51.100.7:443"), key("2001:db8::", "[2001:db8:1::7]:53"), key("", "")]
        {
            for reason in ["", "no_port"] {
                let mut hash = Sha256::new();
                for column in columns("node-1", &key, reason) {
                    let bytes = match column {
                        Value::Text(text) => text.into_bytes(),
                        Value::Bytes(bytes) => bytes,
                        Value::Null | Value::Int(_) => unreachable!("{key:?}"),
                    };
                    hash.update((bytes.len() as u64).to_be_bytes());
                    hash.update(bytes);
                }
                assert_eq!(digest("node-1", &key, reason), hash.finalize()[..16], "{key:?}");
            }
        }
    }

    #[test]
    fn digests_tell_fields_apart() {
        let key =
            |rule: &str, account: &str| Key { rule: rule.into(), account: account.into(), ..Key::default() };
        let of = |key: &Key| digest("n", key, "");
        assert_ne!(of(&key("ab", "c")), of(&key("a", "bc")));
        assert_eq!(of(&key("a", "b")), of(&key("a", "b")));
    }
}
