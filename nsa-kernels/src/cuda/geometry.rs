//! Shapes of launches, as pure functions.

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Blocks along x, y, z; the long axis is x.
    pub(crate) grid: [u64; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
}

impl Geometry {
    /// Blocks of `threads` along x, so that there are at least `count` threads.
    pub(crate) fn linear(count: u64, threads: u32) -> Self {
        Self { grid: [count.div_ceil(u64::from(threads)), 1, 1], threads, shared_bytes: 0 }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// Elements of `size` bytes that a thread moves at once: 16 bytes, where rows of `dim` elements and all addresses allow it,
/// else one.
pub(crate) fn vector(dim: usize, size: usize, addresses: &[u64]) -> usize {
    let aligned = addresses.iter().all(|address| address % 16 == 0);
    let wide = 16 / size.max(1);
    if aligned && wide > 0 && dim.is_multiple_of(wide) { wide } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_element() {
        assert_eq!(Geometry::linear(0, 256).grid, [0, 1, 1]);
        assert!(Geometry::linear(0, 256).is_empty());
        assert_eq!(Geometry::linear(256, 256).grid, [1, 1, 1]);
        assert_eq!(Geometry::linear(257, 256).grid, [2, 1, 1]);
        assert_eq!(Geometry::linear(1 << 40, 256).grid, [1 << 32, 1, 1]);
    }

    #[test]
    fn vectors_are_as_wide_as_rows_and_addresses_allow() {
        assert_eq!(vector(128, 2, &[0, 256]), 8);
        assert_eq!(vector(128, 4, &[16]), 4);
        assert_eq!(vector(12, 2, &[0]), 1);
        assert_eq!(vector(128, 2, &[2]), 1);
        assert_eq!(vector(0, 2, &[0]), 8);
    }
}
