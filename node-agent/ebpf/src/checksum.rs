//! The Internet checksum (RFC 1071), updated incrementally (RFC 1624).

/// Folds a sum of 16-bit words to one word.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// The change that replacing a 32-bit value makes, to be given to [`apply`].
#[inline(always)]
pub fn difference(old: u32, new: u32) -> u32 {
    (!old & 0xffff) + (!old >> 16) + (new & 0xffff) + (new >> 16)
}

/// The change that replacing a 16-bit value makes, to be given to [`apply`].
#[inline(always)]
pub fn difference16(old: u16, new: u16) -> u32 {
    u32::from(!old) + u32::from(new)
}

/// The checksum after changes whose sum is `change` (RFC 1624 equation 3).
#[inline(always)]
pub fn apply(checksum: u16, change: u32) -> u16 {
    !fold(u32::from(!checksum) + fold(change) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The checksum of words, summed anew.
    fn sum(words: &[u16]) -> u16 {
        let total: u64 = words.iter().map(|word| u64::from(*word)).sum();
        let mut folded = total;
        while folded > 0xffff {
            folded = (folded & 0xffff) + (folded >> 16);
        }
        !(folded as u16)
    }

    const EDGES: [u32; 8] = [0, 1, 0xffff, 0x1_0000, 0xffff_0000, 0xffff_ffff, 0x0a00_0001, 0xc000_0201];

    #[test]
    fn an_update_gives_what_summing_anew_gives() {
        let rest = [0x4500u16, 0x0054, 0x1234, 0x4000, 0x4001];
        for old in EDGES {
            for new in EDGES {
                for port in [0u16, 1, 443, 0xffff] {
                    let words = |address: u32, port: u16| {
                        [&rest[..], &[(address >> 16) as u16, address as u16, port]].concat()
                    };
                    let change = difference(old, new) + difference16(53, port);
                    let updated = apply(sum(&words(old, 53)), change);
                    assert_eq!(updated, sum(&words(new, port)), "{old:#x} -> {new:#x}, port {port}");
                }
            }
        }
    }

    #[test]
    fn folding_keeps_the_sum_in_ones_complement() {
        assert_eq!(fold(0), 0);
        assert_eq!(fold(0xffff), 0xffff);
        assert_eq!(fold(0x1_0000), 1);
        assert_eq!(fold(0xffff_ffff), 0xffff);
        assert_eq!(fold(0x1_ffff), 1);
    }
}
