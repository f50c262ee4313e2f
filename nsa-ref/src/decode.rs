//! Token-by-token decoding of one sequence with the caches of SPEC 4.

use crate::branch::Output;
use crate::compress::{self, Phi};
use crate::{Arithmetic, Result, Tensor, attention, gate, select};
use nsa_core::{CuSeqlens, NsaConfig, Packing};

const OP: &str = "decode";

/// What one token brings: rows `[Hq, Dk]`, `[G, Dk]`, `[G, Dv]` and gates `[Hq, 3]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Query.
    pub q: Tensor,
    /// Keys of cmp, slc, win.
    pub k: [Tensor; 3],
    /// Values of cmp, slc, win.
    pub v: [Tensor; 3],
    /// Gates after the sigmoid.
    pub gates: Tensor,
}

/// What one step yields.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// `[Hq, Dv]`.
    pub o: Tensor,
    /// Selected blocks, one list of n a group.
    pub block_indices: Vec<Vec<i32>>,
    /// Token-rows of K and V read, for the group that reads most.
    pub rows_read: usize,
}

/// φ of keys or values with its position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Compressor {
    /// e `[l, G, D]`.
    pub position: Option<Tensor>,
    /// φ.
    pub phi: Phi,
}

/// The caches of one sequence. Each entry is one row `[G, D]`.
#[derive(Clone, Debug)]
pub struct Cache {
    config: NsaConfig,
    compressors: [Compressor; 2],
    tokens: usize,
    /// k^slc, v^slc of all tokens.
    slc: [Vec<Tensor>; 2],
    /// k̃, ṽ of all complete blocks.
    blocks: [Vec<Tensor>; 2],
    /// Ring of the last l raw k^cmp, v^cmp: position s in place s mod l.
    pending: [Vec<Tensor>; 2],
    /// Ring of the last w k^win, v^win: position s in place s mod w.
    window: [Vec<Tensor>; 2],
}

impl Cache {
    /// Caches before the first token; `compressors` for keys and values.
    ///
    /// # Errors
    /// If a shape does not fit or φ is not of the configuration's kind.
    pub fn new(config: NsaConfig, compressors: [Compressor; 2]) -> Result<Self> {
        let sides = [("pe_k", "phi_k", config.head_dim_qk()), ("pe_v", "phi_v", config.head_dim_v())];
        for (Compressor { position, phi }, (e, name, dim)) in compressors.iter().zip(sides) {
            let shape = [config.compress_block(), config.num_kv_heads(), dim];
            position.as_ref().map_or(Ok(()), |position| position.check(OP, e, &shape))?;
            phi.check(OP, name, &config, dim)?;
        }
        let empty = || [Vec::new(), Vec::new()];
        let (slc, blocks, pending, window) = (empty(), empty(), empty(), empty());
        Ok(Self { config, compressors, tokens: 0, slc, blocks, pending, window })
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether no token has come yet.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Rows held: (selected, blocks, pending ring, window ring).
    pub fn rows(&self) -> (usize, usize, usize, usize) {
        (self.slc[0].len(), self.blocks[0].len(), self.pending[0].len(), self.window[0].len())
    }

    /// Appends a token and attends from it.
    ///
    /// **Source**: SPEC 4.
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn step<A: Arithmetic>(&mut self, a: &A, token: &Token) -> Result<Step> {
        self.append(a, token)?;
        self.attend(a, token)
    }

    /// Appends a token without attending from it, as a prefill does whose outputs come from [`crate::nsa::forward`]:
    /// the block that it completes, when t + 1 ≥ l and (t + 1 − l) mod d = 0, is compressed.
    ///
    /// **Source**: SPEC 4.
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn append<A: Arithmetic>(&mut self, a: &A, token: &Token) -> Result<()> {
        self.check(token)?;
        let (t, l, d) = (self.tokens, self.config.compress_block(), self.config.compress_stride());
        for (side, [cmp, slc, win]) in [&token.k, &token.v].into_iter().enumerate() {
            self.slc[side].push(slc.clone());
            put(&mut self.pending[side], t % l, cmp);
            put(&mut self.window[side], t % self.config.window(), win);
        }
        self.tokens += 1;
        if t + 1 >= l && (t + 1 - l).is_multiple_of(d) {
            self.compress(a)?;
        }
        Ok(())
    }

    fn check(&self, token: &Token) -> Result<()> {
        let (heads, groups) = (self.config.num_heads(), self.config.num_kv_heads());
        token.q.check(OP, "q", &[heads, self.config.head_dim_qk()])?;
        token.gates.check(OP, "gates", &[heads, 3])?;
        for (c, branch) in ["cmp", "slc", "win"].into_iter().enumerate() {
            token.k[c].check(OP, &format!("k_{branch}"), &[groups, self.config.head_dim_qk()])?;
            token.v[c].check(OP, &format!("v_{branch}"), &[groups, self.config.head_dim_v()])?;
        }
        Ok(())
    }

    /// Compresses the last l tokens into the next block.
    fn compress<A: Arithmetic>(&mut self, a: &A) -> Result<()> {
        let l = self.config.compress_block();
        for side in 0..2 {
            let order = (self.tokens - l..self.tokens).map(|s| &self.pending[side][s % l]);
            let data: Vec<f64> = order.flat_map(|row| row.data.clone()).collect();
            let row_shape = &self.pending[side][0].shape;
            let x = Tensor::new(&[l, row_shape[0], row_shape[1]], data);
            let one = Packing::new(CuSeqlens::single(l)?);
            let Compressor { position, phi } = &self.compressors[side];
            let block = compress::forward(a, &self.config, &one, &x, position.as_ref(), phi)?;
            self.blocks[side].push(Tensor::new(row_shape, block.data));
        }
        Ok(())
    }

    fn attend<A: Arithmetic>(&self, a: &A, token: &Token) -> Result<Step> {
        let (heads, groups, dim_v) = (self.config.num_heads(), self.config.num_kv_heads(), self.config.head_dim_v());
        let empty = || Output { o: Tensor::zeros(&[1, heads, dim_v]), lse: Tensor::zeros(&[1, heads]) };
        let mut branches = [empty(), empty(), empty()];
        let (mut block_indices, mut rows_read) = (Vec::new(), 0);
        for g in 0..groups {
            let importance = self.branch(a, token, g, &self.blocks, all(&self.blocks), &mut branches[0]);
            let scores = select::scores(a, &self.config, self.tokens - 1, &importance);
            let list = select::choose(&self.config, &scores);
            let size = self.config.select_block();
            let selected: Vec<usize> = list
                .iter()
                .filter(|&&j| j >= 0)
                .flat_map(|&j| j as usize * size..(j as usize + 1) * size)
                .filter(|&s| s < self.tokens)
                .collect();
            rows_read = rows_read.max(self.blocks[0].len() + selected.len() + self.window[0].len());
            self.branch(a, token, g, &self.slc, selected, &mut branches[1]);
            self.branch(a, token, g, &self.window, all(&self.window), &mut branches[2]);
            block_indices.push(list);
        }
        let gates = Tensor::new(&[1, heads, 3], token.gates.data.clone());
        let o = gate::forward(a, &gates, branches.each_ref().map(|b| &b.o))?;
        Ok(Step { o: Tensor::new(&[heads, dim_v], o.data), block_indices, rows_read })
    }

    /// Attention of the heads of group `g` over these rows; returns the probabilities summed over the heads.
    fn branch<A: Arithmetic>(
        &self,
        a: &A,
        token: &Token,
        g: usize,
        [k, v]: &[Vec<Tensor>; 2],
        rows: Vec<usize>,
        output: &mut Output,
    ) -> Vec<f64> {
        let keys: Vec<&[f64]> = rows.iter().map(|&r| k[r].row(&[g])).collect();
        let values: Vec<&[f64]> = rows.iter().map(|&r| v[r].row(&[g])).collect();
        let mut importance = vec![0.0; rows.len()];
        let group_size = self.config.group_size();
        for h in g * group_size..(g + 1) * group_size {
            let dim_v = self.config.head_dim_v();
            let row = attention::forward(a, self.config.scale(), token.q.row(&[h]), &keys, &values, dim_v);
            output.o.row_mut(&[0, h]).copy_from_slice(&row.o);
            output.lse.row_mut(&[0])[h] = row.lse;
            a.add_scaled(&mut importance, 1.0, &row.probabilities);
        }
        importance
    }
}

fn put(ring: &mut Vec<Tensor>, place: usize, row: &Tensor) {
    if place < ring.len() {
        ring[place] = row.clone();
    } else {
        ring.push(row.clone());
    }
}

fn all([k, _]: &[Vec<Tensor>; 2]) -> Vec<usize> {
    (0..k.len()).collect()
}
