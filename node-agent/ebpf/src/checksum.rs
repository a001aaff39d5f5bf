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
