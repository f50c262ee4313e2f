//! The decoding step that is timed: one query after a context, from caches in the memory of the processor or the device.
//! A device gets the steps of all layers as one graph, as programs that serve models do.

use anyhow::Result;
use nsa_core::{CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::cuda::Cuda;
use nsa_kernels::cuda::decode::{Capacity, Workspace};
use nsa_kernels::cuda::graph::Graph;
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

/// As many layers' caches as do not fit the processor's own cache, and room for the output of one.
pub struct Decoding<T: Element> {
    backend: Backend,
    config: NsaConfig,
    context: usize,
    packing: Packing,
    layers: Vec<Layer<T>>,
    gates: Buffer<T>,
    o: Buffer<T>,
    lse: Buffer<T::Acc>,
    block_indices: Buffer<i32>,
}

struct Layer<T> {
    q: Buffer<T>,
    /// k̃, k^slc of all tokens (full attention's too), the ring of k^win; whole pages.
    k: [Buffer<T>; 3],
    v: [Buffer<T>; 3],
}

/// A step of every layer as a device's graph, and the memory that it uses.
pub struct Recorded<T> {
    graph: Graph,
    _workspaces: Vec<Workspace<T>>,
}

/// Layers that a model needs so that neither NSA nor full attention finds its rows of the step before in the last cache.
pub fn layers(backend: &Backend, config: &NsaConfig, context: usize, element_bytes: usize) -> usize {
    let rows = index::decode_rows(config, context).min(context) as u64;
    let step_bytes = super::work::row_bytes(config, rows, element_bytes);
    ((2.0 * last_cache_bytes(backend) as f64 / step_bytes).ceil() as usize).min(MAX_LAYERS)
}

/// Bytes of the caches of [`layers`] layers.
pub fn bytes(backend: &Backend, config: &NsaConfig, context: usize, element_bytes: usize) -> u64 {
    let rows = index::num_blocks(config, context) + context + config.window() + 2 * PAGE_ROWS;
    let layer = super::work::row_bytes(config, rows as u64, element_bytes);
    (layer * layers(backend, config, context, element_bytes) as f64) as u64
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
    pub fn new(backend: &Backend, config: &NsaConfig, context: usize) -> Result<Self> {
        Self::with_layers(backend, config, context, layers(backend, config, context, size_of::<T>()))
    }

    /// The same of so many layers.
    pub fn with_layers(backend: &Backend, config: &NsaConfig, context: usize, layers: usize) -> Result<Self> {
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut random =
            |len: usize| -> Vec<T> { (0..len).map(|_| T::from_f64(rng.random_range(-1.7..1.7))).collect() };
        let rows = [index::num_blocks(config, context), context, config.window()];
        let paged = rows.map(|rows| rows.next_multiple_of(PAGE_ROWS));
        // What is read matters, not what it holds: the layers are copies, each in its own memory.
        let (k, v) =
            (paged.map(|rows| random(rows * groups * dim_qk)), paged.map(|rows| random(rows * groups * dim_v)));
        let copies = |rows: &[Vec<T>; 3]| rows.each_ref().map(|rows| backend.upload(rows));
        let layer = |_| Layer { q: backend.upload(&random(heads * dim_qk)), k: copies(&k), v: copies(&v) };
        Ok(Self {
            layers: (0..layers).map(layer).collect(),
            gates: backend.upload(&vec![T::from_f64(1.0 / 3.0); heads * 3]),
            o: backend.alloc(heads * dim_v),
            lse: backend.alloc(heads),
            block_indices: backend.alloc(groups * config.select_count()),
            packing: Packing::with_contexts(CuSeqlens::single(1)?, vec![context - 1])?,
            backend: backend.clone(),
            config: config.clone(),
            context,
        })
    }

    /// Seconds of one step of NSA, the mean over rounds through all layers. On a device they are `recorded` at the first call.
    pub fn nsa(&mut self, recorded: &mut Option<Recorded<T>>) -> Result<f64> {
        let Backend::Cuda(cuda) = self.backend.clone() else { return self.rounds(Self::nsa_step) };
        let Recorded { graph, .. } = match recorded {
            Some(recorded) => recorded,
            None => recorded.insert(self.record(&cuda)?),
        };
        mean_of_steps(self.layers.len(), || {
            graph.launch()?;
            Ok(cuda.synchronize()?)
        })
    }

    /// Seconds of one step of full attention.
    pub fn dense(&mut self) -> Result<f64> {
        self.rounds(Self::dense_step)
    }

    /// Runs where a model's steps run, so that no step waits for a thread to be told of it.
    fn rounds(&mut self, step: fn(&mut Self, usize) -> Result<()>) -> Result<f64> {
        let backend = self.backend.clone();
        backend.run(|| {
            let layers = self.layers.len();
            mean_of_steps(layers, || {
                (0..layers).try_for_each(|layer| step(self, layer))?;
                Ok(self.backend.synchronize()?)
            })
        })
    }

    fn record(&mut self, cuda: &Cuda) -> Result<Recorded<T>> {
        let Self { config, layers, gates, o, block_indices, .. } = self;
        let caches: Vec<_> = layers.iter().map(|layer| layer.cache(config, self.context)).collect::<Result<_>>()?;
        let capacity = Capacity::of(1, &caches[..1]);
        let made = caches.iter().map(|_| Workspace::new(cuda, config, capacity));
        let mut workspaces: Vec<Workspace<T>> = made.collect::<nsa_kernels::Result<_>>()?;
        let readied = workspaces.iter_mut().zip(caches.chunks(1)).map(|(workspace, cache)| workspace.upload(0, cache));
        let mut ready = readied.collect::<nsa_kernels::Result<Vec<_>>>()?;
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v, count) = (config.head_dim_qk(), config.head_dim_v(), config.select_count());
        let mut steps = || {
            ready.iter_mut().zip(layers.iter()).try_for_each(|(ready, layer)| {
                let (q, gates) = (layer.q.tensor([1, heads, dim_qk])?, gates.tensor([1, heads, 3])?);
                ready.launch(q, gates, o.tensor_mut([1, heads, dim_v])?, block_indices.tensor_mut([1, groups, count])?)
            })
        };
        steps()?;
        let graph = cuda.record(steps)?;
        drop(ready);
        drop(caches);
        Ok(Recorded { graph, _workspaces: workspaces })
    }

    /// One step of NSA in one layer.
    pub fn nsa_step(&mut self, layer: usize) -> Result<()> {
        let (config, layer) = (&self.config, &self.layers[layer]);
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let args = decode::Step {
            config,
            caches: &[layer.cache(config, self.context)?],
            q: layer.q.tensor([1, heads, config.head_dim_qk()])?,
            gates: self.gates.tensor([1, heads, 3])?,
            o: self.o.tensor_mut([1, heads, config.head_dim_v()])?,
            block_indices: self.block_indices.tensor_mut([1, groups, config.select_count()])?,
        };
        decode::step(&self.backend, args)?;
        Ok(())
    }

    /// One step of full attention in one layer.
    pub fn dense_step(&mut self, layer: usize) -> Result<()> {
        let (config, layer) = (&self.config, &self.layers[layer]);
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let k = [pages(&layer.k[1], self.context, [groups, dim_qk])?];
        let v = [pages(&layer.v[1], self.context, [groups, dim_v])?];
        let args = dense::Forward {
            config,
            packing: &self.packing,
            q: layer.q.tensor([1, heads, dim_qk])?,
            k: Rows::Paged(&k),
            v: Rows::Paged(&v),
            o: self.o.tensor_mut([1, heads, dim_v])?,
            lse: self.lse.tensor_mut([1, heads])?,
        };
        Ok(dense::forward(&self.backend, args)?)
    }
}

impl<T: Element> Layer<T> {
    /// The caches that a step of NSA reads.
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

/// Seconds of a step, the mean over rounds of so many.
fn mean_of_steps(steps: usize, mut round: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for rounds in 1.. {
        round()?;
        let seconds = start.elapsed().as_secs_f64();
        if seconds >= SAMPLE_S {
            return Ok(seconds / (rounds * steps) as f64);
        }
    }
    unreachable!("time goes on")
}

/// The first `rows` rows of a cache.
fn pages<T: Element>(data: &Buffer<T>, rows: usize, row_shape: [usize; 2]) -> Result<Pages<'_, T>> {
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
        for context in [4096, 70_000] {
            let rows = index::decode_rows(&config(), context).min(context);
            assert!(
                layers(&backend, &config(), context, 4) * rows * 2 * (24 + 16) * 4 >= 2 * last_cache_bytes(&backend)
            );
            assert!(bytes(&backend, &config(), context, 4) > 2 * last_cache_bytes(&backend) as u64);
        }
        assert_eq!(layers(&backend, &config(), 1, 4), MAX_LAYERS);
    }

    #[test]
    fn a_step_runs_at_odd_contexts() {
        let backend = Backend::pick(None).expect("a backend").0;
        for context in [1, 31, 33, 700] {
            let mut decoding = Decoding::<f32>::with_layers(&backend, &config(), context, 2).expect("fits");
            for step in [|decoding: &mut Decoding<f32>| decoding.nsa(&mut None), Decoding::dense] {
                decoding.o.write(&[f32::NAN; 6 * 16]).expect("room");
                assert!(step(&mut decoding).expect("runs") > 0.0);
                let mut o = [0.0; 6 * 16];
                decoding.o.read(&mut o).expect("written");
                assert!(o.iter().all(|o| o.is_finite() && *o != 0.0), "context {context}");
            }
        }
    }
}
