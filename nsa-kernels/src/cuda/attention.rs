//! What the kernels of the branches share on the host: how sequences and keys are described to them, and the sizes of
//! their tiles.

use super::ahead::{Build, Launched};
use super::geometry::step::StepTiles;
use super::geometry::{BandTiles, Geometry, KeptScores, SelectTiles, Unit, copy_bytes, vector};
use super::launch::Call;
use super::params::{Field, In, Out, Stored, params};
use super::program::{Constants, Program};
use super::tensor_map::{Boxes, TensorMap};
use super::workspace::Scratch;
use super::{Cuda, cmp, dense, slc, win};
use crate::{Element, Error, Pages, Result, Rows, Tensor, TensorMut};
use nsa_core::{CuSeqlens, DType, NsaConfig, Packing};
use std::marker::PhantomData;

params! {
    /// Arguments of `dense_forward` and `win_forward`.
    struct BandForward {
        /// k, if it comes in boxes.
        k_map: TensorMap,
        /// v likewise.
        v_map: TensorMap,
        /// `[N, Hq, Dk]`.
        q: In<Stored>,
        /// `[rows, G, Dk]`, if packed.
        k: In<Stored>,
        /// `[rows, G, Dv]`, if packed.
        v: In<Stored>,
        /// Addresses of pages `[PAGE_ROWS, G, Dk]`, if paged.
        k_pages: In<u64>,
        /// Addresses of pages `[PAGE_ROWS, G, Dv]`, if paged.
        v_pages: In<u64>,
        /// `[N, Hq, Dv]`.
        o: Out<Stored>,
        /// `[N, Hq]`.
        lse: Out<f32>,
        /// `[num_sequences, 6]`, see `Sequences`.
        sequences: In<i32>,
        /// Of all sequences, a KV head.
        tiles: i32,
        num_sequences: i32,
        /// scale · log2 e.
        scale_log2: f32,
        /// scale / scale_log2, as the sum of two numbers.
        unscale_high: f32,
        unscale_low: f32,
    }
}

impl Field for BandForward {
    fn cpp() -> String {
        "BandForwardParams".to_owned()
    }
}

impl BandForward {
    /// Without tensors and sequences.
    pub(super) fn of(config: &NsaConfig) -> Self {
        let scale_log2 = (config.scale() * std::f64::consts::LOG2_E) as f32;
        let unscale = config.scale() / f64::from(scale_log2);
        Self {
            k_map: TensorMap::none(),
            v_map: TensorMap::none(),
            q: In(0, PhantomData),
            k: In(0, PhantomData),
            v: In(0, PhantomData),
            k_pages: In(0, PhantomData),
            v_pages: In(0, PhantomData),
            o: Out(0, PhantomData),
            lse: Out(0, PhantomData),
            sequences: In(0, PhantomData),
            tiles: 0,
            num_sequences: 0,
            scale_log2,
            unscale_high: unscale as f32,
            unscale_low: (unscale - f64::from(unscale as f32)) as f32,
        }
    }
}

/// The error for something that kernels do not do.
pub(super) fn unsupported(cuda: &Cuda, op: &'static str, what: &str, advice: &'static str) -> Error {
    Error::Unsupported { op, backend: cuda.name(), what: what.to_owned(), advice }
}

/// Checks that tiles of so many queries, whose blocks of threads take so many bytes of shared memory, are what the device can have.
///
/// # Errors
/// If no block holds all heads of a group, or one takes more memory than the device gives it.
pub(super) fn check_tiles(
    cuda: &Cuda,
    op: &'static str,
    config: &NsaConfig,
    (queries, shared_bytes): (usize, usize),
) -> Result<()> {
    if queries > 0 && shared_bytes <= cuda.device().shared_bytes {
        return Ok(());
    }
    let (heads, dim_k, dim_v) = (config.group_size(), config.head_dim_qk(), config.head_dim_v());
    let what = format!("{heads} query heads a KV head with dims {dim_k} and {dim_v}");
    Err(unsupported(cuda, op, &what, "use the backend `cpu`"))
}

/// The tensors that every forward has, as the faces check them.
pub(super) struct Forward<'a, T: Element> {
    pub(super) config: &'a NsaConfig,
    pub(super) packing: &'a Packing,
    pub(super) q: Tensor<'a, T, 3>,
    pub(super) k: (&'static str, Rows<'a, T>),
    pub(super) v: (&'static str, Rows<'a, T>),
    pub(super) o: TensorMut<'a, T, 3>,
    pub(super) lse: TensorMut<'a, T::Acc, 2>,
}

/// What kernels know of the sequences: per sequence the row of its first query, queries, context, its first row of keys (or
/// place of its first page), rows of keys, tiles of the sequences before it.
pub(super) struct Sequences {
    table: Scratch<i32>,
    pub(super) tiles: usize,
}

impl Sequences {
    /// With `tiles_of(keys, queries)` tiles of a sequence; `keys` says where each one's rows of keys start and how many they
    /// are.
    pub(super) fn new(
        call: &Call<'_>,
        packing: &Packing,
        keys: &[(usize, usize)],
        tiles_of: impl Fn(usize, usize) -> usize,
    ) -> Result<Self> {
        let mut table = Vec::with_capacity(6 * keys.len());
        let mut tiles = 0;
        for (seq, &(first, rows)) in packing.seqs().zip(keys) {
            // All of them fit: the face has checked the sizes of sequences, and of what is packed.
            let row = [seq.rows.start, seq.rows.len(), seq.context, first, rows, tiles];
            table.extend(row.map(|number| number as i32));
            tiles += tiles_of(rows, seq.rows.len());
        }
        Ok(Self { table: call.upload(&table)?, tiles })
    }

    /// The table's address.
    pub(super) fn table(&self) -> In<i32> {
        self.table.read_by()
    }
}

/// Keys and values of a call: where they are, and per sequence its first row or page and its rows.
struct Keys {
    packed: [u64; 2],
    /// A multiple of what all of their addresses are multiples of.
    aligned: [u64; 2],
    pages: Option<[Scratch<u64>; 2]>,
    page_rows: usize,
    sequences: Vec<(usize, usize)>,
}

impl Keys {
    fn new<T: Element>(call: &Call<'_>, k: &(&str, Rows<'_, T>), v: &(&str, Rows<'_, T>)) -> Result<Self> {
        match (&k.1, &v.1) {
            (Rows::Packed { tensor: k_tensor, offsets }, Rows::Packed { tensor: v_tensor, offsets: v_offsets })
                if offsets == v_offsets =>
            {
                let k: In<Stored> = call.input(k.0, k_tensor)?;
                let v: In<Stored> = call.input(v.0, v_tensor)?;
                let (packed, sequences) = ([k.0, v.0], packed_sequences(offsets));
                Ok(Self { packed, aligned: packed, pages: None, page_rows: 0, sequences })
            }
            (Rows::Paged(k_tables), Rows::Paged(v_tables)) => Self::paged(call, (k.0, k_tables), (v.0, v_tables)),
            _ => {
                let advice = "pack both, or put both into pages";
                Err(unsupported(call.cuda(), call.op(), "keys and values that lie differently", advice))
            }
        }
    }

    fn paged<T: Element>(call: &Call<'_>, k: (&str, &[Pages<'_, T>]), v: (&str, &[Pages<'_, T>])) -> Result<Self> {
        let page_rows = k.1.first().map_or(1, |pages| pages.page_rows);
        if k.1.iter().chain(v.1).any(|pages| pages.page_rows != page_rows) {
            return Err(unsupported(call.cuda(), call.op(), "pages of several sizes", "use one number of rows a page"));
        }
        let addresses = |(arg, tables): (&str, &[Pages<'_, T>])| {
            let mut all = Vec::new();
            for pages in tables {
                for page in &pages.pages[..pages.len.div_ceil(page_rows)] {
                    all.push(page.on_device(call.op(), arg, call.cuda())?.address());
                }
            }
            let aligned = all.iter().fold(0, |bits, address| bits | address);
            Ok::<_, Error>((call.upload(&all)?, aligned))
        };
        let ((k_pages, k_aligned), (v_pages, v_aligned)) = (addresses(k)?, addresses(v)?);
        let mut first = 0;
        let place = |pages: &Pages<'_, T>| {
            let at = first;
            first += pages.len.div_ceil(page_rows);
            (at, pages.len)
        };
        let sequences = k.1.iter().map(place).collect();
        let pages = Some([k_pages, v_pages]);
        Ok(Self { packed: [0, 0], aligned: [k_aligned, v_aligned], pages, page_rows, sequences })
    }

    /// Addresses of the page tables.
    fn tables(&self) -> [In<u64>; 2] {
        [0, 1].map(|at| self.pages.as_ref().map_or(In(0, PhantomData), |pages| pages[at].read_by()))
    }
}

/// Where the rows of packed sequences start, and how many they are.
pub(super) fn packed_sequences(offsets: &CuSeqlens) -> Vec<(usize, usize)> {
    (0..offsets.num_seqs()).map(|s| (offsets.range(s).start, offsets.range(s).len())).collect()
}

/// A forward that is ready for its kernel.
pub(super) struct Prepared<'c> {
    pub(super) call: Call<'c>,
    pub(super) params: BandForward,
    pub(super) page_rows: usize,
    /// Kept until the kernel is launched: memory is given back in the order of the stream.
    keys: Keys,
    pub(super) sequences: Sequences,
}

/// Checks where the tensors are, and describes them to kernels with tiles of `queries` queries.
pub(super) fn prepare<'c, T: Element>(
    cuda: &'c Cuda,
    op: &'static str,
    args: Forward<'_, T>,
    queries: usize,
) -> Result<Prepared<'c>> {
    prepare_with(cuda, op, args, |_, of| of.div_ceil(queries))
}

/// The same with `tiles_of(keys, queries)` tiles of a sequence.
pub(super) fn prepare_with<'c, T: Element>(
    cuda: &'c Cuda,
    op: &'static str,
    args: Forward<'_, T>,
    tiles_of: impl Fn(usize, usize) -> usize,
) -> Result<Prepared<'c>> {
    let call = Call::new::<T>(cuda, op)?;
    let Forward { config, packing, q, k, v, mut o, mut lse } = args;
    let keys = Keys::new(&call, &k, &v)?;
    let sequences = Sequences::new(&call, packing, &keys.sequences, tiles_of)?;
    let [k_pages, v_pages] = keys.tables();
    let params = BandForward {
        q: call.input("q", &q)?,
        k: In(keys.packed[0], PhantomData),
        v: In(keys.packed[1], PhantomData),
        k_pages,
        v_pages,
        o: call.output("o", &mut o)?,
        lse: call.output("lse", &mut lse)?,
        sequences: sequences.table(),
        tiles: sequences.tiles as i32,
        num_sequences: packing.num_seqs() as i32,
        ..BandForward::of(config)
    };
    let page_rows = keys.page_rows;
    let addresses = [&[params.q.0, keys.aligned[0]][..], &[keys.aligned[1], params.o.0]];
    let call = call.constants(|constants| copies::<T>(constants.config(config), config, addresses, page_rows));
    Ok(Prepared { call, params, page_rows, keys, sequences })
}

impl Prepared<'_> {
    /// With other tiles of its sequences, for another kernel.
    pub(super) fn tiled_again(mut self, packing: &Packing, tiles_of: impl Fn(usize, usize) -> usize) -> Result<Self> {
        self.sequences = Sequences::new(&self.call, packing, &self.keys.sequences, tiles_of)?;
        self.params.sequences = self.sequences.table();
        self.params.tiles = self.sequences.tiles as i32;
        Ok(self)
    }

    /// The arguments of kernels that take keys, if they lie packed, in these boxes.
    ///
    /// # Errors
    /// If the driver cannot describe them.
    pub(super) fn params_of(&self, config: &NsaConfig, boxes: Option<Boxes>) -> Result<BandForward> {
        let Keys { packed: [k, v], pages, sequences, .. } = &self.keys;
        let boxes = boxes.filter(|_| pages.is_none());
        let rows = sequences.last().map_or(0, |(first, rows)| first + rows);
        let map = |address, dim| TensorMap::new(self.call.cuda(), address, [rows, config.num_kv_heads(), dim], boxes);
        let (k_map, v_map) = (map(*k, config.head_dim_qk())?, map(*v, config.head_dim_v())?);
        Ok(BandForward { k_map, v_map, ..self.params })
    }

    /// Launches a kernel of a run of keys a query, over its tiles of queries.
    ///
    /// # Errors
    /// Those of launches.
    pub(super) fn launch_band(
        &self,
        program: &'static Program,
        kernel: &'static str,
        config: &NsaConfig,
        tiles: &BandTiles,
    ) -> Result<()> {
        let geometry = tiles.geometry(self.sequences.tiles, config.num_kv_heads());
        let call = self.call.again(|constants| tiles.bake(constants));
        call.launch(program, kernel, geometry, self.params_of(config, tiles.unit.key_boxes(tiles.keys))?)
    }
}

/// With how rows are copied: those of dimension Dk at the first addresses, those of dimension Dv at the second ones.
pub(super) fn copies<T: Element>(
    constants: Constants,
    config: &NsaConfig,
    addresses: [&[u64]; 2],
    page_rows: usize,
) -> Constants {
    copies_of(constants, config, size_of::<T>(), addresses, page_rows)
}

/// The same of elements of `size` bytes.
pub(super) fn copies_of(
    constants: Constants,
    config: &NsaConfig,
    size: usize,
    [of_k, of_v]: [&[u64]; 2],
    page_rows: usize,
) -> Constants {
    let constants = constants.with("QK_COPY_BYTES", copy_bytes(config.head_dim_qk(), size, of_k));
    constants.with("V_COPY_BYTES", copy_bytes(config.head_dim_v(), size, of_v)).with("PAGE_ROWS", page_rows)
}

/// What the forwards run: on packed keys, with scores kept in the workspace.
pub(crate) fn builds(config: &NsaConfig, dtype: DType, unit: Unit) -> Vec<Build> {
    let size = dtype.size_bytes();
    let (band, compressed) = (BandTiles::new(config, size, unit), BandTiles::compressed(config, size, unit));
    // Of short sequences, and of long ones where those differ.
    let [short, long] = [0, usize::MAX].map(|longest| SelectTiles::new(config, size, unit, longest));
    let selects = if short == long { vec![long] } else { vec![short, long] };
    let constants = copies_of(Constants::new(dtype).config(config), config, size, [&[0], &[0]], 0);
    let build = |program: &'static Program, constants: &Constants, name: &'static str, geometry: Geometry| {
        let kernels = vec![Launched { name, threads: geometry.threads, shared_bytes: geometry.shared_bytes }];
        Build { program, constants: constants.clone(), kernels }
    };
    let scores = KeptScores::new(config, compressed, usize::MAX >> 32, (1, 0));
    let (banded, of_blocks) = (band.bake(constants.clone()), scores.bake(constants.clone()));
    let kept = Geometry { shared_bytes: scores.shared_bytes as u32, ..scores.tiles.geometry(1, 1) };
    let gated = banded.clone().with("VECTOR", vector(config.head_dim_v(), size, &[]));
    let step = StepTiles::new(config, size, false);
    let stepped = step.bake(constants.clone(), config, size, [0, 0]);
    let mut builds = vec![
        build(&dense::FORWARD, &banded, "dense_forward", band.geometry(1, 1)),
        build(&win::FORWARD, &banded, "win_forward", band.geometry(1, 1)),
        build(&dense::step::PROGRAM, &stepped, "dense_step", step.geometry(config, 1, step.attend_bytes())),
        build(&cmp::FORWARD, &of_blocks, "cmp_forward", kept),
        build(&win::GATED, &gated, "win_gate_forward", band.geometry(1, 1)),
    ];
    builds.extend(
        selects
            .iter()
            .map(|select| build(&slc::FORWARD, &select.bake(constants.clone()), "slc_forward", select.geometry(1, 1))),
    );
    builds
}

impl SelectTiles {
    /// With the sizes of tiles.
    pub(super) fn bake(&self, constants: Constants) -> Constants {
        let constants = constants.with("WARPS", self.warps).with("ROWS", self.rows).with("KEYS", self.keys);
        let constants = constants.with("STAGES", self.stages).with("QUERIES", self.queries);
        let constants =
            constants.with("QUERIES_HELD", usize::from(self.held)).with("JOINT_PERCENT", self.joint_percent);
        constants.unit(self.unit)
    }
}

impl StepTiles {
    /// With the sizes of tiles, for q and o at these addresses.
    pub(super) fn bake(&self, constants: Constants, config: &NsaConfig, size: usize, [q, o]: [u64; 2]) -> Constants {
        let constants = constants.with("PARTS", self.parts).with("TEAMS", self.teams).with("STAGES", self.stages);
        let constants = constants.with("KEYS", Self::KEYS).with("CHUNK", self.chunk);
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let wide = dim_v.is_multiple_of(4) && o.is_multiple_of(4 * size as u64);
        constants
            .with("QUERIES_HELD", usize::from(self.held))
            .with("QUERY_COPY_BYTES", copy_bytes(dim_k, size, &[q]))
            .with("OUTPUT_VECTOR", if wide { 4 } else { 1 })
    }
}

impl KeptScores {
    /// With the sizes of tiles, and what is kept of them.
    pub(super) fn bake(&self, constants: Constants) -> Constants {
        self.tiles.bake(constants).with("TWICE", usize::from(self.twice))
    }
}

impl BandTiles {
    /// With the sizes of tiles.
    pub(super) fn bake(&self, constants: Constants) -> Constants {
        let constants = constants.with("WARPS", self.warps).with("TILES", self.tiles).with("KEYS", self.keys);
        let constants = constants.with("COPIED", self.copied).with("QUERIES_HELD", usize::from(self.held));
        constants.unit(self.unit)
    }

    /// The tiles, if the device can have them.
    ///
    /// # Errors
    /// If not.
    pub(super) fn checked(self, cuda: &Cuda, op: &'static str, config: &NsaConfig) -> Result<Self> {
        check_tiles(cuda, op, config, (self.queries, self.shared_bytes))?;
        Ok(self)
    }
}
