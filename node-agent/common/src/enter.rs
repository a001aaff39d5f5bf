//! What the agent hands to the `enter` program: [`ENTER_HEADER`] bytes that begin with a `u32` kind, then up to [`ENTER_BATCH`]
//! entries or keys.

/// Keys and values to be entered into `FORWARD`, or to replace what is there under the key.
pub const ENTER_FORWARD: u32 = 0;
/// The same for `REVERSE`.
pub const ENTER_REVERSE: u32 = 1;
/// Keys to be removed from `FORWARD`.
pub const LEAVE_FORWARD: u32 = 2;
/// The same for `REVERSE`.
pub const LEAVE_REVERSE: u32 = 3;
/// Bytes before the first entry.
pub const ENTER_HEADER: usize = 16;
/// Entries of one run: the packet of a test run is limited to about 3,500 bytes.
pub const ENTER_BATCH: usize = 64;
