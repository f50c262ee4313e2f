//! Gradients of the branches on the host: what they share, and those of `dense`, `win` and `cmp`.

use super::ahead::{Build, Launched};
use super::attention::{Sequences, check_tiles, copies, packed_sequences};
use super::geometry::{Geometry, GradientTiles, Parts, Unit};
use super::launch::Call;
use super::params::{Field, In, Out, Params, Stored, params};
use super::program::{Constants, Program};
use super::tensor_map::{Boxes, TensorMap};
use super::workspace::{Needs, Places, Scratch};
use super::{Cuda, Device};
use crate::op::Gating;
use crate::{Element, Result, Tensor, TensorMut};
use nsa_core::{CuSeqlens, DType, NsaConfig, Packing, Seq, index};
use std::marker::PhantomData;
use std::ops::Range;

static DENSE: Program =
    Program { file: "dense_bwd.cu", text: include_str!("kernels/dense_bwd.cu"), params: &[BandBackward::declaration] };
static WIN: Program =
    Program { file: "win_bwd.cu", text: include_str!("kernels/win_bwd.cu"), params: &[BandBackward::declaration] };
static CMP: Program =
    Program { file: "cmp_bwd.cu", text: include_str!("kernels/cmp_bwd.cu"), params: &[BandBackward::declaration] };

/// Threads of a block that finds facts of rows.
pub(super) const FACTS_THREADS: u32 = 256;
/// Threads of a block that adds gradients.
pub(super) const ADD_THREADS: u32 = 256;

/// What kernels know of a row of queries (`kernels/grad.cuh`).
pub(super) type RowFacts = [f32; 4];

params! {
    /// Arguments of kernels of gradients.
    struct BandBackward {
        /// q, if it comes in boxes.
        q_map: TensorMap,
        /// d_o likewise.
        d_o_map: TensorMap,
        /// k likewise.
        k_map: TensorMap,
        /// v likewise.
        v_map: TensorMap,
        /// `[N, Hq, Dk]`.
        q: In<Stored>,
        /// `[rows, G, Dk]`.
        k: In<Stored>,
        /// `[rows, G, Dv]`.
        v: In<Stored>,
        /// `[N, Hq, Dv]`.
        o: In<Stored>,
        /// `[N, Hq, Dv]`.
        d_o: In<Stored>,
        /// `[N, Hq, 3]`, or null.
        gates: In<Stored>,
        /// `[N, Hq, 3]`, or null.
        d_gates: In<f32>,
        /// `[N, Hq]`.
        lse: In<f32>,
        /// `[N, Hq, 4]`.
        facts: Out<f32>,
        /// `[N, Hq, Dk]`.
        dq: Out<f32>,
        /// `[rows, G, Dk]`.
        dk: Out<f32>,
        /// `[rows, G, Dv]`.
        dv: Out<f32>,
        /// `[parts - 1, tiles of keys, G, KEY_ROWS (Dk + Dv)]`: of a tile's parts after the first.
        partial: Out<f32>,
        /// With tiles of queries.
        sequences: In<i32>,
        /// With tiles of keys.
        key_sequences: In<i32>,
        /// N·Hq.
        rows: i64,
        /// Of all sequences.
        query_tiles: i32,
        num_sequences: i32,
        /// Rows of queries of a part, if those of a tile of keys are cut into parts.
        part_rows: i32,
        /// The branch's column of the gates.
        gate: i32,
        /// Whether dq is added to what it holds.
        accumulate: i32,
        scale: f32,
    }
}

impl Field for BandBackward {
    fn cpp() -> String {
        "BandBackwardParams".to_owned()
    }
}

/// The tensors that every backward has, as the faces check them.
pub(super) struct Backward<'a, T: Element> {
    pub(super) config: &'a NsaConfig,
    pub(super) packing: &'a Packing,
    pub(super) q: Tensor<'a, T, 3>,
    pub(super) k: (&'static str, Tensor<'a, T, 3>),
    pub(super) v: (&'static str, Tensor<'a, T, 3>),
    pub(super) o: Tensor<'a, T, 3>,
    pub(super) lse: Tensor<'a, T::Acc, 2>,
    pub(super) d_o: Tensor<'a, T, 3>,
    pub(super) gating: Gating<'a, T>,
    pub(super) dq: TensorMut<'a, T::Acc, 3>,
    pub(super) accumulate: bool,
    pub(super) dk: (&'static str, TensorMut<'a, T::Acc, 3>),
    pub(super) dv: (&'static str, TensorMut<'a, T::Acc, 3>),
}

/// A backward that is ready for its kernels.
pub(super) struct Prepared<'c> {
    pub(super) call: Call<'c>,
    pub(super) params: BandBackward,
    pub(super) queries: Sequences,
    pub(super) keys: Sequences,
    /// Kept until the kernels are launched.
    _facts: Scratch<RowFacts>,
}

/// Checks where the tensors are, and describes them to kernels with tiles of `queries` queries and of `keys` rows of keys,
/// which lie as `offsets` says, and come in boxes of queries and of keys where there are such.
pub(super) fn prepare<'c, T: Element>(
    cuda: &'c Cuda,
    op: &'static str,
    args: Backward<'_, T>,
    offsets: &CuSeqlens,
    (queries, keys): (usize, usize),
    boxes: [Option<Boxes>; 2],
) -> Result<Prepared<'c>> {
    let call = Call::new::<T>(cuda, op)?;
    let Backward { config, packing, q, k, v, o, lse, d_o, gating, mut dq, accumulate, mut dk, mut dv } = args;
    let rows = packing.num_tokens() * config.num_heads();
    let lies = packed_sequences(offsets);
    let query_tiles = Sequences::new(&call, packing, &lies, |_, queries_of| queries_of.div_ceil(queries))?;
    let key_tiles = Sequences::new(&call, packing, &lies, |keys_of, _| keys_of.div_ceil(keys))?;
    let mut facts = call.workspace::<RowFacts>(rows)?;
    let params = BandBackward {
        q_map: TensorMap::none(),
        d_o_map: TensorMap::none(),
        k_map: TensorMap::none(),
        v_map: TensorMap::none(),
        q: call.input("q", &q)?,
        k: call.input(k.0, &k.1)?,
        v: call.input(v.0, &v.1)?,
        o: call.input("o", &o)?,
        d_o: call.input("d_o", &d_o)?,
        gates: call.optional_input("gates", gating.gates.as_ref())?,
        d_gates: call.optional_input("d_gates", gating.d_gates.as_ref())?,
        lse: call.input("lse", &lse)?,
        facts: facts.written_by(),
        dq: call.output("dq", &mut dq)?,
        dk: call.output(dk.0, &mut dk.1)?,
        dv: call.output(dv.0, &mut dv.1)?,
        partial: Out(0, PhantomData),
        sequences: query_tiles.table(),
        key_sequences: key_tiles.table(),
        rows: rows as i64,
        query_tiles: query_tiles.tiles as i32,
        num_sequences: packing.num_seqs() as i32,
        part_rows: 0,
        gate: gating.column as i32,
        accumulate: i32::from(accumulate),
        scale: config.scale() as f32,
    };
    let addresses = [&[params.q.0, params.k.0][..], &[params.v.0, params.d_o.0]];
    let [of_queries, of_keys] = boxes;
    let key_rows = lies.last().map_or(0, |(first, rows)| first + rows);
    let map = |rows: In<Stored>, count, heads, dim, boxes| TensorMap::new(cuda, rows.0, [count, heads, dim], boxes);
    let queries_map = |rows, dim| map(rows, packing.num_tokens(), config.num_heads(), dim, of_queries);
    let keys_map = |rows, dim| map(rows, key_rows, config.num_kv_heads(), dim, of_keys);
    let params = BandBackward {
        q_map: queries_map(params.q, config.head_dim_qk())?,
        d_o_map: queries_map(params.d_o, config.head_dim_v())?,
        k_map: keys_map(params.k, config.head_dim_qk())?,
        v_map: keys_map(params.v, config.head_dim_v())?,
        ..params
    };
    let call = call.constants(|constants| copies::<T>(constants.config(config), config, addresses, 0));
    Ok(Prepared { call, params, queries: query_tiles, keys: key_tiles, _facts: facts })
}

/// With the boxes of queries that bulk copies take.
pub(super) fn bake_boxes(constants: Constants, boxes: Option<Boxes>) -> Constants {
    let Boxes { tokens, heads } = boxes.unwrap_or(Boxes { tokens: 0, heads: 0 });
    constants.with("BOX_TOKENS", tokens).with("BOX_HEADS", heads)
}

impl Prepared<'_> {
    /// A warp a row of queries, which sums over its dims; a thread a row where the sums are there.
    pub(super) fn facts_geometry(&self) -> Geometry {
        let threads = if self.params.d_gates.is_none() { 32 } else { 1 };
        Geometry::linear(threads * self.params.rows as u64, FACTS_THREADS)
    }
}

/// The keys that a query sees, as `kernels/span.cuh` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// All tokens up to its own.
    Dense,
    /// The last tokens.
    Window,
    /// Compression blocks that it is not before the end of.
    Visible,
}

impl Span {
    fn program(self) -> &'static Program {
        match self {
            Self::Dense => &DENSE,
            Self::Window => &WIN,
            Self::Visible => &CMP,
        }
    }

    /// Kernels of facts of rows, of gradients of queries, of those of keys, and of the sum of the latter's parts.
    fn kernels(self) -> [&'static str; 4] {
        match self {
            Self::Dense => ["dense_row_facts", "dense_query_gradients", "dense_key_gradients", "dense_add_parts"],
            Self::Window => ["win_row_facts", "win_query_gradients", "win_key_gradients", "win_add_parts"],
            Self::Visible => ["cmp_row_facts", "cmp_query_gradients", "cmp_key_gradients", "cmp_add_parts"],
        }
    }

    /// Positions from which any of the rows `keys` is seen, of which row 0 is that of token `shift`.
    fn positions(self, config: &NsaConfig, keys: Range<usize>, shift: usize) -> Range<usize> {
        match self {
            Self::Dense => keys.start + shift..usize::MAX,
            Self::Window => keys.start + shift..keys.end - 1 + shift + config.window(),
            Self::Visible => index::block_tokens(config, keys.start).end - 1..usize::MAX,
        }
    }

    /// Rows of queries that see any of each tile of `keys` keys, of sequences whose keys are `lies` rows.
    fn rows_of_tiles(self, config: &NsaConfig, packing: &Packing, lies: &CuSeqlens, keys: usize) -> Vec<usize> {
        let of_sequence = |(s, seq): (usize, Seq)| {
            let (rows, end) = (lies.range(s).len(), seq.end());
            (0..rows).step_by(keys).map(move |first| {
                let seen = self.positions(config, first..rows.min(first + keys), end.saturating_sub(rows));
                let [from, until] = [seen.start, seen.end].map(|position| position.clamp(seq.context, end));
                (until - from) * config.group_size()
            })
        };
        packing.seqs().enumerate().flat_map(of_sequence).collect()
    }
}

/// The tiles of keys of a call, and their parts.
struct Cut {
    tiles: GradientTiles,
    /// Tiles of keys, a KV head.
    count: usize,
    parts: Parts,
}

impl Cut {
    /// For elements of `size` bytes, of sequences whose keys lie as `offsets` says.
    fn new(
        span: Span,
        (config, packing): (&NsaConfig, &Packing),
        offsets: &CuSeqlens,
        size: usize,
        device: &Device,
    ) -> Self {
        let tiles = GradientTiles::banded(config, size, Unit::of(device.capability));
        let seen = span.rows_of_tiles(config, packing, offsets, tiles.rows());
        let parts = tiles.parts(&seen, config.num_kv_heads(), device.multiprocessors);
        Self { tiles, count: seen.len(), parts }
    }

    /// Numbers of what parts after the first of their tiles leave.
    fn partial_floats(&self, config: &NsaConfig) -> usize {
        (self.parts.most - 1) * self.count * config.num_kv_heads() * self.tiles.partial_floats(config)
    }
}

/// What every backward takes of a workspace.
pub(super) fn places_of_facts(needs: &Needs<'_>) -> Places {
    let mut places = Places::default();
    places.take_of::<RowFacts>(needs.packing.num_tokens() * needs.config.num_heads());
    places
}

/// What [`backward`] takes of a workspace.
pub(super) fn places(needs: &Needs<'_>, span: Span, offsets: &CuSeqlens) -> Places {
    let Needs { device, config, packing, .. } = needs;
    let mut places = places_of_facts(needs);
    let cut = Cut::new(span, (config, packing), offsets, needs.size(), device);
    places.take_of::<f32>(cut.partial_floats(config));
    places
}

/// Gradients of an operation whose queries see a run of keys each; sequences' keys lie as `offsets` says.
pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    span: Span,
    args: Backward<'_, T>,
    offsets: &CuSeqlens,
) -> Result<()> {
    let (config, packing) = (args.config, args.packing);
    let cut = Cut::new(span, (config, packing), offsets, size_of::<T>(), cuda.device());
    let Cut { tiles, count: of_keys, parts } = cut;
    check_tiles(cuda, op, config, (tiles.queries, tiles.shared_bytes()))?;
    let boxes = [tiles.boxes(config, true), tiles.unit.key_boxes(tiles.keys)];
    let prepared = prepare(cuda, op, args, offsets, (tiles.queries, tiles.rows()), boxes)?;
    let heads = config.num_kv_heads();
    let call = prepared.call.again(|constants| tiles.bake(bake_boxes(constants, boxes[0])));
    let mut partial = call.workspace::<f32>(cut.partial_floats(config))?;
    let params = BandBackward { partial: partial.written_by(), part_rows: parts.rows as i32, ..prepared.params };
    let [facts_name, of_queries_name, of_keys_name, add_name] = span.kernels();
    let launch = |name, geometry| call.launch(span.program(), name, geometry, params);
    launch(facts_name, prepared.facts_geometry())?;
    launch(of_queries_name, tiles.of_queries(prepared.queries.tiles, heads))?;
    launch(of_keys_name, tiles.of_keys(of_keys, heads, parts.most))?;
    if parts.most == 1 {
        return Ok(());
    }
    let grid = [(of_keys * heads) as u64, tiles.adders(config), 1];
    launch(add_name, Geometry { grid, threads: ADD_THREADS, shared_bytes: 0 })
}

impl GradientTiles {
    /// With the sizes of tiles.
    pub(super) fn bake(&self, constants: Constants) -> Constants {
        let constants =
            constants.with("WARPS", self.warps).with("QUERY_WARPS", self.query_warps).with("KEYS", self.keys);
        let constants = constants.with("QUERY_ROWS", self.query_rows).with("COPIED", self.copied);
        constants.unit(self.unit)
    }
}

/// What the gradients run.
pub(crate) fn builds(config: &NsaConfig, dtype: DType, unit: Unit) -> Vec<Build> {
    let size = dtype.size_bytes();
    let tiles = GradientTiles::banded(config, size, unit);
    let aligned = [&[0][..], &[0]];
    let constants = super::attention::copies_of(Constants::new(dtype).config(config), config, size, aligned, 0);
    let constants = bake_boxes(constants, tiles.boxes(config, true));
    let constants = tiles.bake(constants);
    let of_span = |span: Span| {
        let [facts, of_queries, of_keys, add] = span.kernels();
        let alone = |name, threads| Launched { name, threads, shared_bytes: 0 };
        let launched = |name, of: Geometry| Launched { name, threads: of.threads, shared_bytes: of.shared_bytes };
        let kernels = vec![
            alone(facts, FACTS_THREADS),
            launched(of_queries, tiles.of_queries(1, 1)),
            launched(of_keys, tiles.of_keys(1, 1, 1)),
            alone(add, ADD_THREADS),
        ];
        Build { program: span.program(), constants: constants.clone(), kernels }
    };
    [Span::Dense, Span::Window, Span::Visible].map(of_span).to_vec()
}
