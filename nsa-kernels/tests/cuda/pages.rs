//! Keys and values in pages give the bits of packed ones.

use half::bf16;
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::op::{cmp, dense, slc, win};
use nsa_kernels::{Backend, Buffer, Element, Pages, Result, Rows};
use nsa_tests::sim::{self, on_simulator};

/// Queries and context of each sequence.
type Sequences = [(usize, usize); 3];

const SEQUENCES: Sequences = [(9, 40), (0, 3), (70, 0)];
/// Of so many blocks that blocks of keys gather queries.
const FAR: Sequences = [(40, 320), (0, 3), (70, 0)];
/// Single queries, over keys of one chunk and of several, and other sequences beside them.
const STEPS: [Sequences; 2] = [[(1, 40), (0, 3), (1, 700)], [(1, 300), (7, 30), (1, 0)]];

/// Asymmetric numbers in −1..1.
pub(super) fn numbers<T: Element>(count: usize, step: usize) -> Vec<T> {
    (0..count).map(|i| T::from_f64(((i * step + 7) % 193) as f64 / 97.0 - 1.0)).collect()
}

/// A page table a sequence; before each page and behind the last row there is NaN.
struct Tables<T> {
    pages: Vec<Vec<Buffer<T>>>,
    /// Elements before a page: how its address is aligned.
    lead: usize,
    lens: Vec<usize>,
    page_rows: usize,
    row_shape: [usize; 2],
}

impl<T: Element> Tables<T> {
    fn new(
        backend: &Backend,
        data: &[T],
        offsets: &CuSeqlens,
        (page_rows, lead): (usize, usize),
        row_shape: [usize; 2],
    ) -> Self {
        let row: usize = row_shape.iter().product();
        let nan = T::from_f64(f64::NAN);
        let page = |rows: &[T]| backend.upload(&[&vec![nan; lead][..], rows].concat());
        let of = |s| {
            let range = offsets.range(s);
            let mut rows = data[range.start * row..range.end * row].to_vec();
            rows.resize(range.len().next_multiple_of(page_rows) * row, nan);
            rows.chunks(page_rows * row).map(page).collect()
        };
        let lens = (0..offsets.num_seqs()).map(|s| offsets.range(s).len()).collect();
        Self { pages: (0..offsets.num_seqs()).map(of).collect(), lead, lens, page_rows, row_shape }
    }

    fn rows(&self) -> Vec<Pages<'_, T>> {
        std::iter::zip(&self.pages, &self.lens)
            .map(|(pages, &len)| Pages {
                pages: pages.iter().map(|page| page.mem_at(self.lead).unwrap()).collect(),
                page_rows: self.page_rows,
                len,
                row_shape: self.row_shape,
            })
            .collect()
    }
}

/// The bits of o, lse and what else `forward` writes, on packed rows and on pages of `page_rows`, at addresses that allow wide
/// copies and at others.
fn assert_same<T: Element<Acc = f32>>(
    name: &str,
    config: &NsaConfig,
    sequences: Sequences,
    rows_of: impl Fn(&NsaConfig, usize) -> usize,
    page_rows: usize,
    forward: impl Fn(&Backend, &Packing, &Buffer<T>, [Rows<'_, T>; 2], &mut Outputs<T>) -> Result<()>,
) {
    let backend = Backend::cuda(0).expect("the simulator");
    let lengths = CuSeqlens::from_lengths(sequences.map(|(queries, _)| queries)).unwrap();
    let packing = Packing::with_contexts(lengths, sequences.map(|(_, context)| context).to_vec()).unwrap();
    let offsets = CuSeqlens::from_lengths(packing.seqs().map(|seq| rows_of(config, seq.end()))).unwrap();
    let (heads, groups) = (config.num_heads(), config.num_kv_heads());
    let shapes = [[groups, config.head_dim_qk()], [groups, config.head_dim_v()]];
    let tokens = packing.num_tokens();
    let q = backend.upload(&numbers::<T>(tokens * heads * config.head_dim_qk(), 31));
    let data = [(shapes[0], 17), (shapes[1], 23)]
        .map(|(shape, step)| numbers::<T>(offsets.total() * shape[0] * shape[1], step));
    let buffers = data.each_ref().map(|data| backend.upload(data));
    let tables =
        [0, 1].map(|lead| [0, 1].map(|i| Tables::new(&backend, &data[i], &offsets, (page_rows, lead), shapes[i])));
    let pages = tables.each_ref().map(|tables| tables.each_ref().map(Tables::rows));
    let packed = [0, 1].map(|i| {
        let [groups, dim] = shapes[i];
        Rows::packed(buffers[i].tensor([offsets.total(), groups, dim]).unwrap(), &offsets)
    });
    let paged = |lead: usize| [Rows::Paged(&pages[lead][0]), Rows::Paged(&pages[lead][1])];
    let results = [packed, paged(0), paged(1)].map(|rows| {
        let mut outputs = Outputs::new(&backend, config, tokens);
        forward(&backend, &packing, &q, rows, &mut outputs).unwrap();
        outputs.bits()
    });
    for (lead, paged) in results[1..].iter().enumerate() {
        assert!(results[0] == *paged, "{name}: pages of {page_rows} rows, {lead} elements behind an aligned address");
    }
    assert!(results[0].0.iter().all(|o| o.is_finite()) && results[0].0.iter().any(|&o| o != 0.0), "{name}");
}

/// o `[N, Hq, Dv]`, lse `[N, Hq]`, block indices `[N, G, n]`.
struct Outputs<T> {
    o: Buffer<T>,
    lse: Buffer<f32>,
    block_indices: Buffer<i32>,
}

impl<T: Element> Outputs<T> {
    fn new(backend: &Backend, config: &NsaConfig, tokens: usize) -> Self {
        let heads = config.num_heads();
        Self {
            o: backend.alloc(tokens * heads * config.head_dim_v()),
            lse: backend.alloc(tokens * heads),
            block_indices: backend.alloc(tokens * config.num_kv_heads() * config.select_count()),
        }
    }

    fn bits(&self) -> (Vec<f64>, Vec<u32>, Vec<i32>) {
        let mut o = vec![T::default(); self.o.len()];
        let mut lse = vec![0.0; self.lse.len()];
        let mut indices = vec![0; self.block_indices.len()];
        self.o.read(&mut o).unwrap();
        self.lse.read(&mut lse).unwrap();
        self.block_indices.read(&mut indices).unwrap();
        (o.iter().map(|x| x.to_f64()).collect(), lse.iter().map(|x| x.to_bits()).collect(), indices)
    }
}

fn config([dim_k, dim_v]: [usize; 2]) -> NsaConfig {
    let builder = NsaConfig::builder(8, 2, dim_k, dim_v).compress_kind(CompressKind::Mean);
    builder.compress_block(8).compress_stride(4).select_block(16).select_count(4).window(33).build().unwrap()
}

fn every_branch<T: Element<Acc = f32>>(dims: [usize; 2]) {
    let config = config(dims);
    let [heads, groups] = [config.num_heads(), config.num_kv_heads()];
    let n: usize = SEQUENCES.map(|(queries, _)| queries).iter().sum();
    let shapes = ([n, heads, config.head_dim_qk()], [n, heads, config.head_dim_v()]);
    let lists = [n, groups, config.select_count()];
    let all = |_: &NsaConfig, end: usize| end;
    for page_rows in [6, 16, 64] {
        for sequences in [SEQUENCES, STEPS[0], STEPS[1]] {
            assert_same::<T>("dense", &config, sequences, all, page_rows, |backend, packing, q, [k, v], out| {
                let n = packing.num_tokens();
                let (o, lse) = (out.o.tensor_mut([n, heads, shapes.1[2]])?, out.lse.tensor_mut([n, heads])?);
                let q = q.tensor([n, heads, shapes.0[2]])?;
                dense::forward(backend, dense::Forward { config: &config, packing, q, k, v, o, lse })
            });
        }
        assert_same::<T>("win", &config, SEQUENCES, all, page_rows, |backend, packing, q, [k, v], out| {
            let (o, lse) = (out.o.tensor_mut(shapes.1)?, out.lse.tensor_mut([n, heads])?);
            win::forward(backend, win::Forward { config: &config, packing, q: q.tensor(shapes.0)?, k, v, o, lse })
        });
        assert_same::<T>(
            "cmp",
            &config,
            SEQUENCES,
            index::num_blocks,
            page_rows,
            |backend, packing, q, [k_blocks, v_blocks], out| {
                let (o, lse) = (out.o.tensor_mut(shapes.1)?, out.lse.tensor_mut([n, heads])?);
                let block_indices = Some(out.block_indices.tensor_mut(lists)?);
                let q = q.tensor(shapes.0)?;
                let args = cmp::Forward { config: &config, packing, q, k_blocks, v_blocks, o, lse, block_indices };
                cmp::forward(backend, args)
            },
        );
    }
    // Selected blocks must lie in one page each.
    for (page_rows, sequences) in [(16, SEQUENCES), (64, SEQUENCES), (16, FAR), (64, FAR)] {
        assert_same::<T>("slc", &config, sequences, all, page_rows, |backend, packing, q, [k, v], out| {
            let n = packing.num_tokens();
            let positions = packing.seqs().flat_map(|seq| seq.context..seq.end());
            // The first block and the query's own.
            let list = |t: usize| match t / config.select_block() {
                0 => [0, -1, -1, -1],
                own => [0, own as i32, -1, -1],
            };
            let listed: Vec<i32> = positions.flat_map(|t| [list(t); 2]).flatten().collect();
            out.block_indices.write(&listed)?;
            let (o, lse) = (out.o.tensor_mut([n, heads, shapes.1[2]])?, out.lse.tensor_mut([n, heads])?);
            let block_indices = out.block_indices.tensor([n, groups, config.select_count()])?;
            let q = q.tensor([n, heads, shapes.0[2]])?;
            slc::forward(backend, slc::Forward { config: &config, packing, q, k, v, block_indices, o, lse })
        });
    }
}

#[test]
fn equal_packed_rows() {
    on_simulator("pages::equal_packed_rows", || {
        if sim::again() {
            // Dims that an H100's warps multiply together.
            return every_branch::<bf16>([64, 64]);
        }
        every_branch::<bf16>([40, 24]);
        every_branch::<f32>([40, 24]);
    });
}
