//! Steps of full attention: queries that are their sequences' only ones, whose keys are cut into chunks for blocks of threads of their
//! own. Where the caches of a batch lie can be told before ([`Workspace`]), so that launches are the same from step to step.

use crate::cuda::attention::{BandForward, Prepared, copies_of, unsupported};
use crate::cuda::geometry::step::StepTiles;
use crate::cuda::launch::Call;
use crate::cuda::memory::{DeviceBuffer, Mirror};
use crate::cuda::params::{In, Out, Params, params};
use crate::cuda::placed::{self, PageTable, PageTables, room};
use crate::cuda::program::Program;
use crate::cuda::workspace::Needs;
use crate::cuda::{Cuda, Device};
use crate::op::decode::RowsRead;
use crate::op::dense::{Cache, OP_STEP};
use crate::{Element, Result, Tensor, TensorMut};
use nsa_core::{NsaConfig, ShapeError};
use std::marker::PhantomData;

/// The kernel.
pub(crate) static PROGRAM: Program = Program {
    file: "dense_step.cu",
    text: include_str!("../kernels/dense_step.cu"),
    params: &[BandForward::declaration, DenseStep::declaration],
};

params! {
    /// Arguments of `dense_step`.
    struct DenseStep {
        /// What every forward has; tiles are chunks of the keys of sequences of one query.
        common: BandForward,
        /// `[G, chunks, R, Dv]`.
        shares: Out<f32>,
        /// `[G, chunks, R, 2]`: m and l.
        statistics: Out<f32>,
        /// `[G, chunks, parts of the group]`: shares that have come to be joined; zeros before and after.
        arrived: Out<u32>,
    }
}

/// Whether a sequence of so many queries is cut into chunks of its keys.
pub(super) fn is_step(tiles: &StepTiles, queries: usize, device: &Device) -> bool {
    queries == 1 && tiles.fits(device.shared_bytes)
}

/// Numbers of shares, their statistics, and those that count what has come, of so many chunks.
pub(super) fn lens(config: &NsaConfig, tiles: &StepTiles, chunks: usize) -> [usize; 3] {
    let heads = chunks * config.num_heads();
    [heads * config.head_dim_v(), heads * 2, chunks * config.num_kv_heads() * tiles.group_parts(config)]
}

/// With as much under way at once as there is room for.
fn deepened(tiles: StepTiles, config: &NsaConfig, chunks: usize, device: &Device) -> StepTiles {
    let blocks = tiles.geometry(config, chunks, 0).grid[0];
    if blocks <= device.multiprocessors as u64 { tiles.alone(device.shared_bytes) } else { tiles }
}

/// Launches the kernel over the chunks that are prepared.
pub(super) fn launch<T: Element>(
    cuda: &Cuda,
    config: &NsaConfig,
    tiles: StepTiles,
    prepared: Prepared<'_>,
) -> Result<()> {
    let chunks = prepared.sequences.tiles;
    let (call, common) = (&prepared.call, prepared.params);
    let [of_shares, of_statistics, of_arrived] = lens(config, &tiles, chunks);
    let (mut shares, mut statistics) = (call.workspace::<f32>(of_shares)?, call.workspace::<f32>(of_statistics)?);
    let mut arrived = call.zeros::<u32>(of_arrived)?;
    let params = DenseStep {
        common,
        shares: shares.written_by(),
        statistics: statistics.written_by(),
        arrived: arrived.written_by(),
    };
    let tiles = deepened(tiles, config, chunks, cuda.device());
    launch_chunks::<T>(call, config, &tiles, chunks, params)
}

fn launch_chunks<T: Element>(
    call: &Call<'_>,
    config: &NsaConfig,
    tiles: &StepTiles,
    chunks: usize,
    params: DenseStep,
) -> Result<()> {
    let addresses = [params.common.q.0, params.common.o.0];
    let call = call.again(|constants| tiles.bake(constants, config, size_of::<T>(), addresses));
    call.launch(&PROGRAM, "dense_step", tiles.geometry(config, chunks, tiles.attend_bytes()), params)
}

/// The batches that a workspace is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capacity {
    /// Layers, each with caches of its own.
    layers: usize,
    /// Sequences of a batch, at most.
    sequences: usize,
    /// Tokens of a context, at most.
    context: usize,
    page_rows: usize,
}

impl Capacity {
    fn holds(&self, other: &Self) -> bool {
        let sizes = |capacity: &Self| [capacity.layers, capacity.sequences, capacity.context];
        self.page_rows == other.page_rows && sizes(self).iter().zip(sizes(other)).all(|(&has, asked)| has >= asked)
    }

    /// Chunks of as many sequences with as long contexts.
    fn chunks(&self, tiles: &StepTiles) -> usize {
        self.sequences * tiles.splits(self.context)
    }

    /// The page tables of a layer.
    fn tables(&self, config: &NsaConfig) -> [PageTable; 2] {
        let &Self { context, page_rows, .. } = self;
        let of = |arg, dim| PageTable { arg, dim, page_rows, pages: context.div_ceil(page_rows) };
        [of("k", config.head_dim_qk()), of("v", config.head_dim_v())]
    }
}

/// Bytes of the workspace of steps of so many layers whose caches are placed, of sequences as long as these are, in pages of so many
/// rows.
pub(in crate::cuda) fn workspace_bytes(needs: &Needs<'_>, layers: usize, page_rows: usize) -> usize {
    let Needs { config, packing, .. } = *needs;
    let longest = packing.seqs().map(|seq| seq.end()).max().unwrap_or(0);
    let [sequences, context] = room([packing.num_seqs(), longest], None);
    let capacity = Capacity { layers, sequences, context, page_rows: page_rows.max(1) };
    let tiles = StepTiles::new(config, needs.size(), false);
    let of_chunks = size_of::<f32>() * lens(config, &tiles, capacity.chunks(&tiles)).iter().sum::<usize>();
    let of_pages = size_of::<u64>() * placed::addresses(&capacity.tables(config));
    of_chunks + layers * sequences * (size_of::<i32>() * HEADER + of_pages)
}

/// Numbers of a sequence in the table of a layer (`kernels/sequence.cuh`).
const HEADER: usize = 6;

/// Device memory of steps for batches up to a capacity, and where their caches lie.
#[derive(Debug)]
pub(crate) struct Workspace<T> {
    cuda: Cuda,
    config: NsaConfig,
    capacity: Capacity,
    tiles: StepTiles,
    shares: DeviceBuffer<f32>,
    statistics: DeviceBuffer<f32>,
    arrived: DeviceBuffer<u32>,
    /// Of each layer the sequences, `[layers, S, HEADER]`, each with as many chunks as the longest context.
    headers: Mirror<i32>,
    pages: PageTables<2>,
    of: PhantomData<T>,
}

impl<T: Element> Workspace<T> {
    fn new(cuda: &Cuda, config: &NsaConfig, capacity: Capacity) -> Result<Self> {
        let Capacity { layers, sequences, .. } = capacity;
        let tiles = StepTiles::new(config, size_of::<T>(), false);
        if !tiles.fits(cuda.device().shared_bytes) {
            let what = format!("head dims {} and {}", config.head_dim_qk(), config.head_dim_v());
            return Err(unsupported(cuda, OP_STEP, &what, "use `dense::forward`"));
        }
        let chunks = capacity.chunks(&tiles);
        let [of_shares, of_statistics, of_arrived] = lens(config, &tiles, chunks);
        Ok(Self {
            cuda: cuda.clone(),
            config: config.clone(),
            capacity,
            tiles: deepened(tiles, config, chunks, cuda.device()),
            shares: DeviceBuffer::unwritten(cuda, of_shares)?,
            statistics: DeviceBuffer::unwritten(cuda, of_statistics)?,
            arrived: DeviceBuffer::zeros(cuda, of_arrived)?,
            headers: Mirror::zeros(cuda, layers * sequences * HEADER)?,
            pages: PageTables::new(cuda, OP_STEP, capacity.tables(config), [layers, sequences])?,
            of: PhantomData,
        })
    }

    /// Bytes of its memory.
    pub(crate) fn bytes(&self) -> usize {
        let of_chunks = self.shares.len() + self.statistics.len() + self.arrived.len();
        size_of::<f32>() * of_chunks + size_of_val(self.headers.host()) + self.pages.bytes()
    }

    /// Notes where the caches of a layer are, which have been checked.
    pub(crate) fn place(&mut self, layer: usize, caches: &[Cache<'_, T>]) -> Result<()> {
        let pages = caches.iter().map(|cache| [&cache.k, &cache.v]).collect::<Vec<_>>();
        self.pages.place(layer, &pages)?;
        self.note(layer, caches.iter().map(|cache| cache.k.len));
        Ok(())
    }

    /// Notes that they are where they were noted last, with other contexts, which it returns; none if they cannot be.
    pub(crate) fn place_again(&mut self, layer: usize, contexts: &[usize]) -> Result<Option<RowsRead>> {
        let Capacity { layers, context: most, .. } = self.capacity;
        ShapeError::check(OP_STEP, "layers", &[layers.max(layer + 1)], &[layers])?;
        let there = self.headers_of(layer).chunks_exact(HEADER).take_while(|header| header[1] > 0).count();
        let fits = |(s, &context): (usize, &usize)| {
            (1..=most).contains(&context) && self.pages.hold(layer, s, [context, context])
        };
        let again = there == contexts.len() && contexts.iter().enumerate().all(fits);
        if again {
            self.note(layer, contexts.iter().copied());
        }
        Ok(again.then(|| contexts.to_vec()))
    }

    fn headers_of(&self, layer: usize) -> &[i32] {
        let len = self.capacity.sequences * HEADER;
        &self.headers.host()[layer * len..][..len]
    }

    /// Notes the sequences of a layer: those that are none have no keys, but chunks, by which sequences are found.
    fn note(&mut self, layer: usize, contexts: impl Iterator<Item = usize>) {
        let Capacity { sequences, context: most, page_rows, .. } = self.capacity;
        let (chunks, pages) = (self.tiles.splits(most), most.div_ceil(page_rows));
        let headers = contexts.map(Some).chain(std::iter::repeat(None)).take(sequences).enumerate();
        let header = |(s, context): (usize, Option<usize>)| {
            let [queries, before, keys] = context.map_or([0; 3], |context| [1, context - 1, context]);
            // All of them fit: chunks and pages of a workspace do, as its memory does.
            [s, queries, before, s * pages, keys, s * chunks].map(|number| number as i32)
        };
        let headers: Vec<i32> = headers.flat_map(header).collect();
        self.headers.set(layer * headers.len(), &headers);
    }

    /// Tells the device what was noted since it was told before.
    pub(crate) fn send(&mut self) -> Result<()> {
        self.headers.send(OP_STEP)?;
        self.pages.send()
    }

    /// Launches the step of a layer, of as many sequences as there are queries.
    pub(crate) fn launch(
        &mut self,
        layer: usize,
        q: Tensor<'_, T, 3>,
        mut o: TensorMut<'_, T, 3>,
        mut lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()> {
        let Capacity { layers, sequences, context, page_rows } = self.capacity;
        let ([seqs, ..], heads) = (q.shape(), self.config.num_heads());
        q.check(OP_STEP, "q", [seqs, heads, self.config.head_dim_qk()])?;
        o.check(OP_STEP, "o", [seqs, heads, self.config.head_dim_v()])?;
        lse.check(OP_STEP, "lse", [seqs, heads])?;
        ShapeError::check(OP_STEP, "layers", &[layers.max(layer + 1)], &[layers])?;
        ShapeError::check(OP_STEP, "q", &[seqs.min(sequences)], &[seqs])?;
        let cuda = self.cuda.clone();
        let call = Call::new::<T>(&cuda, OP_STEP)?;
        let (config, of_sequence) = (&self.config, self.tiles.splits(context));
        let [k_pages, v_pages] = self.pages.of_layer(layer);
        let common = BandForward {
            q: call.input("q", &q)?,
            k_pages,
            v_pages,
            o: call.output("o", &mut o)?,
            lse: call.output("lse", &mut lse)?,
            sequences: In(self.headers.address(layer * sequences * HEADER), PhantomData),
            tiles: (sequences * of_sequence) as i32,
            num_sequences: seqs as i32,
            ..BandForward::of(config)
        };
        let [of_shares, of_statistics, of_arrived] = lens(config, &self.tiles, sequences * of_sequence);
        let params = DenseStep {
            common,
            shares: Out(self.shares.mem_mut(0..of_shares).address(), PhantomData),
            statistics: Out(self.statistics.mem_mut(0..of_statistics).address(), PhantomData),
            arrived: Out(self.arrived.mem_mut(0..of_arrived).address(), PhantomData),
        };
        // Rows of pages were found to lie as every copy wants.
        let copies = |constants| copies_of(constants, config, size_of::<T>(), [&[], &[]], page_rows);
        let call = call.constants(|constants| copies(constants.config(config)));
        launch_chunks::<T>(&call, config, &self.tiles, seqs * of_sequence, params)
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
    let context = caches.iter().map(|cache| cache.k.len).max().unwrap_or(0);
    let page_rows = caches.first().map_or(1, |cache| cache.k.page_rows);
    let asked = Capacity { layers, sequences: caches.len(), context, page_rows };
    let serves = |there: &Workspace<T>| {
        there.cuda.stream() == cuda.stream() && there.config == *config && there.capacity.holds(&asked)
    };
    let make = |before| {
        let [sequences, context] = room([asked.sequences, asked.context], before);
        Workspace::new(cuda, config, Capacity { sequences, context, ..asked })
    };
    placed::serving(workspace, serves, |before| [before.capacity.sequences, before.capacity.context], make)
}
