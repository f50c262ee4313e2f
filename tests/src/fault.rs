//! Planted faults: mistakes that kernels make, in what a kernel gets or gives. Each must be caught by the comparison.

use crate::Kind;
use crate::gate::Gate;
use crate::generate::Weights;
use crate::kernels::{Attention, AttentionOutput, Compress, Pattern, Sizes};
use nsa_core::{CuSeqlens, Packing};

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The softmax scale is 5 % off.
    Scale,
    /// The window is one token short.
    WindowShort,
    /// The window is one token long.
    WindowLong,
    /// One key and value row in the middle is lost: its neighbour's stands in its place.
    KeyLost,
    /// A page of rows is stale: the rows before it stand in its place.
    StaleBlock,
    /// One block of one query's list is lost.
    BlockLost,
    /// One block of one query's list is its neighbour.
    WrongBlock,
    /// The last query head reads the row of the head before it.
    HeadStride,
    /// KV heads are exchanged.
    GroupMap,
    /// The gates of the first two branches are exchanged.
    GateColumns,
    /// The gate is left out of do.
    NoGate,
    /// A sequence's start is off by one.
    Boundary,
    /// lse in base 2.
    LseBase,
    /// lse without the largest score.
    LseShift,
    /// One output row is left over from the query before it.
    OutputRow,
    /// The last column of o is left unwritten.
    Column,
    /// A block list is not in order.
    ListOrder,
    /// A tie or a score goes the wrong way: the last free block is another one.
    Choice,
    /// The position embedding is one token off.
    Position,
    /// The last token of every block is left out of φ.
    BlockShort,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::Scale,
        Self::WindowShort,
        Self::WindowLong,
        Self::KeyLost,
        Self::StaleBlock,
        Self::BlockLost,
        Self::WrongBlock,
        Self::HeadStride,
        Self::GroupMap,
        Self::GateColumns,
        Self::NoGate,
        Self::Boundary,
        Self::LseBase,
        Self::LseShift,
        Self::OutputRow,
        Self::Column,
        Self::ListOrder,
        Self::Choice,
        Self::Position,
        Self::BlockShort,
    ];

    /// Changes what an attention kernel gets; false if the fault is of another kind.
    pub fn plant<T: Kind>(self, inputs: &mut Attention<T>) -> bool {
        let sizes = Sizes::new(&inputs.config, &inputs.packing);
        let (config, pattern) = (&inputs.config, inputs.pattern);
        let set = |builder: nsa_core::NsaConfigBuilder| builder.build().expect("a valid fault");
        match self {
            Self::Scale => inputs.config = set(config.to_builder().scale(config.scale() * 1.05)),
            Self::WindowShort if pattern == Pattern::Win => {
                inputs.config = set(config.to_builder().window(config.window() - 1));
            }
            Self::WindowLong if pattern == Pattern::Win => {
                inputs.config = set(config.to_builder().window(config.window() + 1));
            }
            Self::KeyLost => stale(inputs, 1),
            Self::StaleBlock => stale(inputs, 4),
            Self::BlockLost if pattern == Pattern::Slc => {
                let list = middle_list(inputs);
                list.rotate_left(1);
                *list.last_mut().expect("n ≥ 1") = -1;
            }
            Self::WrongBlock if pattern == Pattern::Slc => {
                let list = middle_list(inputs);
                let free = (0..).find(|j| !list.contains(j)).expect("a finite list");
                list[0] = free;
                list.sort_unstable();
            }
            Self::HeadStride => {
                let row = sizes.hq * sizes.dk;
                for query in inputs.q.chunks_mut(row) {
                    query.copy_within(row - 2 * sizes.dk..row - sizes.dk, row - sizes.dk);
                }
            }
            Self::GroupMap if sizes.g > 1 => {
                swap_heads(&mut inputs.k, sizes.g, sizes.dk);
                swap_heads(&mut inputs.v, sizes.g, sizes.dv);
            }
            Self::GateColumns if pattern.gate().is_some_and(|column| column < 2) => {
                swap_columns(inputs.gates.as_mut().expect("the branch has gates"));
            }
            Self::NoGate if pattern.gate().is_some() => inputs.gates = None,
            Self::Boundary => return move_boundary(inputs),
            _ => return false,
        }
        true
    }

    /// Changes what an attention kernel gave; false if the fault is of another kind.
    pub fn spoil<T: Kind>(self, inputs: &Attention<T>, output: &mut AttentionOutput<T, T::Acc>) -> bool {
        let sizes = Sizes::new(&inputs.config, &inputs.packing);
        let (middle, row) = (sizes.n / 2, sizes.hq * sizes.dv);
        let real = |x: f64| <T::Acc as nsa_core::Element>::from_f64(x);
        let value = |x: T::Acc| nsa_core::Element::to_f64(x);
        match self {
            Self::LseBase => output.lse.iter_mut().for_each(|x| *x = real(value(*x) * std::f64::consts::LOG2_E)),
            Self::LseShift => output.lse[middle * sizes.hq] = real(value(output.lse[middle * sizes.hq]) - 0.25),
            Self::OutputRow => output.o.copy_within((middle - 1) * row..middle * row, middle * row),
            Self::Column => output.o.chunks_mut(sizes.dv).for_each(|o| o[sizes.dv - 1] = T::FILL),
            Self::ListOrder if inputs.pattern == Pattern::Cmp => last_list(inputs, output).reverse(),
            Self::Choice if inputs.pattern == Pattern::Cmp => {
                let list = last_list(inputs, output);
                let local = inputs.config.select_local();
                let free = list.len() - local - 1;
                let other = (1..).find(|j| !list.contains(j)).expect("a finite list");
                list[free] = other;
                list.sort_unstable();
            }
            _ => return false,
        }
        true
    }

    /// Changes what φ gets; false if the fault is of another kind.
    pub fn plant_compress<T: Kind>(self, inputs: &mut Compress<T>) -> bool {
        let (g, dim) = (inputs.config.num_kv_heads(), inputs.side.dim(&inputs.config));
        match (self, &mut inputs.weights) {
            (Self::Position, _) => match &mut inputs.position {
                Some(e) => e.rotate_left(g * dim),
                None => return false,
            },
            (Self::GroupMap, _) if g > 1 => swap_heads(&mut inputs.x, g, dim),
            (Self::KeyLost, _) => {
                let middle = inputs.packing.num_tokens() / 2 * g * dim;
                inputs.x.copy_within(middle - g * dim..middle, middle);
            }
            (Self::BlockShort, Weights::Weighted(weight)) => {
                let start = weight.len() - g;
                weight[start..].fill(T::default());
            }
            (Self::BlockShort, Weights::Linear(weight)) => {
                for matrix in weight.chunks_mut(inputs.config.compress_block() * dim * dim) {
                    let start = matrix.len() - dim * dim;
                    matrix[start..].fill(T::default());
                }
            }
            _ => return false,
        }
        true
    }

    /// Changes what the gate gets; false if the fault is of another kind.
    pub fn plant_gate<T: Kind>(self, inputs: &mut Gate<T>) -> bool {
        match self {
            Self::GateColumns => {
                swap_columns(&mut inputs.gates);
                inputs.branches.swap(1, 2);
            }
            _ => return false,
        }
        true
    }
}

/// Rows in the middle keep what stands before them.
fn stale<T: Kind>(inputs: &mut Attention<T>, rows: usize) {
    let sizes = Sizes::new(&inputs.config, &inputs.packing);
    for (data, width) in [(&mut inputs.k, sizes.g * sizes.dk), (&mut inputs.v, sizes.g * sizes.dv)] {
        let middle = data.len() / width / 2;
        data.copy_within((middle - rows) * width..middle * width, middle * width);
    }
}

/// The list of a query in the middle that has at least two blocks and room for another.
fn middle_list<T: Kind>(inputs: &mut Attention<T>) -> &mut [i32] {
    let count = inputs.config.select_count();
    let middle = inputs.block_indices.len() / count / 2;
    let full = |list: &&mut [i32]| list[1] >= 0 && list.iter().enumerate().any(|(i, &j)| j > i as i32);
    inputs.block_indices.chunks_mut(count).skip(middle).find(full).expect("long cases have full lists")
}

/// The list of the last query, which has more candidates than places in the cases that faults run on.
fn last_list<'a, T: Kind>(inputs: &Attention<T>, output: &'a mut AttentionOutput<T, T::Acc>) -> &'a mut [i32] {
    let start = output.block_indices.len() - inputs.config.select_count();
    &mut output.block_indices[start..]
}

fn swap_heads<T: Copy>(data: &mut [T], heads: usize, dim: usize) {
    for row in data.chunks_mut(heads * dim) {
        let (first, rest) = row.split_at_mut(dim);
        let start = rest.len() - dim;
        first.swap_with_slice(&mut rest[start..]);
    }
}

fn swap_columns<T>(gates: &mut [T]) {
    gates.chunks_mut(3).for_each(|gate| gate.swap(0, 1));
}

/// The second sequence starts a token early, where sequences allow it.
fn move_boundary<T: Kind>(inputs: &mut Attention<T>) -> bool {
    let mut offsets = inputs.packing.cu_seqlens().as_slice().to_vec();
    let total = inputs.packing.num_tokens() as i32;
    let Some(at) = (1..offsets.len()).find(|&s| 0 < offsets[s] && offsets[s] < total) else { return false };
    let end = offsets[at];
    offsets.iter_mut().filter(|offset| **offset == end).for_each(|offset| *offset -= 1);
    inputs.packing = Packing::new(CuSeqlens::new(offsets).expect("still in order"));
    // The number of blocks must stay, or the kernel refuses, as it should.
    inputs
        .rows()
        .is_ok_and(|rows| rows.total() * inputs.config.num_kv_heads() * inputs.config.head_dim_qk() == inputs.k.len())
}
