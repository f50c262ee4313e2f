//! One decoding step. A [`Workspace`] holds what a step needs on the device besides its tensors: a table a layer of where the
//! caches lie, and what blocks of threads hand to each other. It is made once; then a step allocates nothing and waits for
//! nothing, and its launches can be captured into a CUDA graph, which serves every batch that the workspace holds:
//!
//! ```no_run
//! # use nsa_kernels::{Result, cuda::{Cuda, decode::{Capacity, Workspace}}, op::decode::{Cache, Step}};
//! # fn step(cuda: &Cuda, capacity: Capacity, config: &nsa_core::NsaConfig, caches: &[Cache<'_, f32>], args: Step<'_, f32>) -> Result<()> {
//! let mut workspace = Workspace::<f32>::new(cuda, config, capacity)?;
//! // Before each step: up to two copies to the device, see `Workspace::upload`.
//! let mut ready = workspace.upload(0, caches)?;
//! // Done now, or recorded (`Cuda::record`): two launches.
//! ready.launch(args.q, args.gates, args.o, args.block_indices)?;
//! # Ok(())
//! # }
//! ```

use super::Cuda;
use super::ahead::{Build, Launched};
use super::attention::unsupported;
use super::geometry::copy_bytes;
use super::geometry::decode::{DecodeSizes, columns};
use super::geometry::step::StepTiles;
use super::launch::Call;
use super::memory::{DeviceBuffer, Mirror};
use super::params::{In, Out, Params, Stored, params};
use super::placed::{self, PageTable, PageTables, aligned, room};
use super::program::{Constants, Program};
use crate::op::decode::{Cache, OP, RowsRead, Step};
use crate::{Element, Error, Result, Tensor, TensorMut};
use nsa_core::{DType, NsaConfig, ShapeError, index};
use std::marker::PhantomData;

/// The kernels.
pub(crate) static PROGRAM: Program =
    Program { file: "decode.cu", text: include_str!("kernels/decode.cu"), params: &[Decode::declaration] };

params! {
    /// Arguments of `decode_scan` and `decode_attend`.
    struct Decode {
        /// `[S, 3]`: tokens of the context, 0 for none; addresses of the rings of k^win and v^win.
        sequences: In<u64>,
        /// Addresses of pages: k̃ `[S, cmp_pages]` of `[CMP_PAGE_ROWS, G, Dk]`.
        k_cmp_pages: In<u64>,
        /// ṽ.
        v_cmp_pages: In<u64>,
        /// k^slc `[S, slc_pages]` of `[SLC_PAGE_ROWS, G, Dk]`.
        k_slc_pages: In<u64>,
        /// v^slc.
        v_slc_pages: In<u64>,
        /// `[S, Hq, Dk]`.
        q: In<Stored>,
        /// `[S, Hq, 3]`.
        gates: In<Stored>,
        /// `[S, Hq, Dv]`.
        o: Out<Stored>,
        /// `[S, G, n]`.
        block_indices: Out<i32>,
        /// `[S, G, splits, R, Dv]`.
        shares: Out<f32>,
        /// `[S, G, splits, R, 2]`: m and l.
        statistics: Out<f32>,
        /// `[S, G, cmp_splits, R, COLUMNS]`.
        folded: Out<f32>,
        /// `[S, G, candidates]`.
        importance: Out<f32>,
        /// `[S, G, cmp_splits, R]`.
        weights: Out<f32>,
        /// `[S, G, 2]`: blocks of threads that have come to an end, of either kernel; 0 between launches.
        arrived: Out<u32>,
        cmp_pages: i32,
        slc_pages: i32,
        cmp_splits: i32,
        win_splits: i32,
        slc_splits: i32,
        candidates: i32,
        /// scale · log2 e.
        scale_log2: f32,
    }
}

/// The batches that a workspace is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Layers, each with caches of its own.
    pub layers: usize,
    /// Sequences of a batch, at most.
    pub sequences: usize,
    /// Tokens of a context, at most.
    pub context: usize,
    /// Rows of a page of k̃ and ṽ.
    pub block_page_rows: usize,
    /// Rows of a page of k^slc and v^slc.
    pub token_page_rows: usize,
}

impl Capacity {
    /// Just for these caches, and as large ones in other layers.
    pub fn of<T>(layers: usize, caches: &[Cache<'_, T>]) -> Self {
        let rows = |pages: fn(&Cache<'_, T>) -> usize| caches.first().map_or(1, pages).max(1);
        Self {
            layers,
            sequences: caches.len(),
            context: caches.iter().map(|cache| cache.context).max().unwrap_or(0),
            block_page_rows: rows(|cache| cache.k_cmp.page_rows),
            token_page_rows: rows(|cache| cache.k_slc.page_rows),
        }
    }

    /// With room for more sequences and longer contexts, so that few workspaces are made while a text grows, and for what was
    /// there before, so that none is made again and again by batches that come in turns.
    fn with_room(self, before: Option<Self>) -> Self {
        let sizes = |capacity: Self| [capacity.sequences, capacity.context];
        let [sequences, context] = room(sizes(self), before.map(sizes));
        Self { sequences, context, ..self }
    }

    /// Whether a workspace of this capacity holds what asks for `other`.
    fn holds(&self, other: &Self) -> bool {
        let rows = |capacity: &Self| [capacity.block_page_rows, capacity.token_page_rows];
        let sizes = |capacity: &Self| [capacity.layers, capacity.sequences, capacity.context];
        rows(self) == rows(other) && sizes(self).iter().zip(sizes(other)).all(|(&has, asked)| has >= asked)
    }

    /// Pages of blocks and of tokens that a sequence has at most.
    fn pages(&self, config: &NsaConfig) -> [usize; 2] {
        let blocks = index::num_blocks(config, self.context);
        [blocks.div_ceil(self.block_page_rows), self.context.div_ceil(self.token_page_rows)]
    }

    /// The page tables of a layer: k̃, ṽ, k^slc, v^slc.
    fn tables(&self, config: &NsaConfig) -> [PageTable; 4] {
        let [blocks, tokens] = self.pages(config);
        let of = |arg, dim, page_rows, pages| PageTable { arg, dim, page_rows, pages };
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        [
            of("k_cmp", dim_k, self.block_page_rows, blocks),
            of("v_cmp", dim_v, self.block_page_rows, blocks),
            of("k_slc", dim_k, self.token_page_rows, tokens),
            of("v_slc", dim_v, self.token_page_rows, tokens),
        ]
    }
}

/// Numbers of a sequence besides its page tables.
const HEADER: usize = 3;

/// Bytes of device memory that a [`Workspace`] of elements `T` takes.
pub fn workspace_bytes<T: Element>(config: &NsaConfig, capacity: Capacity) -> usize {
    let tiles = StepTiles::new(config, size_of::<T>(), true);
    let sizes = DecodeSizes::new(config, &tiles, capacity.sequences, capacity.context);
    let of_sequence = HEADER + placed::addresses(&capacity.tables(config));
    sizes.bytes() + size_of::<u64>() * capacity.layers * capacity.sequences * of_sequence
}

/// Device memory of a decoding step, for batches up to a capacity.
#[derive(Debug)]
pub struct Workspace<T> {
    cuda: Cuda,
    config: NsaConfig,
    capacity: Capacity,
    tiles: StepTiles,
    sizes: DecodeSizes,
    floats: DeviceBuffer<f32>,
    arrived: DeviceBuffer<u32>,
    /// Of the sequences of all layers, `[layers, S, HEADER]`.
    headers: Mirror<u64>,
    pages: PageTables<4>,
    of: PhantomData<T>,
}

/// A workspace that knows where the caches of a batch lie in one layer.
#[derive(Debug)]
pub struct Ready<'w, T> {
    workspace: &'w mut Workspace<T>,
    layer: usize,
    rows_read: RowsRead,
}

impl<T: Element> Workspace<T> {
    /// Memory for batches up to `capacity`.
    ///
    /// # Errors
    /// If there is no such memory, a page has no rows, or there are no kernels for these sizes.
    pub fn new(cuda: &Cuda, config: &NsaConfig, capacity: Capacity) -> Result<Self> {
        let Capacity { block_page_rows, token_page_rows, context, .. } = capacity;
        if block_page_rows == 0 || token_page_rows == 0 || i32::try_from(context).is_err() {
            return Err(Error::Value {
                op: OP,
                arg: "capacity",
                value: format!("{capacity:?}"),
                rule: "must have pages of at least one row and a context that fits an i32",
            });
        }
        let tiles = StepTiles::new(config, size_of::<T>(), true);
        let device = cuda.device();
        if !tiles.fits(device.shared_bytes) {
            let (k, v) = (config.head_dim_qk(), config.head_dim_v());
            return Err(unsupported(cuda, OP, &format!("head dims {k} and {v}"), "use the backend `cpu`"));
        }
        let sizes = DecodeSizes::new(config, &tiles, capacity.sequences, capacity.context);
        let alone = sizes.blocks(config, &tiles, capacity.sequences) <= device.multiprocessors as u64;
        let tiles = if alone { tiles.alone(device.shared_bytes) } else { tiles };
        let Capacity { layers, sequences, .. } = capacity;
        Ok(Self {
            cuda: cuda.clone(),
            config: config.clone(),
            capacity,
            tiles,
            sizes,
            floats: DeviceBuffer::unwritten(cuda, sizes.floats.iter().sum())?,
            arrived: DeviceBuffer::zeros(cuda, sizes.counters)?,
            headers: Mirror::zeros(cuda, layers * sequences * HEADER)?,
            pages: PageTables::new(cuda, OP, capacity.tables(config), [layers, sequences])?,
            of: PhantomData,
        })
    }

    /// Whether a step of that capacity can use this workspace.
    fn serves(&self, cuda: &Cuda, config: &NsaConfig, capacity: &Capacity) -> bool {
        self.cuda.stream() == cuda.stream() && self.config == *config && self.capacity.holds(capacity)
    }

    /// Tells the device where the caches of layer `layer` are: [`Workspace::place`], then [`Workspace::send`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn upload<'w>(&'w mut self, layer: usize, caches: &'w [Cache<'_, T>]) -> Result<Ready<'w, T>> {
        let rows_read = self.place(layer, caches)?;
        self.send()?;
        Ok(Ready { workspace: self, layer, rows_read })
    }

    /// Notes where the caches of layer `layer` are. Sequences beyond them count as absent: launches write nothing for them. Returns
    /// the token-rows of K and V that a launch reads, one entry a sequence.
    ///
    /// # Errors
    /// If a cache does not hold the rows that its context asks for, is not in this device's memory, or the batch is beyond
    /// the capacity.
    pub fn place(&mut self, layer: usize, caches: &[Cache<'_, T>]) -> Result<RowsRead> {
        let Capacity { layers, sequences, context, .. } = self.capacity;
        ShapeError::check(OP, "layers", &[layers.max(layer + 1)], &[layers])?;
        ShapeError::check(OP, "caches", &[caches.len().min(sequences)], &[caches.len()])?;
        let mut headers = vec![0; HEADER * sequences];
        for (s, (cache, header)) in caches.iter().zip(headers.chunks_exact_mut(HEADER)).enumerate() {
            cache.check(&self.config, s)?;
            if cache.context > context {
                let arg = format!("context of sequence {s}");
                ShapeError::check(OP, &arg, &[context], &[cache.context])?;
            }
            let ring = |arg, ring, dim| self.ring(arg, ring, dim);
            let k = ring("k_win", &cache.k_win, self.config.head_dim_qk())?;
            header.copy_from_slice(&[cache.context as u64, k, ring("v_win", &cache.v_win, self.config.head_dim_v())?]);
        }
        let pages = caches.iter().map(|cache| [&cache.k_cmp, &cache.v_cmp, &cache.k_slc, &cache.v_slc]);
        self.pages.place(layer, &pages.collect::<Vec<_>>())?;
        self.headers.set(layer * headers.len(), &headers);
        Ok(caches.iter().map(|cache| rows_read(&self.config, cache.context)).collect())
    }

    /// Notes that the caches of layer `layer` are where they were noted last, with other contexts; none if these are more than the
    /// page tables or the workspace hold. Nothing is looked at page by page.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn place_again(&mut self, layer: usize, contexts: &[usize]) -> Result<Option<RowsRead>> {
        let Capacity { layers, sequences, context: most, .. } = self.capacity;
        ShapeError::check(OP, "layers", &[layers.max(layer + 1)], &[layers])?;
        let (first, len) = (layer * sequences * HEADER, sequences * HEADER);
        let mut headers = self.headers.host()[first..first + len].to_vec();
        // As many sequences as there were, none of them absent.
        let there = headers.chunks_exact(HEADER).take_while(|header| header[0] > 0).count();
        let fits = |(s, &context): (usize, &usize)| {
            let blocks = index::num_blocks(&self.config, context);
            (1..=most).contains(&context) && self.pages.hold(layer, s, [blocks, blocks, context, context])
        };
        if there != contexts.len() || !contexts.iter().enumerate().all(fits) {
            return Ok(None);
        }
        for (header, &context) in headers.chunks_exact_mut(HEADER).zip(contexts) {
            header[0] = context as u64;
        }
        self.headers.set(first, &headers);
        Ok(Some(contexts.iter().map(|&context| rows_read(&self.config, context)).collect()))
    }

    /// Tells the device what was noted since it was told before.
    ///
    /// Copied to the device, in the order of its work: three numbers a sequence and layer (its context and where its rings are), and
    /// page tables where a page is another one. Nothing is waited for.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn send(&mut self) -> Result<()> {
        self.headers.send(OP)?;
        self.pages.send()
    }

    fn ring(&self, arg: &'static str, ring: &Tensor<'_, T, 3>, dim: usize) -> Result<u64> {
        let address: In<Stored> = Call::new::<T>(&self.cuda, OP)?.input(arg, ring)?;
        aligned::<T>(&self.cuda, OP, (arg, dim), address.0)
    }

    fn params(&mut self, layer: usize) -> Decode {
        let sequences = self.capacity.sequences;
        let [blocks, tokens] = self.capacity.pages(&self.config);
        let pages = self.pages.of_layer(layer);
        let mut next = 0;
        let floats = self.sizes.floats.map(|len| {
            next += len;
            Out(self.floats.mem_mut(next - len..self.floats.len()).address(), PhantomData)
        });
        let [cmp_splits, win_splits, slc_splits] = self.sizes.splits.map(|count| count as i32);
        Decode {
            sequences: In(self.headers.address(layer * sequences * HEADER), PhantomData),
            k_cmp_pages: pages[0],
            v_cmp_pages: pages[1],
            k_slc_pages: pages[2],
            v_slc_pages: pages[3],
            q: In(0, PhantomData),
            gates: In(0, PhantomData),
            o: Out(0, PhantomData),
            block_indices: Out(0, PhantomData),
            shares: floats[0],
            statistics: floats[1],
            folded: floats[2],
            importance: floats[3],
            weights: floats[4],
            arrived: Out(self.arrived.mem_mut(0..self.sizes.counters).address(), PhantomData),
            cmp_pages: blocks as i32,
            slc_pages: tokens as i32,
            cmp_splits,
            win_splits,
            slc_splits,
            candidates: self.sizes.candidates as i32,
            scale_log2: (self.config.scale() * std::f64::consts::LOG2_E) as f32,
        }
    }
}

/// The constants of a call: pages of blocks and of tokens have so many rows, q and o these addresses.
fn bake(
    constants: Constants,
    config: &NsaConfig,
    (tiles, size): (&StepTiles, usize),
    page_rows: [usize; 2],
    [q, o]: [u64; 2],
) -> Constants {
    let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
    tiles
        .bake(constants.config(config), config, size, [q, o])
        .with("COLUMNS", columns(config, tiles))
        .with("CMP_PAGE_ROWS", page_rows[0])
        .with("SLC_PAGE_ROWS", page_rows[1])
        .with("QK_COPY_BYTES", copy_bytes(dim_k, size, &[]))
        .with("V_COPY_BYTES", copy_bytes(dim_v, size, &[]))
}

/// What a step runs, with pages as long as a selection block.
pub(crate) fn builds(config: &NsaConfig, dtype: DType) -> Vec<Build> {
    let tiles = StepTiles::new(config, dtype.size_bytes(), true);
    let page_rows = [config.select_block(); 2];
    let constants = bake(Constants::new(dtype), config, (&tiles, dtype.size_bytes()), page_rows, [0, 0]);
    let launched = |(name, bytes)| {
        let geometry = tiles.geometry(config, 1, bytes);
        Launched { name, threads: geometry.threads, shared_bytes: geometry.shared_bytes }
    };
    let kernels = [("decode_scan", tiles.scan_bytes()), ("decode_attend", tiles.attend_bytes())];
    vec![Build { program: &PROGRAM, constants, kernels: kernels.map(launched).to_vec() }]
}

/// Token-rows of K and V that a step reads of a context; the lists of all groups have the same number of tokens.
fn rows_read(config: &NsaConfig, context: usize) -> usize {
    let candidates = index::num_candidates(config, context - 1);
    let own = index::select_tokens(config, candidates - 1, context - 1).len();
    let selected = (candidates.min(config.select_count()) - 1) * config.select_block() + own;
    index::num_blocks(config, context) + selected + config.window().min(context)
}

impl<T: Element> Workspace<T> {
    /// Launches the step of layer `layer`: [`op::decode::step`](crate::op::decode::step) on the caches that the device was told of.
    /// Two kernels, and nothing else once they have been compiled.
    ///
    /// **Shapes**: `q` `[S, Hq, Dk]`, `gates` `[S, Hq, 3]`, `o` `[S, Hq, Dv]`, `block_indices` `[S, G, n]`, with S up to the
    /// capacity: in a graph, the most sequences of any batch that it will serve.
    ///
    /// # Errors
    /// If a shape does not fit, or the device refuses.
    pub fn launch(
        &mut self,
        layer: usize,
        q: Tensor<'_, T, 3>,
        gates: Tensor<'_, T, 3>,
        mut o: TensorMut<'_, T, 3>,
        mut block_indices: TensorMut<'_, i32, 3>,
    ) -> Result<()> {
        let Self { config, capacity, .. } = self;
        let ([seqs, ..], heads) = (q.shape(), config.num_heads());
        ShapeError::check(OP, "layers", &[capacity.layers.max(layer + 1)], &[capacity.layers])?;
        ShapeError::check(OP, "q", &[seqs.min(capacity.sequences)], &[seqs])?;
        q.check(OP, "q", [seqs, heads, config.head_dim_qk()])?;
        gates.check(OP, "gates", [seqs, heads, 3])?;
        o.check(OP, "o", [seqs, heads, config.head_dim_v()])?;
        block_indices.check(OP, "block_indices", [seqs, config.num_kv_heads(), config.select_count()])?;
        let cuda = self.cuda.clone();
        let call = Call::new::<T>(&cuda, OP)?;
        let params = Decode {
            q: call.input("q", &q)?,
            gates: call.input("gates", &gates)?,
            o: call.output("o", &mut o)?,
            block_indices: call.output("block_indices", &mut block_indices)?,
            ..self.params(layer)
        };
        let Self { config, capacity, tiles, sizes, .. } = &*self;
        let page_rows = [capacity.block_page_rows, capacity.token_page_rows];
        let addresses = [params.q.0, params.o.0];
        let call = call.constants(|constants| bake(constants, config, (tiles, size_of::<T>()), page_rows, addresses));
        let [cmp, win, slc] = sizes.splits;
        let scan = tiles.geometry(config, seqs * (cmp + win), tiles.scan_bytes());
        call.launch(&PROGRAM, "decode_scan", scan, params)?;
        call.launch(&PROGRAM, "decode_attend", tiles.geometry(config, seqs * slc, tiles.attend_bytes()), params)
    }
}

impl<T: Element> Ready<'_, T> {
    /// Launches the step: [`Workspace::launch`].
    ///
    /// # Errors
    /// Its.
    pub fn launch(
        &mut self,
        q: Tensor<'_, T, 3>,
        gates: Tensor<'_, T, 3>,
        o: TensorMut<'_, T, 3>,
        block_indices: TensorMut<'_, i32, 3>,
    ) -> Result<()> {
        self.workspace.launch(self.layer, q, gates, o, block_indices)
    }

    /// Token-rows of K and V that a launch reads, one entry a sequence.
    pub fn rows_read(&self) -> &[usize] {
        &self.rows_read
    }
}

/// The workspace, if it serves caches like these in so many layers, else a new one, which has room for what was before, too; and
/// whether it is a new one.
pub(crate) fn serving<'w, T: Element>(
    cuda: &Cuda,
    (workspace, layers): (&'w mut Option<Workspace<T>>, usize),
    config: &NsaConfig,
    caches: &[Cache<'_, T>],
) -> Result<(&'w mut Workspace<T>, bool)> {
    let asked = Capacity::of(layers, caches);
    let serves = |there: &Workspace<T>| there.serves(cuda, config, &asked);
    let make = |before| Workspace::new(cuda, config, asked.with_room(before));
    placed::serving(workspace, serves, |before| before.capacity, make)
}

/// See `op::decode::step_with`: makes the workspace anew when it is too small.
pub(crate) fn step<T: Element>(
    cuda: &Cuda,
    workspace: (&mut Option<Workspace<T>>, usize),
    layer: usize,
    args: Step<'_, T>,
) -> Result<RowsRead> {
    let Step { config, caches, q, gates, o, block_indices } = args;
    let (workspace, _) = serving(cuda, workspace, config, caches)?;
    let mut ready = workspace.upload(layer, caches)?;
    ready.launch(q, gates, o, block_indices)?;
    Ok(ready.rows_read)
}
