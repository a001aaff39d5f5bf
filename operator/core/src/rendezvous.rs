//! Rendezvous hashing: of several candidates the one that weighs most is chosen, so that one that comes or goes moves only
//! what it gains or loses.

/// Weight of a candidate: FNV-1a over the bytes that name the choice and the candidate, then the finaliser of MurmurHash3,
/// without which names that differ in their last letter only would weigh nearly the same.
pub(crate) fn weight(bytes: impl Iterator<Item = u8>) -> u64 {
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    for factor in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(factor);
    }
    hash ^ (hash >> 33)
}
