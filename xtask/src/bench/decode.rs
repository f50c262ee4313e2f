//! The decoding step that is timed: one query of each sequence of a batch after its context, from caches in the memory of the
//! processor or the device. A device gets the steps of all layers as one graph, as programs that serve models do.

use anyhow::Result;
use nsa_core::{CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::cuda::Cuda;
use nsa_kernels::cuda::decode::{Capacity, Workspace};
use nsa_kernels::cuda::graph::Graph;
use nsa_kernels::cuda::workspace;
use nsa_kernels::op::{decode, dense};
use nsa_kernels::{Backend, Buffer, Element, Pages, Rows};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Instant;

/// Rows of a page of the caches.
const PAGE_ROWS: usize = 64;
/// Least seconds of steps in one sample.
const SAMPLE_S: f64 = 0.05;
/// Taken for the last cache's size where the system does not tell.
const USUAL_CACHE_BYTES: usize = 32 << 20;
/// No less than the second cache of any device so far.
const DEVICE_CACHE_BYTES: usize = 128 << 20;
/// More layers than this no model has: short contexts then stay in the processor's cache, as they would there.
const MAX_LAYERS: usize = 256;

/// What a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of the context of each, the query's own included.
    pub context: usize,
}

/// As many layers' caches as do not fit the processor's own cache, and room for the output of one.
pub struct Decoding<T: Element> {
    backend: Backend,
    config: NsaConfig,
    size: Size,
    packing: Packing,
    layers: Vec<Layer<T>>,
    gates: Buffer<T>,
    o: Buffer<T>,
    lse: Buffer<T::Acc>,
    block_indices: Buffer<i32>,
}

struct Layer<T> {
    q: Buffer<T>,
    /// One a sequence.
    sequences: Vec<Sequence<T>>,
}

/// A sequence's caches in a layer.
struct Sequence<T> {
    /// k̃, k^slc of all tokens (full attention's too), the ring of k^win; whole pages.
    k: [Buffer<T>; 3],
    v: [Buffer<T>; 3],
}

/// A step of every layer as a device's graph, and the memory that it uses.
pub struct Recorded<M> {
    graph: Graph,
    _memory: M,
}

/// Of NSA, and of full attention.
pub type RecordedNsa<T> = Recorded<Vec<Workspace<T>>>;
pub type RecordedDense = Recorded<workspace::Workspace>;

impl<M> Recorded<M> {
    /// Seconds of one of so many steps. Twice as many launches are waited for each time, so that waiting is no part of a step
    /// where few layers make a graph.
    fn seconds(&self, cuda: &Cuda, steps: usize) -> Result<f64> {
        let mut launches = 1;
        mean_of_steps(|| {
            (0..launches).try_for_each(|_| self.graph.launch())?;
            cuda.synchronize()?;
            launches *= 2;
            Ok(launches / 2 * steps)
        })
    }
}

/// Layers that a model needs so that neither NSA nor full attention finds its rows of the step before in the last cache.
pub fn layers(backend: &Backend, config: &NsaConfig, size: Size, element_bytes: usize) -> usize {
    let rows = index::decode_rows(config, size.context).min(size.context) as u64;
    let step_bytes = size.batch as f64 * super::work::row_bytes(config, rows, element_bytes);
    ((2.0 * last_cache_bytes(backend) as f64 / step_bytes).ceil() as usize).min(MAX_LAYERS)
}

/// Bytes of the caches of [`layers`] layers.
pub fn bytes(backend: &Backend, config: &NsaConfig, size: Size, element_bytes: usize) -> u64 {
    let rows = index::num_blocks(config, size.context) + size.context + config.window() + 2 * PAGE_ROWS;
    let layer = size.batch as f64 * super::work::row_bytes(config, rows as u64, element_bytes);
    (layer * layers(backend, config, size, element_bytes) as f64) as u64
}

fn last_cache_bytes(backend: &Backend) -> usize {
    if matches!(backend, Backend::Cuda(_)) {
        return DEVICE_CACHE_BYTES;
    }
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let kib = size.trim().strip_suffix('K').and_then(|kib| kib.parse::<usize>().ok());
    kib.map_or(USUAL_CACHE_BYTES, |kib| kib << 10)
}

impl<T: Element> Decoding<T> {
    /// Random caches and queries of [`layers`] layers.
    pub fn new(backend: &Backend, config: &NsaConfig, size: Size) -> Result<Self> {
        Self::with_layers(backend, config, size, layers(backend, config, size, size_of::<T>()))
    }

    /// The same of so many layers.
    pub fn with_layers(backend: &Backend, config: &NsaConfig, size: Size, layers: usize) -> Result<Self> {
        let Size { batch, context } = size;
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut random =
            |len: usize| -> Vec<T> { (0..len).map(|_| T::from_f64(rng.random_range(-1.7..1.7))).collect() };
        let rows = [index::num_blocks(config, context), context, config.window()];
        let paged = rows.map(|rows| rows.next_multiple_of(PAGE_ROWS));
        // What is read matters, not what it holds: layers and sequences are copies, each in its own memory.
        let (k, v) =
            (paged.map(|rows| random(rows * groups * dim_qk)), paged.map(|rows| random(rows * groups * dim_v)));
        let copies = |rows: &[Vec<T>; 3]| rows.each_ref().map(|rows| backend.upload(rows));
        let sequence = |_| Sequence { k: copies(&k), v: copies(&v) };
        let layer = |_| Layer {
            q: backend.upload(&random(batch * heads * dim_qk)),
            sequences: (0..batch).map(sequence).collect(),
        };
        Ok(Self {
            layers: (0..layers).map(layer).collect(),
            gates: backend.upload(&vec![T::from_f64(1.0 / 3.0); batch * heads * 3]),
            o: backend.alloc(batch * heads * dim_v),
            lse: backend.alloc(batch * heads),
            block_indices: backend.alloc(batch * groups * config.select_count()),
            packing: Packing::with_contexts(CuSeqlens::from_lengths(vec![1; batch])?, vec![context - 1; batch])?,
            backend: backend.clone(),
            config: config.clone(),
            size,
        })
    }

    /// Seconds of one step of NSA, the mean over rounds through all layers. On a device they are `recorded` at the first call.
    pub fn nsa(&mut self, recorded: &mut Option<RecordedNsa<T>>) -> Result<f64> {
        let Backend::Cuda(cuda) = self.backend.clone() else { return self.rounds(Self::nsa_step) };
        let recorded = match recorded {
            Some(recorded) => recorded,
            None => recorded.insert(self.record(&cuda)?),
        };
        recorded.seconds(&cuda, self.layers.len())
    }

    /// The same of full attention.
    pub fn dense(&mut self, recorded: &mut Option<RecordedDense>) -> Result<f64> {
        let Backend::Cuda(cuda) = self.backend.clone() else { return self.rounds(Self::dense_step) };
        let recorded = match recorded {
            Some(recorded) => recorded,
            None => recorded.insert(self.record_dense(&cuda)?),
        };
        recorded.seconds(&cuda, self.layers.len())
    }

    /// Runs where a model's steps run, so that no step waits for a thread to be told of it.
    fn rounds(&mut self, step: fn(&mut Self, usize) -> Result<()>) -> Result<f64> {
        let backend = self.backend.clone();
        backend.run(|| {
            let layers = self.layers.len();
            mean_of_steps(|| {
                (0..layers).try_for_each(|layer| step(self, layer))?;
                self.backend.synchronize()?;
                Ok(layers)
            })
        })
    }

    fn record(&mut self, cuda: &Cuda) -> Result<RecordedNsa<T>> {
        let Self { config, size, layers, gates, o, block_indices, .. } = self;
        let caches: Vec<_> = layers.iter().map(|layer| layer.caches(config, size.context)).collect::<Result<_>>()?;
        let capacity = Capacity::of(1, &caches[0]);
        let made = caches.iter().map(|_| Workspace::new(cuda, config, capacity));
        let mut workspaces: Vec<Workspace<T>> = made.collect::<nsa_kernels::Result<_>>()?;
        let readied = workspaces.iter_mut().zip(&caches).map(|(workspace, caches)| workspace.upload(0, caches));
        let mut ready = readied.collect::<nsa_kernels::Result<Vec<_>>>()?;
        let (batch, heads, groups) = (size.batch, config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v, count) = (config.head_dim_qk(), config.head_dim_v(), config.select_count());
        let mut steps = || {
            ready.iter_mut().zip(layers.iter()).try_for_each(|(ready, layer)| {
                let (q, gates) = (layer.q.tensor([batch, heads, dim_qk])?, gates.tensor([batch, heads, 3])?);
                let (o, lists) = (o.tensor_mut([batch, heads, dim_v])?, [batch, groups, count]);
                ready.launch(q, gates, o, block_indices.tensor_mut(lists)?)
            })
        };
        steps()?;
        let graph = cuda.record(steps)?;
        drop(ready);
        drop(caches);
        Ok(Recorded { graph, _memory: workspaces })
    }

    fn record_dense(&mut self, cuda: &Cuda) -> Result<RecordedDense> {
        let mut workspace = workspace::Workspace::new(cuda);
        let mut steps = || (0..self.layers.len()).try_for_each(|layer| self.attend_all(layer));
        cuda.with_workspace(&mut workspace, &mut steps)?;
        let graph = cuda.record(|| cuda.with_workspace(&mut workspace, &mut steps))?;
        Ok(Recorded { graph, _memory: workspace })
    }

    /// One step of NSA in one layer.
    pub fn nsa_step(&mut self, layer: usize) -> Result<()> {
        let (config, layer) = (&self.config, &self.layers[layer]);
        let (batch, heads, groups) = (self.size.batch, config.num_heads(), config.num_kv_heads());
        let args = decode::Step {
            config,
            caches: &layer.caches(config, self.size.context)?,
            q: layer.q.tensor([batch, heads, config.head_dim_qk()])?,
            gates: self.gates.tensor([batch, heads, 3])?,
            o: self.o.tensor_mut([batch, heads, config.head_dim_v()])?,
            block_indices: self.block_indices.tensor_mut([batch, groups, config.select_count()])?,
        };
        decode::step(&self.backend, args)?;
        Ok(())
    }

    /// One step of full attention in one layer.
    pub fn dense_step(&mut self, layer: usize) -> Result<()> {
        Ok(self.attend_all(layer)?)
    }

    fn attend_all(&mut self, layer: usize) -> nsa_kernels::Result<()> {
        let (config, layer) = (&self.config, &self.layers[layer]);
        let Size { batch, context } = self.size;
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let rows = |of: fn(&Sequence<T>) -> &Buffer<T>, dim: usize| -> nsa_kernels::Result<Vec<Pages<'_, T>>> {
            layer.sequences.iter().map(|sequence| pages(of(sequence), context, [groups, dim])).collect()
        };
        let (k, v) = (rows(|sequence| &sequence.k[1], dim_qk)?, rows(|sequence| &sequence.v[1], dim_v)?);
        let args = dense::Forward {
            config,
            packing: &self.packing,
            q: layer.q.tensor([batch, heads, dim_qk])?,
            k: Rows::Paged(&k),
            v: Rows::Paged(&v),
            o: self.o.tensor_mut([batch, heads, dim_v])?,
            lse: self.lse.tensor_mut([batch, heads])?,
        };
        dense::forward(&self.backend, args)
    }
}

impl<T: Element> Layer<T> {
    /// The caches that a step of NSA reads, one a sequence.
    fn caches(&self, config: &NsaConfig, context: usize) -> Result<Vec<decode::Cache<'_, T>>> {
        self.sequences.iter().map(|sequence| sequence.cache(config, context)).collect()
    }
}

impl<T: Element> Sequence<T> {
    fn cache(&self, config: &NsaConfig, context: usize) -> Result<decode::Cache<'_, T>> {
        let (groups, window, blocks) = (config.num_kv_heads(), config.window(), index::num_blocks(config, context));
        let (k_row, v_row) = ([groups, config.head_dim_qk()], [groups, config.head_dim_v()]);
        Ok(decode::Cache {
            context,
            k_cmp: pages(&self.k[0], blocks, k_row)?,
            v_cmp: pages(&self.v[0], blocks, v_row)?,
            k_slc: pages(&self.k[1], context, k_row)?,
            v_slc: pages(&self.v[1], context, v_row)?,
            k_win: self.k[2].tensor([window, groups, config.head_dim_qk()])?,
            v_win: self.v[2].tensor([window, groups, config.head_dim_v()])?,
        })
    }
}

/// Seconds of a step, the mean over rounds, each of which says how many it was.
fn mean_of_steps(mut round: impl FnMut() -> Result<usize>) -> Result<f64> {
    let (start, mut steps) = (Instant::now(), 0);
    loop {
        steps += round()?;
        let seconds = start.elapsed().as_secs_f64();
        if seconds >= SAMPLE_S {
            return Ok(seconds / steps as f64);
        }
    }
}

/// The first `rows` rows of a cache.
fn pages<T: Element>(data: &Buffer<T>, rows: usize, row_shape: [usize; 2]) -> nsa_kernels::Result<Pages<'_, T>> {
    let page = |at| data.mem_at(at * PAGE_ROWS * row_shape[0] * row_shape[1]);
    let pages = (0..rows.div_ceil(PAGE_ROWS)).map(page).collect::<nsa_kernels::Result<_>>()?;
    Ok(Pages { pages, page_rows: PAGE_ROWS, len: rows, row_shape })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    fn config() -> NsaConfig {
        NsaConfig::builder(6, 2, 24, 16).compress_kind(CompressKind::Mean).build().expect("valid")
    }

    #[test]
    fn layers_exceed_the_last_cache() {
        let backend = Backend::pick(None).expect("a backend").0;
        for (batch, context) in [(1, 4096), (1, 70_000), (3, 4096), (5, 70_000)] {
            let (size, rows) = (Size { batch, context }, index::decode_rows(&config(), context).min(context));
            let read = layers(&backend, &config(), size, 4) * batch * rows * 2 * (24 + 16) * 4;
            assert!(read >= 2 * last_cache_bytes(&backend), "{size:?}");
            assert!(bytes(&backend, &config(), size, 4) > 2 * last_cache_bytes(&backend) as u64, "{size:?}");
        }
        assert_eq!(layers(&backend, &config(), Size { batch: 1, context: 1 }, 4), MAX_LAYERS);
        assert_eq!(layers(&backend, &config(), Size { batch: 1 << 20, context: 4096 }, 4), 1);
    }

    type Step = fn(&mut Decoding<f32>) -> Result<f64>;
    const STEPS: [Step; 2] = [|decoding| decoding.nsa(&mut None), |decoding| decoding.dense(&mut None)];

    /// Runs steps of a batch, and then each of its sequences alone in the last layer.
    fn a_sequence_of_a_batch_is_as_alone(backend: &Backend, size: Size) {
        let (q_len, o_len) = (6 * 24, 6 * 16);
        let of = |batch| Decoding::<f32>::with_layers(backend, &config(), Size { batch, ..size }, 2).expect("fits");
        let (mut decoding, mut alone) = (of(size.batch), of(1));
        let mut q = vec![0.0; size.batch * q_len];
        decoding.layers[1].q.read(&mut q).expect("there");
        for step in STEPS {
            let run = |decoding: &mut Decoding<f32>| {
                let mut o = vec![f32::NAN; decoding.size.batch * o_len];
                decoding.o.write(&o).expect("room");
                assert!(step(decoding).expect("runs") > 0.0);
                decoding.o.read(&mut o).expect("written");
                assert!(o.iter().all(|o| o.is_finite() && *o != 0.0), "{size:?}");
                o
            };
            let together = run(&mut decoding);
            for (q, o) in q.chunks(q_len).zip(together.chunks(o_len)) {
                alone.layers[1].q.write(q).expect("room");
                assert_eq!(run(&mut alone), o, "{size:?}");
            }
        }
    }

    #[test]
    fn steps_run_at_odd_contexts() {
        let backend = Backend::pick(None).expect("a backend").0;
        for (batch, context) in [(1, 1), (1, 31), (3, 1), (3, 33), (3, 700)] {
            a_sequence_of_a_batch_is_as_alone(&backend, Size { batch, context });
        }
    }

    #[test]
    fn graphs_of_steps_run_on_a_device() {
        nsa_tests::sim::on_simulator("bench::decode::tests::graphs_of_steps_run_on_a_device", || {
            let backend = Backend::cuda(0).expect("the simulator");
            for (batch, context) in [(1, 31), (3, 700)] {
                a_sequence_of_a_batch_is_as_alone(&backend, Size { batch, context });
            }
        });
    }
}
