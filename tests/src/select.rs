//! Selections compared as sets: a difference passes only on a near tie within the scores' error.

use crate::compare::{F64_NOISE, WORST_RATIO, unit_roundoff};
use nsa_core::{DType, NsaConfig, Packing, index};

/// The kernel's block lists beside the reference's.
#[derive(Clone, Debug)]
pub struct Selections<'a> {
    /// Heads, block sizes.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// The kernel's lists `[N, G, n]`.
    pub kernel: &'a [i32],
    /// The truth's lists `[N, G, n]`.
    pub truth: &'a [i32],
    /// The truth's scores, one list a query and group.
    pub scores: &'a [Vec<f64>],
    /// The rounded references' scores.
    pub rounded: [&'a [Vec<f64>]; 2],
    /// Type that scores are summed in.
    pub accumulator: DType,
}

impl Selections<'_> {
    /// How far two scores may be from their true order: their error in the rounded reference, for both, as far as a
    /// kernel may exceed it; at least a few ulps of a group's probability mass.
    fn bound(&self) -> f64 {
        let errors = self.rounded.iter().flat_map(|rounded| self.scores.iter().zip(rounded.iter()));
        let errors = errors.flat_map(|(a, b)| a.iter().zip(b).map(|(x, y)| (x - y).abs()));
        // The rounded references of an f64 kernel run in f32: their errors count in ulps, as in the comparison.
        let ulps = match self.accumulator {
            DType::F64 => F64_NOISE * unit_roundoff(DType::F64) / unit_roundoff(DType::F32),
            _ => 1.0,
        };
        let span = self.config.compress_block() / self.config.compress_stride();
        let mass = (self.config.group_size() * span) as f64;
        let floor = 4.0 * unit_roundoff(self.accumulator) * mass;
        2.0 * (WORST_RATIO * ulps * errors.fold(0.0, f64::max)).max(floor)
    }

    /// Judges every list; returns the number of lists that differ on near ties.
    ///
    /// # Errors
    /// Names the query and group of a list that breaks the policy's form or takes a clearly worse block.
    pub fn judge(&self) -> Result<usize, String> {
        let (groups, count, bound) = (self.config.num_kv_heads(), self.config.select_count(), self.bound());
        if self.kernel.len() != self.truth.len() {
            return Err(format!("{} block indices instead of {}", self.kernel.len(), self.truth.len()));
        }
        let mut near_ties = 0;
        for seq in self.packing.seqs() {
            for row in seq.rows.clone() {
                let t = seq.context + row - seq.rows.start;
                for g in 0..groups {
                    let list = row * groups + g;
                    let (kernel, truth) = (&self.kernel[list * count..][..count], &self.truth[list * count..][..count]);
                    if kernel != truth {
                        let fault =
                            |rule: String| format!("query {row}, group {g}: {kernel:?} instead of {truth:?}: {rule}");
                        self.form(t, kernel).map_err(&fault)?;
                        self.near_tie(kernel, truth, &self.scores[list], bound).map_err(&fault)?;
                        near_ties += 1;
                    }
                }
            }
        }
        Ok(near_ties)
    }

    /// Ascending, padded, as long as it should be, with the forced blocks.
    fn form(&self, t: usize, list: &[i32]) -> Result<(), String> {
        let candidates = index::num_candidates(self.config, t);
        let used = candidates.min(self.config.select_count());
        let ascending = list[..used].windows(2).all(|pair| pair[0] < pair[1]);
        let inside = list[..used].iter().all(|&j| j >= 0 && (j as usize) < candidates);
        if !ascending || !inside || list[used..].iter().any(|&j| j != -1) {
            return Err(format!("expected {used} blocks below {candidates}, ascending, then -1"));
        }
        match (0..candidates).find(|&j| index::is_forced(self.config, j, candidates) && !list.contains(&(j as i32))) {
            Some(j) => Err(format!("block {j} is forced")),
            None => Ok(()),
        }
    }

    fn near_tie(&self, kernel: &[i32], truth: &[i32], scores: &[f64], bound: f64) -> Result<(), String> {
        for &taken in kernel.iter().filter(|j| !truth.contains(j)) {
            for &left in truth.iter().filter(|j| !kernel.contains(j)) {
                let (worse, better) = (scores[taken as usize], scores[left as usize]);
                if better - worse > bound {
                    return Err(format!("S_{left} = {better:e} exceeds S_{taken} = {worse:e} by more than {bound:e}"));
                }
                // Blocks without a visible compression block have a score of exactly 0 on every backend.
                if better == 0.0 && worse == 0.0 {
                    return Err(format!("S_{left} = S_{taken} = 0: ties go to the lower block"));
                }
            }
        }
        Ok(())
    }
}
