//! Planted faults: mistakes that kernels make, in what a kernel gets or gives. Each must be caught by the comparison.

use crate::Kind;
use crate::decode::Step;
use crate::gate::Gate;
use crate::generate::{Side, Weights};
use crate::kernels::{Attention, AttentionOutput, Compress, Pattern, Sizes};
use crate::operator::{Branches, Compressed, Inputs, Outputs};
use nsa_core::{CuSeqlens, Element, NsaConfig, Packing};

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
        let pattern = inputs.pattern;
        match self {
            Self::Scale => return self.plant_config(&mut inputs.config),
            Self::WindowShort | Self::WindowLong if pattern == Pattern::Win => {
                return self.plant_config(&mut inputs.config);
            }
            Self::KeyLost => return stale(inputs, 1),
            Self::StaleBlock => return stale(inputs, 4),
            Self::BlockLost if pattern == Pattern::Slc => {
                let Some(list) = middle_list(inputs) else { return false };
                list.rotate_left(1);
                *list.last_mut().expect("n ≥ 1") = -1;
            }
            Self::WrongBlock if pattern == Pattern::Slc => {
                let Some(list) = middle_list(inputs) else { return false };
                let free = (0..).find(|j| !list.contains(j)).expect("a finite list");
                list[0] = free;
                let used = list.iter().position(|&j| j < 0).unwrap_or(list.len());
                list[..used].sort_unstable();
            }
            Self::HeadStride => return lose_head_stride(&mut inputs.q, sizes.hq, sizes.dk),
            Self::GroupMap if sizes.g > 1 => {
                swap_heads(&mut inputs.k, sizes.g, sizes.dk);
                swap_heads(&mut inputs.v, sizes.g, sizes.dv);
            }
            Self::GateColumns if pattern.gate().is_some_and(|column| column < 2) => {
                swap_columns(inputs.gates.as_mut().expect("the branch has gates"));
            }
            Self::NoGate if pattern.gate().is_some() => inputs.gates = None,
            Self::Boundary => return move_boundary(&mut inputs.packing, &inputs.config),
            _ => return false,
        }
        true
    }

    /// Changes what an attention kernel gave; false if the fault is of another kind.
    pub fn spoil<T: Kind>(self, inputs: &Attention<T>, output: &mut AttentionOutput<T, T::Acc>) -> bool {
        let sizes = Sizes::new(&inputs.config, &inputs.packing);
        let cmp = inputs.pattern == Pattern::Cmp;
        match self {
            Self::LseBase | Self::LseShift => return self.spoil_lse(&mut output.lse, &sizes),
            Self::OutputRow | Self::Column => return self.spoil_rows(&mut output.o, &sizes),
            Self::ListOrder if cmp => last_list(inputs, output).reverse(),
            Self::Choice if cmp => return choose(&inputs.config, last_list(inputs, output)),
            _ => return false,
        }
        true
    }

    /// Changes what φ gets; false if the fault is of another kind.
    pub fn plant_compress<T: Kind>(self, inputs: &mut Compress<T>) -> bool {
        let (g, dim) = (inputs.config.num_kv_heads(), inputs.side.dim(&inputs.config));
        match self {
            Self::Position => match &mut inputs.position {
                Some(e) => e.rotate_left(g * dim),
                None => return false,
            },
            Self::GroupMap if g > 1 => swap_heads(&mut inputs.x, g, dim),
            Self::KeyLost => return stale_rows(&mut inputs.x, g * dim, 1),
            Self::StaleBlock => return stale_rows(&mut inputs.x, g * dim, 4),
            Self::BlockShort => return shorten(&mut inputs.weights, &inputs.config, dim),
            Self::Boundary => return move_boundary(&mut inputs.packing, &inputs.config),
            _ => return false,
        }
        true
    }

    /// Changes what the gate gets; false if the fault is of another kind.
    pub fn plant_gate<T: Kind>(self, inputs: &mut Gate<T>) -> bool {
        match self {
            Self::GateColumns => swap_columns(&mut inputs.gates),
            Self::NoGate => inputs.gates.fill(T::from_f64(1.0)),
            Self::HeadStride => return lose_head_stride(&mut inputs.branches[0], inputs.sizes.hq, inputs.sizes.dv),
            Self::StaleBlock => return stale_rows(&mut inputs.branches[2], inputs.sizes.hq * inputs.sizes.dv, 4),
            _ => return false,
        }
        true
    }

    /// Changes what the whole operator gets, or a step of decoding; false if the fault is of another kind.
    pub fn plant_operator<T: Kind>(self, inputs: &mut Inputs<T>) -> bool {
        let sizes = Sizes::new(&inputs.config, &inputs.packing);
        let whole = inputs.packing.seqs().all(|seq| seq.context == 0);
        match self {
            Self::Scale | Self::WindowShort | Self::WindowLong => return self.plant_config(&mut inputs.config),
            Self::HeadStride => return lose_head_stride(&mut inputs.q, sizes.hq, sizes.dk),
            Self::GateColumns => swap_columns(&mut inputs.gates),
            Self::NoGate => inputs.gates.fill(T::from_f64(1.0)),
            Self::Boundary if whole => return move_boundary(&mut inputs.packing, &inputs.config),
            Self::KeyLost | Self::StaleBlock | Self::GroupMap | Self::Position | Self::BlockShort => {
                let Inputs { config, k, v, .. } = inputs;
                let both = [(Side::Key, k), (Side::Value, v)];
                return both.into_iter().all(|(side, branches)| self.plant_branches(config, branches, side));
            }
            _ => return false,
        }
        true
    }

    fn plant_branches<T: Kind>(self, config: &NsaConfig, branches: &mut Branches<T>, side: Side) -> bool {
        let (g, dim) = (config.num_kv_heads(), side.dim(config));
        let Branches { cmp, slc, win } = branches;
        match (self, cmp) {
            (Self::KeyLost, _) => stale_rows(slc, g * dim, 1) && stale_rows(win, g * dim, 1),
            (Self::StaleBlock, _) => stale_rows(slc, g * dim, 4) && stale_rows(win, g * dim, 4),
            (Self::GroupMap, _) if g > 1 => {
                swap_heads(slc, g, dim);
                swap_heads(win, g, dim);
                true
            }
            (Self::Position, Compressed::Tokens { position: Some(e), .. }) => {
                e.rotate_left(g * dim);
                true
            }
            (Self::BlockShort, Compressed::Tokens { phi, .. }) => shorten(phi, config, dim),
            _ => false,
        }
    }

    /// Changes what the whole operator gave; false if the fault is of another kind.
    pub fn spoil_operator<T: Kind>(self, inputs: &Inputs<T>, output: &mut Outputs<T, T::Acc>) -> bool {
        let sizes = Sizes::new(&inputs.config, &inputs.packing);
        let count = output.block_indices.len();
        match self {
            Self::LseBase | Self::LseShift => return self.spoil_lse(&mut output.lse[2], &sizes),
            Self::OutputRow | Self::Column => return self.spoil_rows(&mut output.o, &sizes),
            Self::ListOrder => output.block_indices[count - sizes.select..].reverse(),
            Self::Choice => return choose(&inputs.config, &mut output.block_indices[count - sizes.select..]),
            _ => return false,
        }
        true
    }

    /// Changes what a step of decoding gave; false if the fault is of another kind.
    pub fn spoil_step<T: Kind>(self, inputs: &Inputs<T>, step: &mut Step<T>) -> bool {
        let sizes = Sizes::new(&inputs.config, &inputs.packing);
        let count = step.block_indices.len();
        match self {
            Self::OutputRow | Self::Column => return self.spoil_rows(&mut step.o, &sizes),
            Self::ListOrder => step.block_indices[count - sizes.select..].reverse(),
            Self::Choice => return choose(&inputs.config, &mut step.block_indices[count - sizes.select..]),
            _ => return false,
        }
        true
    }

    /// Scale and window.
    fn plant_config(self, config: &mut NsaConfig) -> bool {
        let builder = config.to_builder();
        let changed = match self {
            Self::Scale => builder.scale(config.scale() * 1.05),
            Self::WindowShort if config.window() > 1 => builder.window(config.window() - 1),
            Self::WindowLong => builder.window(config.window() + 1),
            _ => return false,
        };
        *config = changed.build().expect("a valid fault");
        true
    }

    fn spoil_lse<A: Element>(self, lse: &mut [A], sizes: &Sizes) -> bool {
        match self {
            Self::LseBase => lse.iter_mut().for_each(|x| *x = A::from_f64(x.to_f64() * std::f64::consts::LOG2_E)),
            Self::LseShift => {
                let x = &mut lse[sizes.n / 2 * sizes.hq];
                *x = A::from_f64(x.to_f64() - 0.25);
            }
            _ => return false,
        }
        true
    }

    fn spoil_rows<T: Kind>(self, o: &mut [T], sizes: &Sizes) -> bool {
        match self {
            Self::OutputRow => stale_rows(o, sizes.hq * sizes.dv, 1),
            Self::Column => {
                o.chunks_mut(sizes.dv).for_each(|o| o[sizes.dv - 1] = T::FILL);
                true
            }
            _ => false,
        }
    }
}

/// Rows in the middle keep what stands before them.
fn stale<T: Kind>(inputs: &mut Attention<T>, rows: usize) -> bool {
    let sizes = Sizes::new(&inputs.config, &inputs.packing);
    let both = [(&mut inputs.k, sizes.g * sizes.dk), (&mut inputs.v, sizes.g * sizes.dv)];
    both.into_iter().all(|(data, width)| stale_rows(data, width, rows))
}

fn stale_rows<T: Copy>(data: &mut [T], width: usize, rows: usize) -> bool {
    let middle = data.len() / width / 2;
    if middle < rows {
        return false;
    }
    data.copy_within((middle - rows) * width..middle * width, middle * width);
    true
}

/// The last head reads the row of the head before it.
fn lose_head_stride<T: Copy>(q: &mut [T], heads: usize, dim: usize) -> bool {
    if heads < 2 {
        return false;
    }
    for query in q.chunks_mut(heads * dim) {
        query.copy_within((heads - 2) * dim..(heads - 1) * dim, (heads - 1) * dim);
    }
    true
}

/// Leaves the last token of every block out of φ; false if φ has no weight a token.
fn shorten<T: Kind>(weights: &mut Weights<T>, config: &NsaConfig, dim: usize) -> bool {
    match weights {
        Weights::Weighted(weight) => {
            let start = weight.len() - config.num_kv_heads();
            weight[start..].fill(T::default());
        }
        Weights::Linear(weight) => {
            for matrix in weight.chunks_mut(config.compress_block() * dim * dim) {
                let start = matrix.len() - dim * dim;
                matrix[start..].fill(T::default());
            }
        }
        Weights::Mlp { weight1, .. } => {
            let rows = config.compress_block() * dim;
            for matrix in weight1.chunks_mut(rows * config.compress_hidden().expect("an mlp has it")) {
                let start = matrix.len() / rows * (rows - dim);
                matrix[start..].fill(T::default());
            }
        }
        Weights::Mean => return false,
    }
    true
}

/// The list of a query in the middle that has at least two blocks and room for another.
fn middle_list<T: Kind>(inputs: &mut Attention<T>) -> Option<&mut [i32]> {
    let count = inputs.config.select_count();
    let middle = inputs.block_indices.len() / count / 2;
    let full =
        |list: &&mut [i32]| list.iter().take(2).all(|&j| j >= 0) && list.iter().enumerate().any(|(i, &j)| j > i as i32);
    inputs.block_indices.chunks_mut(count).skip(middle).find(full)
}

/// The list of the last query.
fn last_list<'a, T: Kind>(inputs: &Attention<T>, output: &'a mut AttentionOutput<T, T::Acc>) -> &'a mut [i32] {
    let start = output.block_indices.len() - inputs.config.select_count();
    &mut output.block_indices[start..]
}

/// Puts another block in the place of the last free one; false if no place is free or no block is left.
fn choose(config: &NsaConfig, list: &mut [i32]) -> bool {
    let (initial, local) = (config.select_initial(), config.select_local());
    let Some(free) = list.len().checked_sub(local + 1).filter(|&place| place >= initial && list[place] >= 0) else {
        return false;
    };
    let Some(other) = (initial as i32..list[list.len() - local]).find(|j| !list.contains(j)) else { return false };
    list[free] = other;
    list.sort_unstable();
    true
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

/// A sequence starts a token early, where the number of blocks stays, or else kernels refuse, as they should.
fn move_boundary(packing: &mut Packing, config: &NsaConfig) -> bool {
    let offsets = packing.cu_seqlens().as_slice();
    let total = packing.num_tokens() as i32;
    let blocks = |packing: &Packing| packing.cu_blocks(config).expect("cases are short").total();
    let moved = offsets.iter().filter(|&&end| 0 < end && end < total).find_map(|&end| {
        let moved = offsets.iter().map(|&offset| offset - i32::from(offset == end)).collect();
        let moved = Packing::new(CuSeqlens::new(moved).ok()?);
        (blocks(&moved) == blocks(packing)).then_some(moved)
    });
    moved.map(|moved| *packing = moved).is_some()
}
