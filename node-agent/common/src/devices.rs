//! Devices between which the fast path goes.

/// Value of `DEVICES` (hash; key: interface index): an uplink with all its programs.
pub const TO_UPLINK: u32 = 1;
/// A device that faces pods.
pub const TO_POD: u32 = 2;
