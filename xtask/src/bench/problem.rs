//! The work that is timed: one packed sequence, NSA and full attention on the same shapes.

use anyhow::{Result, ensure};
use clap::Args;
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::{compress, dense, nsa};
use nsa_kernels::{Backend, Buffer, Element, Rows};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Neighbouring queries whose lists are compared.
const NEIGHBOURS: usize = 4;

/// Options of the inputs that attention is measured on.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Inputs {
    /// Correlation of each query with the one before, from 0 to below 1: at 0 lists of blocks are as good as random; the nearer to 1,
    /// the more blocks neighbours have in common, as those of a trained model do
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, conflicts_with = "peer")]
    query_correlation: f64,
}

impl Inputs {
    /// Whether queries resemble the ones before.
    pub fn correlate(&self) -> bool {
        self.query_correlation > 0.0
    }

    /// The rule that the argument parser does not know.
    ///
    /// # Errors
    /// If a correlation is none that successive queries can have.
    pub fn validate(&self) -> Result<()> {
        let Self { query_correlation } = *self;
        ensure!(
            (0.0..1.0).contains(&query_correlation),
            "--query-correlation {query_correlation}: must be at least 0 and less than 1"
        );
        Ok(())
    }

    /// Rows of `len` numbers each, each one's correlated with the one's before, from numbers that `random` draws.
    fn queries<T: Element>(&self, rows: usize, len: usize, mut random: impl FnMut() -> f64) -> Vec<T> {
        let kept = self.query_correlation;
        let fresh = (1.0 - kept * kept).sqrt();
        let mut row: Vec<f64> = (0..len).map(|_| random()).collect();
        let mut all = Vec::with_capacity(rows * len);
        for _ in 0..rows {
            all.extend(row.iter().map(|&x| T::from_f64(x)));
            row.iter_mut().for_each(|x| *x = kept * *x + fresh * random());
        }
        all
    }
}

/// Blocks that [`NEIGHBOURS`] queries beside each other select together, over those of one of them: of lists `[queries, groups, count]`.
fn union_of_lists(lists: &[i32], groups: usize, count: usize) -> Option<f64> {
    let (mut together, mut alone) = (0, 0);
    for run in lists.chunks_exact(NEIGHBOURS * groups * count) {
        for group in 0..groups {
            let of_query = |query: &[i32]| query[group * count..][..count].to_vec();
            let mut blocks: Vec<i32> =
                run.chunks_exact(groups * count).flat_map(of_query).filter(|&b| b >= 0).collect();
            alone += blocks.len();
            blocks.sort_unstable();
            blocks.dedup();
            together += NEIGHBOURS * blocks.len();
        }
    }
    (alone > 0).then(|| together as f64 / alone as f64)
}

/// Inputs of one sequence of `tokens`, and room for every output.
pub struct Problem<T: Element> {
    backend: Backend,
    config: NsaConfig,
    packing: Packing,
    cu_blocks: CuSeqlens,
    q: Buffer<T>,
    /// Keys and values of cmp (raw), slc, win.
    k: [Buffer<T>; 3],
    v: [Buffer<T>; 3],
    gates: Buffer<T>,
    d_o: Buffer<T>,
    k_blocks: Buffer<T>,
    v_blocks: Buffer<T>,
    block_indices: Buffer<i32>,
    branches: [Buffer<T>; 3],
    lse: [Buffer<T::Acc>; 3],
    o: Buffer<T>,
    grads: Grads<T::Acc>,
}

/// Room for gradients.
struct Grads<A> {
    q: Buffer<A>,
    gates: Buffer<A>,
    /// Of k̃, k^slc, k^win.
    k: [Buffer<A>; 3],
    v: [Buffer<A>; 3],
    /// Of the raw keys and values of the compressed branch.
    x: [Buffer<A>; 2],
}

impl<T: Element> Problem<T> {
    /// Random inputs, the same for every type. φ is the mean, so that the figures are those of attention.
    pub fn new(backend: &Backend, config: &NsaConfig, tokens: usize, inputs: Inputs) -> Result<Self> {
        let packing = Packing::new(CuSeqlens::single(tokens)?);
        let cu_blocks = packing.cu_blocks(config)?;
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let (k_len, v_len) = (groups * dim_qk, groups * dim_v);
        let blocks = cu_blocks.total();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut random = || rng.random_range(-1.7..1.7);
        let q = backend.upload(&inputs.queries::<T>(tokens, heads * dim_qk, &mut random));
        let mut uploaded = |len: usize| backend.upload(&(0..len).map(|_| T::from_f64(random())).collect::<Vec<T>>());
        let three = |len: usize| [(); 3].map(|()| backend.alloc(len));
        let grads = |rows: [usize; 3], len: usize| rows.map(|rows| backend.alloc(rows * len));
        Ok(Self {
            q,
            k: [(); 3].map(|()| uploaded(tokens * k_len)),
            v: [(); 3].map(|()| uploaded(tokens * v_len)),
            d_o: uploaded(tokens * heads * dim_v),
            gates: backend.upload(&vec![T::from_f64(1.0 / 3.0); tokens * heads * 3]),
            k_blocks: backend.alloc(blocks * k_len),
            v_blocks: backend.alloc(blocks * v_len),
            block_indices: backend.alloc(tokens * groups * config.select_count()),
            branches: three(tokens * heads * dim_v),
            lse: [(); 3].map(|()| backend.alloc(tokens * heads)),
            o: backend.alloc(tokens * heads * dim_v),
            grads: Grads {
                q: backend.alloc(tokens * heads * dim_qk),
                gates: backend.alloc(tokens * heads * 3),
                k: grads([blocks, tokens, tokens], k_len),
                v: grads([blocks, tokens, tokens], v_len),
                x: [backend.alloc(tokens * k_len), backend.alloc(tokens * v_len)],
            },
            backend: backend.clone(),
            config: config.clone(),
            packing,
            cu_blocks,
        })
    }

    fn shapes(&self) -> Shapes {
        let (n, groups) = (self.packing.num_tokens(), self.config.num_kv_heads());
        let (heads, blocks) = (self.config.num_heads(), self.cu_blocks.total());
        let (dim_qk, dim_v) = (self.config.head_dim_qk(), self.config.head_dim_v());
        Shapes {
            q: [n, heads, dim_qk],
            o: [n, heads, dim_v],
            lse: [n, heads],
            gates: [n, heads, 3],
            indices: [n, groups, self.config.select_count()],
            k: [[blocks, groups, dim_qk], [n, groups, dim_qk], [n, groups, dim_qk]],
            v: [[blocks, groups, dim_v], [n, groups, dim_v], [n, groups, dim_v]],
        }
    }

    /// NSA's forward pass: φ, selection, three branches, gate.
    pub fn nsa_forward(&mut self) -> Result<()> {
        let s = self.shapes();
        for (x, blocks, [tokens, out]) in
            [(&self.k[0], &mut self.k_blocks, [s.k[1], s.k[0]]), (&self.v[0], &mut self.v_blocks, [s.v[1], s.v[0]])]
        {
            let args = compress::Forward {
                config: &self.config,
                packing: &self.packing,
                x: x.tensor(tokens)?,
                position: None,
                phi: compress::Phi::Mean,
                blocks: blocks.tensor_mut(out)?,
            };
            compress::forward(&self.backend, args)?;
        }
        let tokens = self.packing.cu_seqlens();
        let [o_cmp, o_slc, o_win] = self.branches.each_mut().map(|o| o.tensor_mut(s.o));
        let [lse_cmp, lse_slc, lse_win] = self.lse.each_mut().map(|l| l.tensor_mut(s.lse));
        let args = nsa::Forward {
            config: &self.config,
            packing: &self.packing,
            q: self.q.tensor(s.q)?,
            k: [
                Rows::packed(self.k_blocks.tensor(s.k[0])?, &self.cu_blocks),
                Rows::packed(self.k[1].tensor(s.k[1])?, tokens),
                Rows::packed(self.k[2].tensor(s.k[2])?, tokens),
            ],
            v: [
                Rows::packed(self.v_blocks.tensor(s.v[0])?, &self.cu_blocks),
                Rows::packed(self.v[1].tensor(s.v[1])?, tokens),
                Rows::packed(self.v[2].tensor(s.v[2])?, tokens),
            ],
            gates: self.gates.tensor(s.gates)?,
            selection: nsa::Selection::Compute(self.block_indices.tensor_mut(s.indices)?),
            saved: nsa::Saved { o: [o_cmp?, o_slc?, o_win?], lse: [lse_cmp?, lse_slc?, lse_win?] },
            o: self.o.tensor_mut(s.o)?,
        };
        Ok(nsa::forward(&self.backend, args)?)
    }

    /// What neighbouring queries' lists have in common, once the forward pass has run; nothing of fewer than [`NEIGHBOURS`].
    pub fn blocks_in_common(&self) -> Result<Option<String>> {
        let mut lists = vec![0; self.block_indices.len()];
        self.block_indices.read(&mut lists)?;
        let union = union_of_lists(&lists, self.config.num_kv_heads(), self.config.select_count());
        Ok(union.map(|union| format!("{NEIGHBOURS} neighbouring queries select {union:.2} times the blocks of one")))
    }

    /// NSA's backward pass; the forward pass has run.
    pub fn nsa_backward(&mut self) -> Result<()> {
        let s = self.shapes();
        let [dk_cmp, dk_slc, dk_win] = &mut self.grads.k;
        let [dv_cmp, dv_slc, dv_win] = &mut self.grads.v;
        let args = nsa::Backward {
            config: &self.config,
            packing: &self.packing,
            q: self.q.tensor(s.q)?,
            k: [self.k_blocks.tensor(s.k[0])?, self.k[1].tensor(s.k[1])?, self.k[2].tensor(s.k[2])?],
            v: [self.v_blocks.tensor(s.v[0])?, self.v[1].tensor(s.v[1])?, self.v[2].tensor(s.v[2])?],
            gates: self.gates.tensor(s.gates)?,
            block_indices: self.block_indices.tensor(s.indices)?,
            branches: [self.branches[0].tensor(s.o)?, self.branches[1].tensor(s.o)?, self.branches[2].tensor(s.o)?],
            lse: [self.lse[0].tensor(s.lse)?, self.lse[1].tensor(s.lse)?, self.lse[2].tensor(s.lse)?],
            d_o: self.d_o.tensor(s.o)?,
            dq: self.grads.q.tensor_mut(s.q)?,
            dk: [dk_cmp.tensor_mut(s.k[0])?, dk_slc.tensor_mut(s.k[1])?, dk_win.tensor_mut(s.k[2])?],
            dv: [dv_cmp.tensor_mut(s.v[0])?, dv_slc.tensor_mut(s.v[1])?, dv_win.tensor_mut(s.v[2])?],
            d_gates: self.grads.gates.tensor_mut(s.gates)?,
        };
        nsa::backward(&self.backend, args)?;
        let sides = [(&self.k[0], &self.grads.k[0], s.k[1], s.k[0]), (&self.v[0], &self.grads.v[0], s.v[1], s.v[0])];
        for ((x, d_blocks, tokens, blocks), dx) in sides.into_iter().zip(&mut self.grads.x) {
            let args = compress::Backward {
                config: &self.config,
                packing: &self.packing,
                x: x.tensor(tokens)?,
                position: None,
                phi: compress::Phi::Mean,
                d_blocks: d_blocks.tensor(blocks)?,
                dx: dx.tensor_mut(tokens)?,
                d_position: None,
                d_phi: compress::PhiGrad::Mean,
            };
            compress::backward(&self.backend, args)?;
        }
        Ok(())
    }

    /// Full attention's forward pass, on the keys and values of the selected branch.
    pub fn dense_forward(&mut self) -> Result<()> {
        let s = self.shapes();
        let tokens = self.packing.cu_seqlens();
        let args = dense::Forward {
            config: &self.config,
            packing: &self.packing,
            q: self.q.tensor(s.q)?,
            k: Rows::packed(self.k[1].tensor(s.k[1])?, tokens),
            v: Rows::packed(self.v[1].tensor(s.v[1])?, tokens),
            o: self.branches[1].tensor_mut(s.o)?,
            lse: self.lse[1].tensor_mut(s.lse)?,
        };
        Ok(dense::forward(&self.backend, args)?)
    }

    /// Full attention's backward pass; its forward pass has run last.
    pub fn dense_backward(&mut self) -> Result<()> {
        let s = self.shapes();
        let args = dense::Backward {
            config: &self.config,
            packing: &self.packing,
            q: self.q.tensor(s.q)?,
            k: self.k[1].tensor(s.k[1])?,
            v: self.v[1].tensor(s.v[1])?,
            o: self.branches[1].tensor(s.o)?,
            lse: self.lse[1].tensor(s.lse)?,
            d_o: self.d_o.tensor(s.o)?,
            dq: self.grads.q.tensor_mut(s.q)?,
            accumulate: false,
            dk: self.grads.k[1].tensor_mut(s.k[1])?,
            dv: self.grads.v[1].tensor_mut(s.v[1])?,
        };
        Ok(dense::backward(&self.backend, args)?)
    }
}

struct Shapes {
    q: [usize; 3],
    o: [usize; 3],
    lse: [usize; 2],
    gates: [usize; 3],
    indices: [usize; 3],
    k: [[usize; 3]; 3],
    v: [[usize; 3]; 3],
}

/// Bytes of a [`Problem`] of `tokens`, about, with what the operations need beside it.
pub fn bytes<T: Element>(config: &NsaConfig, tokens: usize) -> u64 {
    let (heads, groups) = (config.num_heads() as u64, config.num_kv_heads() as u64);
    let (dim_qk, dim_v) = (config.head_dim_qk() as u64, config.head_dim_v() as u64);
    let (element, acc) = (size_of::<T>() as u64, size_of::<T::Acc>() as u64);
    // q; do, o, three branches; their gradients: dq. Keys and values: three branches, gradients and sums of gradients.
    let queries = heads * (element * (dim_qk + 5 * dim_v) + acc * (dim_qk + 9));
    let rows = 3 * groups * (dim_qk + dim_v) * (element + 2 * acc);
    tokens as u64 * (queries + rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_beside_each_other_are_compared_by_head() {
        // Four queries with two KV heads: the same two blocks; five of eight places, of which one is empty.
        let lists = [[0, 3, 0, 1], [0, 3, 0, 2], [0, 3, 0, 3], [0, 3, 0, -1]].concat();
        assert_eq!(union_of_lists(&lists, 2, 2), Some(4.0 * (2.0 + 4.0) / (8.0 + 7.0)));
        assert_eq!(union_of_lists(&lists[..12], 2, 2), None);
    }

    #[test]
    fn queries_resemble_the_one_before_as_much_as_asked() {
        let correlation = |query_correlation: f64| {
            let mut rng = ChaCha8Rng::seed_from_u64(2);
            let inputs = Inputs { query_correlation };
            inputs.validate().expect("legal");
            let q: Vec<f32> = inputs.queries(200, 64, || rng.random_range(-1.0..1.0));
            let product = |distance: usize| {
                let pairs = q.iter().zip(&q[distance * 64..]);
                pairs.map(|(a, b)| f64::from(a * b)).sum::<f64>() / (q.len() - distance * 64) as f64
            };
            // Of numbers from -1 to 1.
            assert!((product(0) - 1.0 / 3.0).abs() < 0.03, "{}", product(0));
            product(1) / product(0)
        };
        for asked in [0.0, 0.5, 0.9] {
            assert!((correlation(asked) - asked).abs() < 0.03, "{asked}: {}", correlation(asked));
        }
    }
}
