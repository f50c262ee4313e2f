//! Keys and values in the layouts that products want: tile by tile, in units.

use crate::cpu::ahead::Lines;
use crate::cpu::rows::SeqRows;
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::simd::padded;
use crate::cpu::unit::Unit;
use nsa_core::Element;
use rayon::prelude::*;
use std::ops::Range;

/// Keys of a tile, at most: with 128 dims a tile of K or V is 32 KiB in f32. Whole vectors and whole units.
pub(crate) const KEYS: usize = 64;

/// Bytes of tiles of which no more than a part stays in the last cache of a core: asking for lines of fewer costs more than
/// it saves.
const FAR: usize = 8 << 20;

/// How the positions of a sequence are cut into tiles: blocks of tokens into parts of at most [`KEYS`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    block: usize,
    parts: usize,
}

impl Grid {
    /// Tiles that do not reach over the ends of blocks.
    pub(crate) fn of_blocks(block: usize) -> Self {
        Self { block, parts: block.div_ceil(KEYS) }
    }

    /// Tiles of [`KEYS`] from position 0 on.
    pub(crate) fn plain() -> Self {
        Self::of_blocks(KEYS)
    }

    /// The tiles of a block.
    pub(crate) fn tiles_of(&self, block: usize) -> Range<usize> {
        block * self.parts..(block + 1) * self.parts
    }

    /// Positions of a tile.
    pub(crate) fn tokens(&self, tile: usize) -> Range<usize> {
        let (start, end) = (tile / self.parts * self.block, (tile / self.parts + 1) * self.block);
        let start = start + tile % self.parts * KEYS;
        start..(start + KEYS).min(end)
    }

    /// The tiles that hold positions of a range.
    pub(crate) fn tiles(&self, positions: &Range<usize>) -> Range<usize> {
        let tile = |position| position / self.block * self.parts + position % self.block / KEYS;
        if positions.is_empty() { 0..0 } else { tile(positions.start)..tile(positions.end - 1) + 1 }
    }

    /// Most positions of a tile.
    fn size(&self) -> usize {
        self.block.min(KEYS)
    }
}

/// One layout of one tensor's tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The right operand of a sum over the dims: `[⌈D / STEP⌉, keys]`, rows of whole vectors.
    OverDims,
    /// The right operand of a sum over the keys: `[⌈keys / STEP⌉, D]`, rows of whole vectors.
    OverKeys,
}

/// A tile in one layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile<'a, U> {
    /// The units.
    pub(crate) data: &'a [U],
    /// Distance between rows.
    pub(crate) stride: usize,
}

/// How to lay out the rows of one sequence's keys or values.
#[derive(Clone, Copy)]
pub(crate) struct Layout<'a, T> {
    rows: SeqRows<'a, T>,
    /// Position of the first row.
    first: usize,
    dim: usize,
    grid: Grid,
    order: Order,
}

impl<'a, T: Element> Layout<'a, T> {
    /// Rows of `dim` elements whose first has position `first`.
    pub(crate) fn new(rows: SeqRows<'a, T>, first: usize, dim: usize, grid: Grid, order: Order) -> Self {
        Self { rows, first, dim, grid, order }
    }

    /// Distance between the rows of a tile.
    fn stride(&self) -> usize {
        padded(match self.order {
            Order::OverDims => self.grid.size(),
            Order::OverKeys => self.dim,
        })
    }

    /// Units of a tile.
    fn tile_len<U: Unit>(&self) -> usize {
        let sum = match self.order {
            Order::OverDims => self.dim,
            Order::OverKeys => self.grid.size(),
        };
        sum.div_ceil(U::STEP) * self.stride()
    }

    /// Writes a tile of KV head `g`. What stands for positions that are not stored is unspecified.
    fn put<U: Unit<Acc = T::Acc>>(&self, tile: usize, g: usize, units: &mut [U]) {
        let (tokens, stride) = (self.grid.tokens(tile), self.stride());
        let row = |position: usize| {
            let stored = position.checked_sub(self.first).filter(|&r| r < self.rows.len());
            stored.map(|r| self.rows.row(r, g))
        };
        match self.order {
            Order::OverDims => {
                let mut column = [U::zeroed(); 256];
                for (i, row) in tokens.enumerate().filter_map(|(i, position)| Some((i, row(position)?))) {
                    let parts = row.chunks(column.len() * U::STEP).zip(units.chunks_mut(column.len() * stride));
                    for (row, units) in parts {
                        U::put_row(row, &mut column);
                        let column = &column[..row.len().div_ceil(U::STEP)];
                        for (place, &unit) in units[i..].iter_mut().step_by(stride).zip(column) {
                            *place = unit;
                        }
                    }
                }
            }
            Order::OverKeys => {
                for (at, units) in tokens.clone().step_by(U::STEP).zip(units.chunks_mut(stride)) {
                    let stored: [Option<&[T]>; 2] = std::array::from_fn(|x| row(at + x.min(U::STEP - 1)));
                    // A row that is not stored is in nobody's steps: any other stands in for it.
                    if let Some(any) = stored[0].or(stored[1]) {
                        let rows = stored.map(|row| row.unwrap_or(any));
                        U::put_rows(&rows[..U::STEP], units);
                    }
                }
            }
        }
    }

    /// All tiles that hold stored positions, for `heads` KV heads.
    fn pack<'p, U: Unit<Acc = T::Acc>>(&self, pool: &'p Pool, heads: usize) -> Packed<'p, U> {
        let tiles = self.grid.tiles(&(self.first..self.first + self.rows.len()));
        let len = self.tile_len::<U>();
        let mut data = pool.take(tiles.len() * heads * len);
        data.par_chunks_mut(len.max(1)).enumerate().with_min_len(4).for_each(|(i, units)| {
            self.put(tiles.start + i % tiles.len(), i / tiles.len(), units);
        });
        Packed { data, tiles, len, stride: self.stride() }
    }

    /// The tiles for `heads` KV heads: laid out once, if all tasks together look at a tile more often than there are
    /// tiles, else where they are looked at.
    pub(crate) fn tiles<'p, U: Unit<Acc = T::Acc>>(self, pool: &'p Pool, heads: usize, looks: usize) -> Tiles<'p, T, U>
    where
        'a: 'p,
    {
        let tiles = self.grid.tiles(&(self.first..self.first + self.rows.len()));
        let packed = (looks > tiles.len()).then(|| self.pack(pool, heads));
        Tiles { layout: self, packed }
    }
}

/// The tiles of one sequence's keys or values in one layout.
pub(crate) struct Tiles<'p, T, U> {
    layout: Layout<'p, T>,
    packed: Option<Packed<'p, U>>,
}

impl<'p, T: Element, U: Unit<Acc = T::Acc>> Tiles<'p, T, U> {
    /// Memory for [`Tiles::tile`].
    pub(crate) fn buffer(&self, pool: &'p Pool) -> Scratch<'p, U> {
        self.buffer_of(pool, 1)
    }

    /// Memory for [`Tiles::several`] of up to `most` tiles.
    pub(crate) fn buffer_of(&self, pool: &'p Pool, most: usize) -> Scratch<'p, U> {
        pool.take(if self.packed.is_some() { 0 } else { most * self.layout.tile_len::<U>() })
    }

    /// A tile of KV head `g`; `buffer` may hold it.
    #[inline(always)]
    pub(crate) fn tile<'b>(&'b self, tile: usize, g: usize, buffer: &'b mut [U]) -> Tile<'b, U> {
        if let Some(packed) = &self.packed {
            return packed.tile(tile, g);
        }
        self.layout.put(tile, g, buffer);
        Tile { data: buffer, stride: self.layout.stride() }
    }

    /// The lines of a tile of KV head `g`, if tiles are laid out and so many that they come from memory.
    pub(crate) fn lines(&self, tile: usize, g: usize) -> Lines<'_> {
        let far = self.packed.as_ref().filter(|packed| size_of_val(&*packed.data) >= FAR);
        far.map_or_else(Lines::none, |packed| {
            let Tile { data, .. } = packed.tile(tile, g);
            Lines::new(data, data.len(), data.len())
        })
    }

    /// Up to `most` consecutive tiles of [`KEYS`] from one on as a single one over the keys, and how many: as many whether tiles are
    /// laid out or not, since sums over them depend on it. `buffer` may hold them.
    pub(crate) fn several<'b>(
        &'b self,
        tiles: Range<usize>,
        most: usize,
        g: usize,
        buffer: &'b mut [U],
    ) -> (Tile<'b, U>, usize) {
        debug_assert!(self.layout.order == Order::OverKeys && self.layout.grid.block == KEYS);
        let count = tiles.len().min(most);
        let tiles = tiles.start..tiles.start + count;
        let Some(packed) = &self.packed else {
            let len = self.layout.tile_len::<U>();
            for (at, tile) in tiles.enumerate() {
                self.layout.put(tile, g, &mut buffer[at * len..][..len]);
            }
            return (Tile { data: buffer, stride: self.layout.stride() }, count);
        };
        (packed.several(tiles, g), count)
    }
}

/// Tiles that are laid out.
struct Packed<'p, U> {
    /// `[heads][tiles][len]`.
    data: Scratch<'p, U>,
    tiles: Range<usize>,
    len: usize,
    stride: usize,
}

impl<U: Unit> Packed<'_, U> {
    /// A tile of KV head `g`.
    #[inline(always)]
    fn tile(&self, tile: usize, g: usize) -> Tile<'_, U> {
        self.several(tile..tile + 1, g)
    }

    /// Consecutive tiles of KV head `g`: over the keys, one tile after the other.
    #[inline(always)]
    fn several(&self, tiles: Range<usize>, g: usize) -> Tile<'_, U> {
        let at = g * self.tiles.len() + tiles.start - self.tiles.start;
        Tile { data: &self.data[at * self.len..][..tiles.len() * self.len], stride: self.stride }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::unit::Pair;
    use half::bf16;
    use nsa_core::View;

    #[test]
    fn grids_cut_positions_into_tiles() {
        let plain = Grid::plain();
        assert_eq!((plain.tokens(2), plain.tiles(&(70..129)), plain.tiles(&(70..70))), (128..192, 1..3, 0..0));
        let large = Grid::of_blocks(150);
        assert_eq!((large.tiles_of(1), large.tokens(3), large.tokens(5)), (3..6, 150..214, 278..300));
        assert_eq!((large.tiles(&(0..151)), large.tiles(&(149..150))), (0..4, 2..3));
        let small = Grid::of_blocks(10);
        assert_eq!((small.tiles_of(3), small.tokens(3), small.tiles(&(9..11))), (3..4, 30..40, 0..2));
    }

    /// Every element of every tile in both orders, of rows whose first has a position that starts no tile.
    fn tiles_hold_the_rows<U: Unit<Acc = f32>>(elements: impl Fn(U) -> Vec<f32>) {
        let (pool, heads, dim, first, len) = (Pool::default(), 2, 5, 7, 100);
        let value = |r: usize, g: usize, x: usize| bf16::from_f32(((r * heads + g) * dim + x) as f32 % 251.0);
        let data: Vec<bf16> =
            (0..len * heads * dim).map(|i| value(i / dim / heads, i / dim % heads, i % dim)).collect();
        let rows = SeqRows::whole(View::new(&data, [len, heads, dim]).unwrap());
        for grid in [Grid::plain(), Grid::of_blocks(9)] {
            for order in [Order::OverDims, Order::OverKeys] {
                let layout = Layout::new(rows, first, dim, grid, order);
                let (packed, single) = (layout.tiles::<U>(&pool, heads, 1000), layout.tiles::<U>(&pool, heads, 1));
                let mut buffer = single.buffer(&pool);
                assert_eq!((packed.buffer(&pool).len(), buffer.is_empty()), (0, false));
                for (position, g, x) in
                    (first..first + len).flat_map(|p| (0..heads * dim).map(move |i| (p, i / dim, i % dim)))
                {
                    let tile = grid.tiles(&(position..position + 1)).start;
                    let key = position - grid.tokens(tile).start;
                    let (sum, column) = if order == Order::OverDims { (x, key) } else { (key, x) };
                    for tile in [packed.tile(tile, g, &mut []), single.tile(tile, g, &mut buffer)] {
                        let unit = elements(tile.data[sum / U::STEP * tile.stride + column]);
                        assert_eq!(
                            unit[sum % U::STEP],
                            value(position - first, g, x).to_f32(),
                            "{order:?} {position} {g} {x}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn several_tiles_lie_one_behind_the_other() {
        let (pool, heads, dim, len) = (Pool::default(), 2, 3, 150);
        let data: Vec<f32> = (0..len * heads * dim).map(|i| i as f32).collect();
        let rows = SeqRows::whole(View::new(&data, [len, heads, dim]).unwrap());
        let layout = Layout::new(rows, 0, dim, Grid::plain(), Order::OverKeys);
        let (packed, single) = (layout.tiles::<f32>(&pool, heads, 1000), layout.tiles::<f32>(&pool, heads, 1));
        for (most, counts) in [(1, 1), (2, 2), (9, 2)] {
            let mut buffer = single.buffer_of(&pool, most);
            for (tiles, buffer) in [(&packed, &mut [][..]), (&single, &mut buffer[..])] {
                let (tile, count) = tiles.several(1..3, most, 1, buffer);
                assert_eq!(count, counts);
                let stored = (0..count * KEYS).filter(|key| KEYS + key < len);
                stored.for_each(|key| {
                    assert_eq!(tile.data[key * tile.stride..][..dim], data[((KEYS + key) * heads + 1) * dim..][..dim]);
                });
            }
        }
    }

    #[test]
    fn tiles_hold_the_rows_in_singles_and_in_pairs() {
        tiles_hold_the_rows::<f32>(|x| vec![x]);
        tiles_hold_the_rows::<Pair<f32>>(|pair| {
            bytemuck::cast::<Pair<f32>, [bf16; 2]>(pair).map(bf16::to_f32).to_vec()
        });
    }
}
