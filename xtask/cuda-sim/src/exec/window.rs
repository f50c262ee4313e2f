//! Generic addresses: which range stands for which space.

/// Where shared memory is seen by generic addresses.
pub const SHARED: u64 = 0x0000_7000_0000_0000;
/// Where local memory is seen.
pub const LOCAL: u64 = 0x0000_7100_0000_0000;
/// Where parameters are seen.
pub const PARAM: u64 = 0x0000_7200_0000_0000;
/// Bytes of each window.
pub const BYTES: u64 = 1 << 32;

/// Whether an address lies in a window.
#[inline(always)]
pub fn holds(window: u64, address: u64) -> bool {
    address.wrapping_sub(window) < BYTES
}
