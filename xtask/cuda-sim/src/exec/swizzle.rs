//! Swizzles of shared memory: bits of an address that choose a 16-byte piece, exchanged by those that choose a row.

/// A swizzle by `CUtensorMapSwizzle`'s number: 0 none, 1 to 3 for spans of 32, 64 and 128 bytes.
#[inline(always)]
pub fn swizzle(address: u64, kind: u32) -> u64 {
    let mask = match kind {
        0 => 0,
        1 => 0x80,
        2 => 0x180,
        _ => 0x380,
    };
    address ^ (address & mask) >> 3
}
