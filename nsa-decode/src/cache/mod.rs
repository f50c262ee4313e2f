//! What a sequence keeps of its past, a layer (SPEC 4).

mod paged;
mod ring;

use crate::Result;
use bytemuck::Pod;
use half::bf16;
use nsa_core::model::ModelConfig;
use nsa_core::{NsaConfig, Precision, index};
use nsa_kernels::{Backend, Element};
pub(crate) use paged::Paged;
pub(crate) use ring::Ring;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens of a page, about: pages hold a multiple of l' rows.
const PAGE_TOKENS: usize = 256;
/// Compression blocks of a page, about.
const PAGE_BLOCKS: usize = 64;

/// A number that nothing has had before: of where rows lie, so that equal numbers are equal places.
fn new_version() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// The caches of one sequence, in the type that its model computes in.
#[derive(Clone, Debug)]
pub(crate) enum AnyCache {
    F32(Cache<f32>),
    Bf16(Cache<bf16>),
}

impl AnyCache {
    /// See [`Cache::new`].
    pub(crate) fn new(precision: Precision, config: &ModelConfig, attention: &NsaConfig, undo: usize) -> Self {
        match precision {
            Precision::F32 => Self::F32(Cache::new(config, attention, undo)),
            Precision::Bf16 => Self::Bf16(Cache::new(config, attention, undo)),
        }
    }

    /// Tokens in each layer's cache.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(cache) => cache.len,
            Self::Bf16(cache) => cache.len,
        }
    }

    /// See [`Cache::bytes`].
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::F32(cache) => cache.bytes(),
            Self::Bf16(cache) => cache.bytes(),
        }
    }

    /// See [`Cache::rewind`].
    pub(crate) fn rewind(&mut self, backend: &Backend, attention: &NsaConfig, len: usize) -> Result<bool> {
        match self {
            Self::F32(cache) => cache.rewind(backend, attention, len),
            Self::Bf16(cache) => cache.rewind(backend, attention, len),
        }
    }
}

/// The caches of one sequence, one a layer, `len` tokens in each.
#[derive(Clone, Debug)]
pub(crate) struct Cache<T: Pod> {
    pub(crate) layers: Vec<LayerCache<T>>,
    pub(crate) len: usize,
}

/// The cache of one layer.
#[derive(Clone, Debug)]
pub(crate) enum LayerCache<T: Pod> {
    Nsa(Box<NsaCache<T>>),
    Dense(DenseCache<T>),
}

/// Sparse attention's: rows `[G, Dk]` of keys and `[G, Dv]` of values.
#[derive(Clone, Debug)]
pub(crate) struct NsaCache<T: Pod> {
    /// k^slc of all tokens.
    pub(crate) k_slc: Paged<T>,
    /// v^slc of all tokens.
    pub(crate) v_slc: Paged<T>,
    /// k̃ of all complete blocks.
    pub(crate) k_blocks: Paged<T>,
    /// ṽ of all complete blocks.
    pub(crate) v_blocks: Paged<T>,
    /// The last l raw k^cmp.
    pub(crate) k_cmp: Ring<T>,
    /// The last l raw v^cmp.
    pub(crate) v_cmp: Ring<T>,
    /// The last w k^win.
    pub(crate) k_win: Ring<T>,
    /// The last w v^win.
    pub(crate) v_win: Ring<T>,
}

/// Full attention's: keys and values of all tokens.
#[derive(Clone, Debug)]
pub(crate) struct DenseCache<T: Pod> {
    pub(crate) k: Paged<T>,
    pub(crate) v: Paged<T>,
}

impl<T: Element> NsaCache<T> {
    fn new(config: &NsaConfig, undo: usize) -> Self {
        let (keys, values) = row_shapes(config);
        let multiple = |about: usize| config.select_block() * (about / config.select_block()).max(1);
        let (tokens, blocks) = (multiple(PAGE_TOKENS), multiple(PAGE_BLOCKS));
        Self {
            k_slc: Paged::new(tokens, keys),
            v_slc: Paged::new(tokens, values),
            k_blocks: Paged::new(blocks, keys),
            v_blocks: Paged::new(blocks, values),
            k_cmp: Ring::new(config.compress_block(), undo, keys),
            v_cmp: Ring::new(config.compress_block(), undo, values),
            k_win: Ring::new(config.window(), undo, keys),
            v_win: Ring::new(config.window(), undo, values),
        }
    }

    fn rings(&mut self) -> [&mut Ring<T>; 4] {
        [&mut self.k_cmp, &mut self.v_cmp, &mut self.k_win, &mut self.v_win]
    }
}

impl<T: Element> LayerCache<T> {
    /// Versions of where everything lies that a decoding step reads.
    pub(crate) fn versions(&self) -> Vec<u64> {
        match self {
            Self::Nsa(cache) => {
                let pages = [&cache.k_slc, &cache.v_slc, &cache.k_blocks, &cache.v_blocks].map(Paged::version);
                [&pages[..], &[cache.k_win.version(), cache.v_win.version()]].concat()
            }
            Self::Dense(cache) => vec![cache.k.version(), cache.v.version()],
        }
    }
}

fn row_shapes(config: &NsaConfig) -> ([usize; 2], [usize; 2]) {
    let heads = config.num_kv_heads();
    ([heads, config.head_dim_qk()], [heads, config.head_dim_v()])
}

impl<T: Element> Cache<T> {
    /// Empty caches that can be cut back by `undo` tokens without computing anything again. `attention` gives heads and
    /// dimensions, and block sizes if the model is sparse.
    pub(crate) fn new(config: &ModelConfig, attention: &NsaConfig, undo: usize) -> Self {
        let layer = match config.nsa_config() {
            Some(nsa) => LayerCache::Nsa(Box::new(NsaCache::new(&nsa, undo))),
            None => {
                let (keys, values) = row_shapes(attention);
                LayerCache::Dense(DenseCache { k: Paged::new(PAGE_TOKENS, keys), v: Paged::new(PAGE_TOKENS, values) })
            }
        };
        Self { layers: vec![layer; config.num_hidden_layers()], len: 0 }
    }

    /// Bytes that the caches hold, memory shared with forks included.
    pub(crate) fn bytes(&self) -> u64 {
        let layer = |layer: &LayerCache<T>| match layer {
            LayerCache::Dense(cache) => cache.k.bytes() + cache.v.bytes(),
            LayerCache::Nsa(cache) => {
                let pages = [&cache.k_slc, &cache.v_slc, &cache.k_blocks, &cache.v_blocks].map(Paged::bytes);
                let rings = [&cache.k_cmp, &cache.v_cmp, &cache.k_win, &cache.v_win].map(Ring::bytes);
                pages.iter().chain(&rings).sum()
            }
        };
        self.layers.iter().map(layer).sum()
    }

    /// Cuts the caches back to `len` tokens if they hold enough to do so; says whether they did. Pages always do, rings
    /// within their `undo` rows.
    pub(crate) fn rewind(&mut self, backend: &Backend, attention: &NsaConfig, len: usize) -> Result<bool> {
        debug_assert!(len <= self.len);
        let possible = self.layers.iter_mut().all(|layer| match layer {
            LayerCache::Dense(_) => true,
            LayerCache::Nsa(cache) => cache.rings().iter().all(|ring| ring.can_rewind(len)),
        });
        if !possible {
            return Ok(false);
        }
        for layer in &mut self.layers {
            match layer {
                LayerCache::Dense(cache) => {
                    cache.k.truncate(len);
                    cache.v.truncate(len);
                }
                LayerCache::Nsa(cache) => {
                    let blocks = index::num_blocks(attention, len);
                    cache.k_slc.truncate(len);
                    cache.v_slc.truncate(len);
                    cache.k_blocks.truncate(blocks);
                    cache.v_blocks.truncate(blocks);
                    for ring in cache.rings() {
                        ring.rewind(backend, len)?;
                    }
                }
            }
        }
        self.len = len;
        Ok(true)
    }
}
