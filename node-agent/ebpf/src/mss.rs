//! The maximum segment size option of a TCP header (RFC 9293 section 3.2).

/// Options that are looked at before giving up.
const OPTIONS: u32 = 20;
const END: u8 = 0;
const NOTHING: u8 = 1;
const MSS: u8 = 2;

/// Where the option's value is, counted from the header's start, and what it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Mss {
    pub at: usize,
    pub value: u16,
}

/// Finds the option in a header of `end` bytes, of which `load` reads four at an offset.
#[inline(always)]
pub fn find(end: usize, load: impl Fn(usize) -> Option<[u8; 4]>) -> Option<Mss> {
    let mut at = 20;
    let mut option = 0;
    while option < OPTIONS {
        option += 1;
        if at + 4 > end {
            return None;
        }
        let [kind, length, high, low] = load(at)?;
        match kind {
            END => return None,
            NOTHING => at += 1,
            MSS => return Some(Mss { at: at + 2, value: u16::from_be_bytes([high, low]) }),
            _ if length < 2 => return None,
            _ => at += usize::from(length),
        }
    }
    None
}

/// The value as the checksum adds it, in network byte order: the checksum adds 16-bit words counted from the header's
/// start, so at an odd place the two bytes fall into different words.
#[inline(always)]
pub fn word(at: usize, value: u16) -> u16 {
    if at & 1 != 0 { value.swap_bytes().to_be() } else { value.to_be() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::{apply, difference16};

    fn found(options: &[u8]) -> Option<Mss> {
        let header = [&[0; 20][..], options].concat();
        find(header.len(), |at| header.get(at..at + 4).map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    #[test]
    fn the_option_is_found_wherever_it_is() {
        assert_eq!(found(&[2, 4, 5, 180]), Some(Mss { at: 22, value: 1460 }));
        assert_eq!(found(&[1, 2, 4, 5, 180, 1, 1, 1]), Some(Mss { at: 23, value: 1460 }));
        assert_eq!(found(&[3, 3, 7, 2, 4, 1, 2, 0]), Some(Mss { at: 25, value: 258 }));
    }

    #[test]
    fn what_is_no_option_is_not_followed() {
        let cases: [&[u8]; 6] =
            [&[], &[0, 2, 4, 5], &[8, 0, 2, 4], &[8, 1, 2, 4], &[8, 255, 2, 4], &[1, 2, 4, 5]];
        for options in cases {
            assert_eq!(found(options), None, "{options:?}");
        }
        assert_eq!(found(&[1; 40]), None);
    }

    #[test]
    fn a_word_at_an_odd_place_changes_the_checksum_right() {
        for at in [22, 23] {
            let mut header = [7u8; 40];
            let sum = |header: &[u8; 40]| {
                let words = header.chunks(2).map(|pair| u32::from(u16::from_ne_bytes([pair[0], pair[1]])));
                crate::checksum::fold(words.sum())
            };
            header[at..at + 2].copy_from_slice(&9000u16.to_be_bytes());
            let before = !sum(&header);
            header[at..at + 2].copy_from_slice(&1424u16.to_be_bytes());
            assert_eq!(apply(before, difference16(word(at, 9000), word(at, 1424))), !sum(&header), "{at}");
        }
    }
}
