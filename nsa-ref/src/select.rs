//! Selection: importance of compression blocks, scores of selection blocks, and the choice (SPEC 2.2), written out
//! without the shared index arithmetic, so that it checks it.

use crate::Arithmetic;
use nsa_core::NsaConfig;

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
}

/// S_j = Σ_{m < l'/d} Σ_{r < l/d} P_{(l'/d)·j + m − r} for the candidates j ≤ ⌊t/l'⌋; terms outside 0..M are 0.
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
/// ascending, padded with −1 to n.
pub fn choose(config: &NsaConfig, scores: &[f64]) -> Vec<i32> {
    let candidates = scores.len();
    let forced = |j: usize| j < config.select_initial() || j + config.select_local() >= candidates;
    let mut order: Vec<usize> = (0..candidates).collect();
    // A stable sort: equal keys stay in the order of their numbers.
    order.sort_by(|&i, &j| forced(j).cmp(&forced(i)).then(scores[j].total_cmp(&scores[i])));
    order.truncate(config.select_count());
    order.sort_unstable();
    let mut list: Vec<i32> = order.into_iter().map(|j| j as i32).collect();
    list.resize(config.select_count(), -1);
    list
}
