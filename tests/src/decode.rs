//! Queries that continue a context: chunks of a prefill and decoding steps, from rows that lie as caches hold them.

use crate::generate::{Guarded, Poison, Side};
use crate::kernels::{Attention, Pattern, Place, Sizes, text};
use crate::operator::{Branches, Compressed, Inputs};
use crate::{Case, Kind, check};
use nsa_core::{CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::op::decode;
use nsa_kernels::{Backend, Pages};

/// Rows a page of the caches that tests build: no power of two, so that pages end inside blocks.
pub const PAGE_ROWS: usize = 5;

/// Prefixes of the case's sequences at which a step is interesting: around the first block, inside, at the end.
/// Pairs of sequence and context, the query included.
pub fn prefixes(case: &Case) -> Vec<(usize, usize)> {
    let (l, d) = (case.config.compress_block(), case.config.compress_stride());
    let mut list = Vec::new();
    for (s, &length) in case.lengths.iter().enumerate() {
        let mut contexts = vec![1, l - 1, l, l + d - 1, l + d, length / 2, length.saturating_sub(1), length];
        contexts.retain(|&context| 0 < context && context <= length);
        contexts.sort_unstable();
        contexts.dedup();
        list.extend(contexts.into_iter().map(|context| (s, context)));
    }
    list
}

/// The last query of each prefix, with the keys of the prefix: a call of one query a sequence. `blocks` are k̃ and ṽ of the
/// whole sequences.
pub fn steps<T: Kind>(case: &Case, whole: &Inputs<T>, blocks: &[Vec<T>; 2]) -> Result<Inputs<T>, String> {
    let chunks: Vec<_> = prefixes(case).into_iter().map(|(s, context)| (s, context - 1, context)).collect();
    take(whole, blocks, &chunks)
}

/// Queries `from..to` of sequence `s` for each `(s, from, to)`, with the keys of the first `to` tokens.
pub fn take<T: Kind>(
    whole: &Inputs<T>,
    blocks: &[Vec<T>; 2],
    chunks: &[(usize, usize, usize)],
) -> Result<Inputs<T>, String> {
    let config = &whole.config;
    let sizes = Sizes::new(config, &whole.packing);
    let starts = |s: usize| whole.packing.seq(s).rows.start;
    let cu_blocks = whole.packing.cu_blocks(config).map_err(text)?;
    let queries = |data: &[T], width: usize| -> Vec<T> {
        let rows = |&(s, from, to): &(usize, usize, usize)| &data[(starts(s) + from) * width..(starts(s) + to) * width];
        chunks.iter().flat_map(rows).copied().collect()
    };
    let keys = |data: &[T], width: usize| -> Vec<T> {
        let rows = |&(s, _, to): &(usize, usize, usize)| &data[starts(s) * width..(starts(s) + to) * width];
        chunks.iter().flat_map(rows).copied().collect()
    };
    let compressed = |data: &[T], width: usize| -> Vec<T> {
        let rows = |&(s, _, to): &(usize, usize, usize)| {
            let start = cu_blocks.range(s).start;
            &data[start * width..(start + index::num_blocks(config, to)) * width]
        };
        chunks.iter().flat_map(rows).copied().collect()
    };
    let branches = |side: Side, from: &Branches<T>, blocks: &[T]| {
        let width = sizes.g * side.dim(config);
        Branches {
            cmp: Compressed::Blocks(compressed(blocks, width)),
            slc: keys(&from.slc, width),
            win: keys(&from.win, width),
        }
    };
    let lengths = chunks.iter().map(|(_, from, to)| to - from);
    let contexts = chunks.iter().map(|(_, from, _)| *from).collect();
    let offsets = CuSeqlens::from_lengths(lengths).map_err(text)?;
    Ok(Inputs {
        packing: Packing::with_contexts(offsets, contexts).map_err(text)?,
        q: queries(&whole.q, sizes.hq * sizes.dk),
        k: branches(Side::Key, &whole.k, &blocks[0]),
        v: branches(Side::Value, &whole.v, &blocks[1]),
        gates: queries(&whole.gates, sizes.hq * 3),
        block_indices: None,
        d_o: None,
        config: config.clone(),
    })
}

/// Full attention of queries `from..to` of sequence `s` for each `(s, from, to)`, with the keys of the first `to` tokens.
pub fn take_dense<T: Kind>(case: &Case, chunks: &[(usize, usize, usize)]) -> Result<Attention<T>, String> {
    let whole = check::attention_inputs::<T>(case, Pattern::Dense);
    let sizes = Sizes::new(&whole.config, &whole.packing);
    let rows = |data: &[T], width: usize, first: fn(&(usize, usize, usize)) -> usize| -> Vec<T> {
        let of = |chunk: &(usize, usize, usize)| {
            let start = whole.packing.seq(chunk.0).rows.start;
            data[(start + first(chunk)) * width..(start + chunk.2) * width].iter()
        };
        chunks.iter().flat_map(of).copied().collect()
    };
    let offsets = CuSeqlens::from_lengths(chunks.iter().map(|(_, from, to)| to - from)).map_err(text)?;
    Ok(Attention {
        packing: Packing::with_contexts(offsets, chunks.iter().map(|chunk| chunk.1).collect()).map_err(text)?,
        q: rows(&whole.q, sizes.hq * sizes.dk, |chunk| chunk.1),
        k: rows(&whole.k, sizes.g * sizes.dk, |_| 0),
        v: rows(&whole.v, sizes.g * sizes.dv, |_| 0),
        d_o: rows(&whole.d_o, sizes.hq * sizes.dv, |chunk| chunk.1),
        ..whole
    })
}

/// What a step wrote.
#[derive(Clone, Debug)]
pub struct Step<T> {
    /// `[S, Hq, Dv]`.
    pub o: Vec<T>,
    /// `[S, G, n]`.
    pub block_indices: Vec<i32>,
    /// Token-rows of K and V read, one entry a sequence.
    pub rows_read: Vec<usize>,
}

/// Keys and values of one sequence as caches hold them; what no kernel may read is NaN.
struct Memory<T> {
    context: usize,
    /// Pages of k̃, ṽ, k^slc, v^slc, each with its rows in use and the elements of a row.
    paged: [(Vec<Vec<T>>, usize, usize); 4],
    /// Rings of k^win, v^win.
    rings: [Vec<T>; 2],
}

/// Rows in pages; rows beyond the last are NaN.
fn pages<T: Kind>(data: &[T], width: usize, page_rows: usize) -> (Vec<Vec<T>>, usize, usize) {
    let page = |rows: &[T]| {
        let mut page = rows.to_vec();
        page.resize(page_rows * width, <T as Poison>::FILL);
        page
    };
    (data.chunks(page_rows * width).map(page).collect(), data.len() / width, width)
}

/// The last `window` rows, position s in row s mod w; rows that no position fills are NaN.
fn ring<T: Kind>(config: &NsaConfig, data: &[T], width: usize) -> Vec<T> {
    let rows = config.window();
    let mut ring = vec![<T as Poison>::FILL; rows * width];
    for (s, row) in data.chunks(width).enumerate() {
        ring[index::ring_row(rows, s) * width..][..width].copy_from_slice(row);
    }
    ring
}

/// Runs a decoding step on inputs whose sequences have one query each, from pages of `page_rows` rows.
///
/// # Errors
/// If the kernel refuses, or writes beside an output.
pub fn step<T: Kind>(backend: &Backend, inputs: &Inputs<T>, page_rows: usize) -> Result<Step<T>, String> {
    let (sizes, place) = (Sizes::new(&inputs.config, &inputs.packing), Place::new(backend));
    let mut o = Guarded::<T>::unwritten(sizes.o().iter().product());
    let mut block_indices = Guarded::<i32>::unwritten(sizes.indices().iter().product());
    let rows_read = with_caches(backend, inputs, page_rows, |caches| {
        let args = decode::Step {
            config: &inputs.config,
            caches,
            q: place.input(&inputs.q, sizes.q())?,
            gates: place.input(&inputs.gates, sizes.gates())?,
            o: place.output(&mut o, sizes.o())?,
            block_indices: place.output(&mut block_indices, sizes.indices())?,
        };
        decode::step(backend, args).map_err(text)
    })?;
    Ok(Step { o: o.finish("o")?, block_indices: block_indices.finish("block_indices")?, rows_read })
}

/// Calls `work` with caches in the backend's memory, of inputs whose sequences have one query each, in pages of `page_rows`
/// rows.
///
/// # Errors
/// If the inputs are not those of a step, or what `work` says.
pub fn with_caches<T: Kind, R>(
    backend: &Backend,
    inputs: &Inputs<T>,
    page_rows: usize,
    work: impl FnOnce(&[decode::Cache<'_, T>]) -> Result<R, String>,
) -> Result<R, String> {
    let config = &inputs.config;
    let (sizes, place) = (Sizes::new(config, &inputs.packing), Place::new(backend));
    let memory = memory(inputs, page_rows)?;
    let shape = |side: Side| [sizes.g, side.dim(config)];
    let mut caches = Vec::new();
    for Memory { context, paged, rings } in &memory {
        let pages = |at: usize, side| Pages {
            pages: paged[at].0.iter().map(|page| place.mem(page)).collect(),
            page_rows,
            len: paged[at].1,
            row_shape: shape(side),
        };
        caches.push(decode::Cache {
            context: *context,
            k_cmp: pages(0, Side::Key),
            v_cmp: pages(1, Side::Value),
            k_slc: pages(2, Side::Key),
            v_slc: pages(3, Side::Value),
            k_win: place.input(&rings[0], [config.window(), sizes.g, sizes.dk])?,
            v_win: place.input(&rings[1], [config.window(), sizes.g, sizes.dv])?,
        });
    }
    work(&caches)
}

fn memory<T: Kind>(inputs: &Inputs<T>, page_rows: usize) -> Result<Vec<Memory<T>>, String> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let cu_blocks = packing.cu_blocks(config).map_err(text)?;
    let cu_keys = packing.cu_keys().map_err(text)?;
    let widths = [Side::Key, Side::Value].map(|side| config.num_kv_heads() * side.dim(config));
    let (Compressed::Blocks(k_blocks), Compressed::Blocks(v_blocks)) = (&inputs.k.cmp, &inputs.v.cmp) else {
        return Err("a step takes compressed blocks".to_owned());
    };
    let sequence = |s: usize| {
        let rows = |data: &'_ [T], range: std::ops::Range<usize>, width: usize| {
            data[range.start * width..range.end * width].to_vec()
        };
        let (blocks, keys) = (cu_blocks.range(s), cu_keys.range(s));
        Memory {
            context: packing.seq(s).end(),
            paged: [
                pages(&rows(k_blocks, blocks.clone(), widths[0]), widths[0], page_rows),
                pages(&rows(v_blocks, blocks, widths[1]), widths[1], page_rows),
                pages(&rows(&inputs.k.slc, keys.clone(), widths[0]), widths[0], page_rows),
                pages(&rows(&inputs.v.slc, keys.clone(), widths[1]), widths[1], page_rows),
            ],
            rings: [
                ring(config, &rows(&inputs.k.win, keys.clone(), widths[0]), widths[0]),
                ring(config, &rows(&inputs.v.win, keys, widths[1]), widths[1]),
            ],
        }
    };
    Ok((0..packing.num_seqs()).map(sequence).collect())
}

/// Token-rows that a step reads by SPEC 4: complete blocks, tokens of the selected blocks (of the group that has most),
/// the window.
pub fn rows_of(config: &NsaConfig, context: usize, lists: &[i32]) -> usize {
    let tokens = |list: &[i32]| -> usize {
        let blocks = list.iter().filter(|&&j| j >= 0);
        blocks.map(|&j| index::select_tokens(config, j as usize, context - 1).len()).sum()
    };
    let selected = lists.chunks(config.select_count()).map(tokens).max().unwrap_or(0);
    index::num_blocks(config, context) + selected + config.window().min(context)
}
