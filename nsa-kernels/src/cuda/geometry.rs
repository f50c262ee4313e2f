//! Shapes of launches, as pure functions.

mod band;
pub(crate) mod decode;
mod gradients;
mod select;
pub(crate) mod step;
mod turned;

pub(crate) use band::{BandTiles, KeptScores};
pub(crate) use gradients::{GradientTiles, Parts};
pub(crate) use select::SelectTiles;
pub(crate) use turned::{Extent, TurnedTiles, extents};

use super::tensor_map::Boxes;
use nsa_core::NsaConfig;

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

/// Elements that a thread moves at once, the smallest of which have `size` bytes: 16 bytes of these, where rows of `dim`
/// elements and all addresses allow it, else one.
pub(crate) fn vector(dim: usize, size: usize, addresses: &[u64]) -> usize {
    let aligned = addresses.iter().all(|address| address % 16 == 0);
    let wide = if size == 2 { 8 } else { 4 };
    if aligned && dim.is_multiple_of(wide) { wide } else { 1 }
}

/// The most bytes of shared memory that a block takes by choice: what the smallest devices give.
pub(crate) const SHARED_BYTES: usize = 99 << 10;

/// The same where products are made by four warps together: what a block of such a device can have.
const WARPGROUP_SHARED_BYTES: usize = 227 << 10;

/// What counts the bytes of bulk copies to two stages (`kernels/bulk.cuh`).
const ARRIVALS_BYTES: usize = 16;

/// Who makes a product of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A warp alone (`mma.sync`).
    Warp,
    /// Four warps together, which read its right side from shared memory once (`wgmma`).
    Warpgroup,
}

impl Unit {
    /// What a device of a compute capability has: `wgmma` is an instruction of 9.0 alone.
    pub(crate) fn of(capability: (i32, i32)) -> Self {
        if capability == (9, 0) { Self::Warpgroup } else { Self::Warp }
    }

    /// The best for rows of these dimensions with elements of `size` bytes: warpgroups take 64 columns of 16 bits at a time, and have
    /// registers for 256.
    fn fitting(self, config: &NsaConfig, size: usize) -> Self {
        let takes = |dim: &usize| dim.is_multiple_of(64) && *dim <= 256;
        let all = [config.head_dim_qk(), config.head_dim_v()].iter().all(takes);
        if all && size == 2 { self } else { Self::Warp }
    }

    /// The most bytes of shared memory that a block takes by choice.
    pub(crate) fn shared_bytes(self) -> usize {
        match self {
            Self::Warp => SHARED_BYTES,
            Self::Warpgroup => WARPGROUP_SHARED_BYTES,
        }
    }

    /// Warps of a block, at least.
    pub(crate) fn least_warps(self) -> usize {
        match self {
            Self::Warp => 1,
            Self::Warpgroup => 4,
        }
    }

    /// What a bulk copy takes of keys: a tile of `keys` of them with one head. None where a thread copies each chunk.
    pub(crate) fn key_boxes(self, keys: usize) -> Option<Boxes> {
        (self == Self::Warpgroup).then_some(Boxes { tokens: keys, heads: 1 })
    }

    /// Bytes that tiles begin at multiples of.
    fn alignment(self) -> usize {
        match self {
            Self::Warp => 128,
            Self::Warpgroup => 1024,
        }
    }
}

/// Bytes that rows of `dim` elements of `size` bytes, at these addresses, are copied in: 16, 8, 4 or else 2.
pub(crate) fn copy_bytes(dim: usize, size: usize, addresses: &[u64]) -> usize {
    let fits = |&bytes: &usize| (dim * size).is_multiple_of(bytes) && addresses.iter().all(|a| a % bytes as u64 == 0);
    [16, 8, 4].into_iter().find(fits).unwrap_or(2)
}

/// Elements of rows of k and v in tiles of shared memory: filled up to 16.
fn padded(config: &NsaConfig) -> [usize; 2] {
    [config.head_dim_qk(), config.head_dim_v()].map(|dim| dim.next_multiple_of(16))
}

/// Bytes of a row in a tile of shared memory.
fn pitch(dim: usize, size: usize) -> usize {
    dim.next_multiple_of(16) * size
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

    pub(super) fn config(heads: usize, dims: (usize, usize)) -> NsaConfig {
        let builder = NsaConfig::builder(heads, 1, dims.0, dims.1);
        builder.compress_kind(nsa_core::CompressKind::Mean).build().unwrap()
    }

    #[test]
    fn rows_are_copied_as_wide_as_they_lie() {
        assert_eq!(copy_bytes(128, 2, &[0, 256]), 16);
        assert_eq!(copy_bytes(12, 2, &[0]), 8);
        assert_eq!(copy_bytes(10, 2, &[0]), 4);
        assert_eq!(copy_bytes(5, 2, &[0]), 2);
        assert_eq!(copy_bytes(128, 2, &[4]), 4);
    }

    #[test]
    fn a_block_holds_all_heads_of_its_queries_within_its_memory() {
        for heads in [1, 4, 7, 16, 64, 128] {
            for dims in [(5, 3), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)] {
                for (size, unit) in [(2, Unit::Warp), (4, Unit::Warp), (2, Unit::Warpgroup), (4, Unit::Warpgroup)] {
                    if (dims.0, size) == (512, 4) {
                        continue;
                    }
                    let config = config(heads, dims);
                    let select = SelectTiles::new(&config, size, unit, 1024);
                    for band in [BandTiles::new(&config, size, unit), BandTiles::compressed(&config, size, unit)] {
                        assert!(band.queries > 0 && band.queries * heads <= band.rows(), "{heads} {dims:?} {band:?}");
                        assert!(band.warps.is_multiple_of(band.unit.least_warps()), "{heads} {dims:?} {band:?}");
                        let limit = band.unit.shared_bytes();
                        assert!(heads > 16 || band.shared_bytes <= limit, "{heads} {dims:?} {band:?}");
                    }
                    for gradients in
                        [GradientTiles::new(&config, size, unit), GradientTiles::banded(&config, size, unit)]
                    {
                        assert!(
                            gradients.queries * heads <= 16 * gradients.query_warps,
                            "{heads} {dims:?} {gradients:?}"
                        );
                        for warps in [gradients.warps, gradients.query_warps] {
                            assert!(warps.is_multiple_of(gradients.unit.least_warps()), "{heads} {gradients:?}");
                        }
                        let limit = gradients.unit.shared_bytes();
                        assert!(heads > 16 || gradients.shared_bytes() <= limit, "{dims:?} {gradients:?}");
                    }
                    assert!(select.queries > 0, "{heads} {dims:?} {select:?}");
                    assert!(
                        select.queries * heads.div_ceil(select.parts) <= select.rows,
                        "{heads} {dims:?} {select:?}"
                    );
                    assert!(select.shared_bytes <= select.unit.shared_bytes(), "{heads} {dims:?} {select:?}");
                }
            }
        }
    }

    #[test]
    fn warpgroups_multiply_where_columns_fill_them() {
        assert_eq!(
            [(8, 0), (8, 9), (9, 0), (10, 0)].map(Unit::of).map(|unit| unit == Unit::Warpgroup),
            [false, false, true, false]
        );
        let unit = |dims, size| BandTiles::new(&config(16, dims), size, Unit::Warpgroup).unit;
        assert_eq!(unit((128, 128), 2), Unit::Warpgroup);
        assert_eq!(unit((192, 128), 2), Unit::Warpgroup);
        assert_eq!([unit((96, 96), 2), unit((64, 32), 2), unit((128, 128), 4)], [Unit::Warp; 3]);
        assert_eq!([unit((256, 256), 2), unit((320, 256), 2)], [Unit::Warpgroup, Unit::Warp]);
        let config = config(16, (128, 128));
        let (band, compressed) =
            (BandTiles::new(&config, 2, Unit::Warpgroup), BandTiles::compressed(&config, 2, Unit::Warpgroup));
        assert_eq!((band.rows(), compressed.rows(), compressed.queries), (128, 128, 8));
        assert_eq!(BandTiles::compressed(&self::config(7, (128, 128)), 2, Unit::Warpgroup).rows(), 192);
        let gradients = GradientTiles::new(&config, 2, Unit::Warpgroup);
        assert_eq!((gradients.rows(), gradients.keys, gradients.query_rows), (64, 64, 64));
        let shared = GradientTiles::banded(&config, 2, Unit::Warpgroup);
        assert_eq!((shared.rows(), shared.query_warps, shared.copied), (128, 12, 2));
    }
}
