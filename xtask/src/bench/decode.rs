//! The decoding step that is timed: one query after a context, from caches in the processor's memory.

use anyhow::Result;
use nsa_core::{CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::op::{decode, dense};
use nsa_kernels::{Backend, Element, Mem, Pages, Rows, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Instant;

/// Rows of a page of the caches.
const PAGE_ROWS: usize = 64;
/// Least seconds of steps in one sample.
const SAMPLE_S: f64 = 0.05;
/// Taken for the last cache's size where the system does not tell.
const USUAL_CACHE_BYTES: usize = 32 << 20;
/// More layers than this no model has: short contexts then stay in the processor's cache, as they would there.
const MAX_LAYERS: usize = 256;

/// As many layers' caches as do not fit the processor's own cache, and room for the output of one.
pub struct Decoding<T: Element> {
    backend: Backend,
    config: NsaConfig,
    context: usize,
    packing: Packing,
    layers: Vec<Layer<T>>,
    gates: Vec<T>,
    o: Vec<T>,
    lse: Vec<T::Acc>,
    block_indices: Vec<i32>,
}

struct Layer<T> {
    q: Vec<T>,
    /// k̃, k^slc of all tokens (full attention's too), the ring of k^win; whole pages.
    k: [Vec<T>; 3],
    v: [Vec<T>; 3],
}

/// Layers that a model needs so that neither NSA nor full attention finds its rows of the step before in the last cache.
pub fn layers(config: &NsaConfig, context: usize, element_bytes: usize) -> usize {
    let rows = index::decode_rows(config, context).min(context) as u64;
    let step_bytes = super::work::row_bytes(config, rows, element_bytes);
    ((2.0 * last_cache_bytes() as f64 / step_bytes).ceil() as usize).min(MAX_LAYERS)
}

/// Bytes of the caches of [`layers`] layers.
pub fn bytes(config: &NsaConfig, context: usize, element_bytes: usize) -> u64 {
    let rows = index::num_blocks(config, context) + context + config.window() + 2 * PAGE_ROWS;
    let layer = super::work::row_bytes(config, rows as u64, element_bytes);
    (layer * layers(config, context, element_bytes) as f64) as u64
}

fn last_cache_bytes() -> usize {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let kib = size.trim().strip_suffix('K').and_then(|kib| kib.parse::<usize>().ok());
    kib.map_or(USUAL_CACHE_BYTES, |kib| kib << 10)
}

impl<T: Element> Decoding<T> {
    /// Random caches and queries of [`layers`] layers.
    pub fn new(backend: &Backend, config: &NsaConfig, context: usize) -> Result<Self> {
        Self::with_layers(backend, config, context, layers(config, context, size_of::<T>()))
    }

    fn with_layers(backend: &Backend, config: &NsaConfig, context: usize, layers: usize) -> Result<Self> {
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
        let layer = |_| Layer { q: random(heads * dim_qk), k: k.clone(), v: v.clone() };
        Ok(Self {
            layers: (0..layers).map(layer).collect(),
            gates: vec![T::from_f64(1.0 / 3.0); heads * 3],
            o: vec![T::default(); heads * dim_v],
            lse: vec![T::Acc::default(); heads],
            block_indices: vec![0; groups * config.select_count()],
            packing: Packing::with_contexts(CuSeqlens::single(1)?, vec![context - 1])?,
            backend: backend.clone(),
            config: config.clone(),
            context,
        })
    }

    /// Seconds of one step of NSA, the mean over rounds through all layers.
    pub fn nsa(&mut self) -> Result<f64> {
        self.rounds(Self::nsa_step)
    }

    /// Seconds of one step of full attention.
    pub fn dense(&mut self) -> Result<f64> {
        self.rounds(Self::dense_step)
    }

    /// Runs where a model's steps run, so that no step waits for a thread to be told of it.
    fn rounds(&mut self, step: fn(&mut Self, usize) -> Result<()>) -> Result<f64> {
        let backend = self.backend.clone();
        backend.run(|| self.rounds_here(step))
    }

    fn rounds_here(&mut self, step: fn(&mut Self, usize) -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        let mut steps = 0;
        loop {
            for layer in 0..self.layers.len() {
                step(self, layer)?;
            }
            steps += self.layers.len();
            let seconds = start.elapsed().as_secs_f64();
            if seconds >= SAMPLE_S {
                return Ok(seconds / steps as f64);
            }
        }
    }

    fn nsa_step(&mut self, layer: usize) -> Result<()> {
        let (config, layer) = (&self.config, &self.layers[layer]);
        let (groups, dim_qk, dim_v) = (config.num_kv_heads(), config.head_dim_qk(), config.head_dim_v());
        let blocks = index::num_blocks(config, self.context);
        let caches = [decode::Cache {
            context: self.context,
            k_cmp: pages(&layer.k[0], blocks, [groups, dim_qk]),
            v_cmp: pages(&layer.v[0], blocks, [groups, dim_v]),
            k_slc: pages(&layer.k[1], self.context, [groups, dim_qk]),
            v_slc: pages(&layer.v[1], self.context, [groups, dim_v]),
            k_win: Tensor::host(&layer.k[2], [config.window(), groups, dim_qk])?,
            v_win: Tensor::host(&layer.v[2], [config.window(), groups, dim_v])?,
        }];
        let heads = config.num_heads();
        let args = decode::Step {
            config,
            caches: &caches,
            q: Tensor::host(&layer.q, [1, heads, dim_qk])?,
            gates: Tensor::host(&self.gates, [1, heads, 3])?,
            o: TensorMut::host(&mut self.o, [1, heads, dim_v])?,
            block_indices: TensorMut::host(&mut self.block_indices, [1, groups, config.select_count()])?,
        };
        decode::step(&self.backend, args)?;
        Ok(())
    }

    fn dense_step(&mut self, layer: usize) -> Result<()> {
        let (config, layer) = (&self.config, &self.layers[layer]);
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let k = [pages(&layer.k[1], self.context, [groups, dim_qk])];
        let v = [pages(&layer.v[1], self.context, [groups, dim_v])];
        let args = dense::Forward {
            config,
            packing: &self.packing,
            q: Tensor::host(&layer.q, [1, heads, dim_qk])?,
            k: Rows::Paged(&k),
            v: Rows::Paged(&v),
            o: TensorMut::host(&mut self.o, [1, heads, dim_v])?,
            lse: TensorMut::host(&mut self.lse, [1, heads])?,
        };
        Ok(dense::forward(&self.backend, args)?)
    }
}

/// The first `rows` rows of a cache.
fn pages<T>(data: &[T], rows: usize, row_shape: [usize; 2]) -> Pages<'_, T> {
    let page_len = PAGE_ROWS * row_shape[0] * row_shape[1];
    let pages = data.chunks_exact(page_len).take(rows.div_ceil(PAGE_ROWS)).map(Mem::Host).collect();
    Pages { pages, page_rows: PAGE_ROWS, len: rows, row_shape }
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
        for context in [4096, 70_000] {
            let rows = index::decode_rows(&config(), context).min(context);
            assert!(layers(&config(), context, 4) * rows * 2 * (24 + 16) * 4 >= 2 * last_cache_bytes());
            assert!(bytes(&config(), context, 4) > 2 * last_cache_bytes() as u64);
        }
        assert_eq!(layers(&config(), 1, 4), MAX_LAYERS);
    }

    #[test]
    fn a_step_runs_at_odd_contexts() {
        let backend = Backend::pick(None).expect("a backend").0;
        for context in [1, 31, 33, 700] {
            let mut decoding = Decoding::<f32>::with_layers(&backend, &config(), context, 2).expect("fits");
            for step in [Decoding::nsa, Decoding::dense] {
                decoding.o.fill(f32::NAN);
                assert!(step(&mut decoding).expect("runs") > 0.0);
                assert!(decoding.o.iter().all(|o| o.is_finite() && *o != 0.0), "context {context}");
            }
        }
    }
}
