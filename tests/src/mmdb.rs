//! Databases of countries for tests, in MaxMind's format (`.mmdb`, version 2.0): made here, so that none has to be licensed.

use std::net::IpAddr;

use ipnet::IpNet;

/// Bits of an IPv4 address come after so many zeros.
const V4_DEPTH: u8 = 96;
const MARKER: &[u8] = b"\xab\xcd\xefMaxMind.com";
const STRING: u8 = 2;
const UINT16: u8 = 5;
const UINT32: u8 = 6;
const MAP: u8 = 7;
const UINT64: u8 = 9;
const ARRAY: u8 = 11;

/// A range and where it is: as the field `country` or `registered_country` says.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The range.
    pub range: IpNet,
    /// `country` or `registered_country`.
    pub field: &'a str,
    /// ISO 3166-1 code.
    pub country: &'a str,
}

/// What a node of the tree leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Nothing,
    Node(u32),
    /// Offset in the data section.
    Data(u32),
}

/// A database with these entries; longer ranges after those around them.
pub fn database(kind: &str, built: u64, entries: &[Entry<'_>]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut tree = vec![[Next::Nothing; 2]];
    let mut written: Vec<((&str, &str), u32)> = Vec::new();
    for entry in entries {
        let record = (entry.field, entry.country);
        let known = written.iter().find(|(it, _)| *it == record).map(|(_, offset)| *offset);
        let offset = known.unwrap_or_else(|| {
            let offset = u32::try_from(data.len()).unwrap_or_default();
            map(&mut data, 1);
            string(&mut data, entry.field);
            map(&mut data, 1);
            string(&mut data, "iso_code");
            string(&mut data, entry.country);
            written.push((record, offset));
            offset
        });
        insert(&mut tree, &entry.range, offset);
    }
    let count = u32::try_from(tree.len()).unwrap_or_default();
    let value = |next: Next| match next {
        Next::Nothing => count,
        Next::Node(node) => node,
        Next::Data(offset) => count + 16 + offset,
    };
    let mut file: Vec<u8> = tree.iter().flatten().flat_map(|next| value(*next).to_be_bytes()).collect();
    file.extend([0; 16]);
    file.extend(data);
    file.extend(MARKER);
    map(&mut file, 9);
    number(&mut file, "binary_format_major_version", UINT16, 2);
    number(&mut file, "binary_format_minor_version", UINT16, 0);
    number(&mut file, "build_epoch", UINT64, built);
    number(&mut file, "ip_version", UINT16, 6);
    number(&mut file, "node_count", UINT32, count.into());
    number(&mut file, "record_size", UINT16, 32);
    string(&mut file, "database_type");
    string(&mut file, kind);
    string(&mut file, "description");
    map(&mut file, 0);
    string(&mut file, "languages");
    control(&mut file, ARRAY, 0);
    file
}

/// A database in which these ranges are in these countries.
pub fn countries(built: u64, ranges: &[(IpNet, &str)]) -> Vec<u8> {
    let entries: Vec<Entry<'_>> =
        ranges.iter().map(|(range, country)| Entry { range: *range, field: "country", country }).collect();
    database("Test-Country", built, &entries)
}

fn insert(tree: &mut Vec<[Next; 2]>, range: &IpNet, offset: u32) {
    let (bits, length) = match range.network() {
        IpAddr::V4(address) => (u128::from(address.to_bits()), V4_DEPTH + range.prefix_len()),
        IpAddr::V6(address) => (address.to_bits(), range.prefix_len()),
    };
    let mut node = 0;
    for depth in 0..length {
        let side = (bits >> (127 - depth) & 1) as usize;
        if depth + 1 == length {
            tree[node][side] = Next::Data(offset);
            return;
        }
        node = match tree[node][side] {
            Next::Node(next) => next as usize,
            // Of a range that is cut in two the rest keeps what it had.
            before => {
                let next = tree.len();
                tree.push([before; 2]);
                tree[node][side] = Next::Node(u32::try_from(next).unwrap_or_default());
                next
            }
        };
    }
}

fn control(to: &mut Vec<u8>, kind: u8, size: u8) {
    if kind < 8 {
        to.push(kind << 5 | size);
    } else {
        to.extend([size, kind - 7]);
    }
}

fn map(to: &mut Vec<u8>, pairs: u8) {
    control(to, MAP, pairs);
}

/// Of at most 28 bytes.
fn string(to: &mut Vec<u8>, text: &str) {
    control(to, STRING, u8::try_from(text.len()).unwrap_or_default());
    to.extend(text.as_bytes());
}

fn number(to: &mut Vec<u8>, key: &str, kind: u8, value: u64) {
    string(to, key);
    let bytes = value.to_be_bytes();
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    control(to, kind, u8::try_from(bytes.len() - zeros).unwrap_or_default());
    to.extend(&bytes[zeros..]);
}
