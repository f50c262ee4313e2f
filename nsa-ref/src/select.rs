//! Selection: importance of compression blocks, scores of selection blocks, and the choice (SPEC 2.2), written out
//! without the shared index arithmetic, so that it checks it.

use crate::{Arithmetic, Error, Result};
use nsa_core::{NsaConfig, Packing, ShapeError};

/// The selected blocks of each query and group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockIndices {
    /// `[N, G, n]`.
    pub shape: [usize; 3],
    /// Ascending per query and group, padded with −1.
    pub data: Vec<i32>,
}

impl BlockIndices {
    /// The list of query `row` and group `g`, padding included.
    pub fn list(&self, row: usize, g: usize) -> &[i32] {
        let [_, groups, n] = self.shape;
        let start = (row * groups + g) * n;
        &self.data[start..start + n]
    }

    /// The blocks of query `row` and group `g`.
    pub fn blocks(&self, row: usize, g: usize) -> impl Iterator<Item = usize> + '_ {
        self.list(row, g).iter().filter(|&&j| j >= 0).map(|&j| j as usize)
    }

    /// Checks that there is a list of n places a query and group, and that each is strictly ascending candidates
    /// j ≤ ⌊t/l'⌋ followed by −1.
    ///
    /// # Errors
    /// If it is not so; the message names the list.
    pub fn check(&self, op: &'static str, config: &NsaConfig, packing: &Packing) -> Result<()> {
        let shape = [packing.num_tokens(), config.num_kv_heads(), config.select_count()];
        ShapeError::check(op, "block_indices", &shape, &self.shape)?;
        ShapeError::check(op, "block_indices (its elements)", &[shape.iter().product()], &[self.data.len()])?;
        for seq in packing.seqs() {
            for (row, t) in seq.rows.clone().zip(seq.context..) {
                for g in 0..config.num_kv_heads() {
                    self.check_list(op, row, g, t / config.select_block())?;
                }
            }
        }
        Ok(())
    }

    fn check_list(&self, op: &'static str, row: usize, g: usize, last: usize) -> Result<()> {
        let list = self.list(row, g);
        let blocks = &list[..list.iter().position(|&j| j == -1).unwrap_or(list.len())];
        let rule = if list[blocks.len()..].iter().any(|&j| j != -1) {
            "after the first -1 there must be nothing else"
        } else if blocks.iter().any(|&j| usize::try_from(j).map_or(true, |j| j > last)) {
            "every block must be one of the query's candidates"
        } else if blocks.windows(2).any(|pair| pair[0] >= pair[1]) {
            "blocks must ascend strictly"
        } else {
            return Ok(());
        };
        Err(Error::Value { op, arg: format!("block_indices[{row}, {g}]"), value: format!("{list:?}"), rule })
    }
}

/// Scores of selection blocks from the importance P of compression blocks 0..M (those that the query sees are enough:
/// the others have none):
/// S_j = Σ_{m < l'/d} Σ_{r < l/d} P_{(l'/d)·j + m − r} for the candidates j ≤ ⌊t/l'⌋; terms outside 0..M are 0.
///
/// **Source**: paper equation 9, with the signs of SPEC 2.2; paper equation 10 is the sum over heads before it.
pub fn scores<A: Arithmetic>(a: &A, config: &NsaConfig, t: usize, importance: &[f64]) -> Vec<f64> {
    let chunks = config.select_block() / config.compress_stride();
    let span = config.compress_block() / config.compress_stride();
    (0..=t / config.select_block())
        .map(|j| {
            let mut sum = 0.0;
            for m in 0..chunks {
                for r in 0..span {
                    if let Some(&p) = (chunks * j + m).checked_sub(r).and_then(|i| importance.get(i)) {
                        sum = a.acc(sum + p);
                    }
                }
            }
            sum
        })
        .collect()
}

/// The blocks of one query: the first n0 and the last nl candidates, then the highest scores, ties to the lower block;
/// ascending, padded with −1 to n. One score a candidate.
///
/// **Source**: paper equation 11; SPEC 2.2.
pub fn choose(config: &NsaConfig, scores: &[f64]) -> Vec<i32> {
    let candidates = scores.len();
    let forced = |j: usize| j < config.select_initial() || j + config.select_local() >= candidates;
    let mut order: Vec<usize> = (0..candidates).collect();
    // A stable sort: equal keys stay in the order of their numbers. Adding 0 makes −0 the equal of 0.
    order.sort_by(|&i, &j| forced(j).cmp(&forced(i)).then((scores[j] + 0.0).total_cmp(&(scores[i] + 0.0))));
    order.truncate(config.select_count());
    order.sort_unstable();
    let mut list: Vec<i32> = order.into_iter().map(|j| j as i32).collect();
    list.resize(config.select_count(), -1);
    list
}
