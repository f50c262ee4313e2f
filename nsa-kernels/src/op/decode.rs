//! One decoding step for a batch of sequences, from their caches (SPEC 4).

use crate::{Backend, Pages, Result, Tensor, TensorMut};
use nsa_core::{Element, NsaConfig};

/// The caches of one sequence for one layer, the current token's keys and values already in them.
#[derive(Debug)]
pub struct Cache<'a, T> {
    /// Tokens so far, the current one included.
    pub context: usize,
    /// k̃ of all complete blocks, `[M, G, Dk]`.
    pub k_cmp: Pages<'a, T>,
    /// ṽ of all complete blocks, `[M, G, Dv]`.
    pub v_cmp: Pages<'a, T>,
    /// k^slc of all tokens, `[context, G, Dk]`.
    pub k_slc: Pages<'a, T>,
    /// v^slc of all tokens, `[context, G, Dv]`.
    pub v_slc: Pages<'a, T>,
    /// Ring of k^win `[w, G, Dk]`: position s lies in row s mod w.
    pub k_win: Tensor<'a, T, 3>,
    /// Ring of v^win `[w, G, Dv]`.
    pub v_win: Tensor<'a, T, 3>,
}

/// Arguments of [`step`].
#[derive(Debug)]
pub struct Step<'a, T: Element> {
    /// Everything.
    pub config: &'a NsaConfig,
    /// One a sequence.
    pub caches: &'a [Cache<'a, T>],
    /// The current tokens' queries `[S, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// After the sigmoid, `[S, Hq, 3]`.
    pub gates: Tensor<'a, T, 3>,
    /// Written: `[S, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: selected blocks `[S, G, n]`, ascending, padded with −1.
    pub block_indices: TensorMut<'a, i32, 3>,
}

/// Token-rows of K and V that a step read, one entry a sequence.
pub type RowsRead = Vec<usize>;
