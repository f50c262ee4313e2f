//! Softmax and its gradient over rows of scores, vector by vector. Scores of keys that a row does not see become 0 where
//! they share a vector with ones that it sees.

use crate::cpu::keys::KEYS;
use crate::cpu::simd::{Compute, PAD, Simd};
use nsa_core::Real;
use std::ops::Range;

/// A maximum that can be subtracted: 0 while nothing was seen.
#[inline(always)]
pub(crate) fn finite<A: Real>(max: A) -> A {
    if max == A::neg_infinity() { A::zero() } else { max }
}

/// The vectors that hold some columns, as the column of each one's first lane.
#[inline(always)]
fn vectors<A: Real, S: Simd<A>>(columns: &Range<usize>) -> std::iter::StepBy<Range<usize>> {
    (columns.start / S::WIDTH * S::WIDTH..columns.end).step_by(S::WIDTH)
}

/// A vector with other lanes where its columns, from `at` on, are not seen.
#[inline(always)]
fn seen<A: Real, S: Simd<A>>(s: S, v: S::V, at: usize, columns: &Range<usize>, other: S::V) -> S::V {
    if at >= columns.start && at + S::WIDTH <= columns.end {
        return v;
    }
    s.keep(v, columns.start.saturating_sub(at)..columns.end.saturating_sub(at).min(S::WIDTH), other)
}

/// The greatest of some scores of a row, lane by lane.
#[inline(always)]
fn greatest<A: Real, S: Simd<A>>(s: S, scores: &[A], columns: &Range<usize>) -> S::V {
    let lowest = s.splat(A::neg_infinity());
    let mut best = lowest;
    for at in vectors::<A, S>(columns) {
        best = s.max(seen(s, s.read(&scores[at..]), at, columns, lowest), best);
    }
    best
}

/// scale·score − shift, rounded twice: the greatest scaled score, rounded before it was stored as a maximum or an lse, and
/// this one then cancel exactly, and a single key has weight 1.
#[inline(always)]
fn shifted<A: Real, S: Simd<A>>(s: S, score: S::V, scale: S::V, shift: S::V) -> S::V {
    s.sub(s.mul(score, scale), shift)
}

/// Replaces scores of a row by exp(scale·score − shift) and returns their sum, spread over the lanes: to add lanes up takes
/// as long as to exponentiate a few vectors.
#[inline(always)]
fn exponentiate<A: Real, S: Simd<A>>(s: S, scores: &mut [A], columns: &Range<usize>, scale: A, shift: A) -> S::V {
    let (scale, shift, zero) = (s.splat(scale), s.splat(shift), s.splat(A::zero()));
    let mut sum = zero;
    for at in vectors::<A, S>(columns) {
        let scores = &mut scores[at..];
        let weights = seen(s, s.exp(shifted(s, s.read(scores), scale, shift)), at, columns, zero);
        s.write(scores, weights);
        sum = s.add(sum, weights);
    }
    sum
}

/// One step of the online softmax: scores `[rows, KEYS]` become exp(scale·score − max) with the maximum brought up to
/// date, are added to the sums, and what was summed before is rescaled. NaN is passed over in the maximum and met in the
/// sum.
pub(crate) struct Online<'a, A> {
    /// `[rows, KEYS]`.
    pub(crate) scores: &'a mut [A],
    /// The keys that each row sees: at least one.
    pub(crate) spans: &'a [[usize; 2]],
    /// Which of the states below is each row's.
    pub(crate) states: &'a [usize],
    /// Softmax scale.
    pub(crate) scale: A,
    /// Greatest scaled score so far.
    pub(crate) max: &'a mut [A],
    /// Σ exp(score − max) so far, spread over the lanes of a vector: `[states, PAD]`.
    pub(crate) sum: &'a mut [A],
    /// Σ exp(score − max)·v so far, in rows of whole vectors.
    pub(crate) o: &'a mut [A],
    /// Distance between rows of `o`.
    pub(crate) o_stride: usize,
}

impl<A: Real> Online<'_, A> {
    /// Row i of the scores.
    #[inline(always)]
    fn row<S: Simd<A>>(&mut self, s: S, i: usize, columns: Range<usize>) {
        let (row, state) = (&mut self.scores[i * KEYS..][..KEYS], self.states[i]);
        let best = s.mul(greatest(s, row, &columns), s.splat(self.scale));
        let mut sums = s.read(&self.sum[state * PAD..]);
        // Most tiles do not raise the maximum.
        if s.any_greater(best, s.splat(self.max[state])) {
            let new = s.greatest(best);
            // 0 where nothing was seen before: so are the sums.
            let decay = s.exp(s.splat(self.max[state] - new));
            sums = s.mul(sums, decay);
            for part in self.o[state * self.o_stride..][..self.o_stride].chunks_exact_mut(S::WIDTH) {
                let v = s.mul(s.read(part), decay);
                s.write(part, v);
            }
            self.max[state] = new;
        }
        let weights = exponentiate(s, row, &columns, self.scale, finite(self.max[state]));
        s.write(&mut self.sum[state * PAD..], s.add(sums, weights));
    }
}

impl<'a, A: Real> Compute<A> for Online<'a, A> {
    type As<B: Real> = Online<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(mut self, s: S) {
        for (i, &[start, end]) in self.spans.iter().enumerate() {
            // Most rows see a whole tile: known columns leave no questions to the loops.
            if (start, end) == (0, KEYS) {
                self.row(s, i, 0..KEYS);
            } else {
                self.row(s, i, start..end);
            }
        }
    }

    fn cast<B: Real>(self) -> Online<'a, B> {
        Online {
            scores: bytemuck::cast_slice_mut(self.scores),
            spans: self.spans,
            states: self.states,
            scale: bytemuck::cast(self.scale),
            max: bytemuck::cast_slice_mut(self.max),
            sum: bytemuck::cast_slice_mut(self.sum),
            o: bytemuck::cast_slice_mut(self.o),
            o_stride: self.o_stride,
        }
    }
}

/// Sums of rows that were spread over the lanes of a vector.
pub(crate) struct Lanes<'a, A> {
    /// `[rows, PAD]`, of which the first lanes are in use.
    pub(crate) lanes: &'a [A],
    /// Written: one a row.
    pub(crate) sums: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for Lanes<'a, A> {
    type As<B: Real> = Lanes<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        for (lanes, sum) in self.lanes.chunks_exact(PAD).zip(self.sums) {
            *sum = s.sum(s.read(lanes));
        }
    }

    fn cast<B: Real>(self) -> Lanes<'a, B> {
        Lanes { lanes: bytemuck::cast_slice(self.lanes), sums: bytemuck::cast_slice_mut(self.sums) }
    }
}

/// The softmax of whole rows: scores `[rows, stride]` become exp(scale·score − max).
pub(crate) struct Whole<'a, A> {
    /// `[rows, stride]`, in whole vectors.
    pub(crate) scores: &'a mut [A],
    /// Distance between rows.
    pub(crate) stride: usize,
    /// The keys that each row sees.
    pub(crate) spans: &'a [[usize; 2]],
    /// Softmax scale.
    pub(crate) scale: A,
    /// Written: greatest scaled score of each row.
    pub(crate) max: &'a mut [A],
    /// Written: Σ exp(score − max) of each row.
    pub(crate) sum: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for Whole<'a, A> {
    type As<B: Real> = Whole<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        for (i, &[start, end]) in self.spans.iter().enumerate() {
            let row = &mut self.scores[i * self.stride..][..self.stride];
            self.max[i] = s.greatest(greatest(s, row, &(start..end))) * self.scale;
            let sum = exponentiate(s, row, &(start..end), self.scale, finite(self.max[i]));
            self.sum[i] = s.sum(sum);
        }
    }

    fn cast<B: Real>(self) -> Whole<'a, B> {
        Whole {
            scores: bytemuck::cast_slice_mut(self.scores),
            stride: self.stride,
            spans: self.spans,
            scale: bytemuck::cast(self.scale),
            max: bytemuck::cast_slice_mut(self.max),
            sum: bytemuck::cast_slice_mut(self.sum),
        }
    }
}

/// Σ over the rows of weights `[rows, stride]`, each times its factor, in the rows' order.
pub(crate) struct Mix<'a, A> {
    /// `[rows, stride]`, in whole vectors.
    pub(crate) weights: &'a [A],
    /// Distance between rows.
    pub(crate) stride: usize,
    /// One a row.
    pub(crate) factors: &'a [A],
    /// Written: whole vectors, at most a row's.
    pub(crate) mixed: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for Mix<'a, A> {
    type As<B: Real> = Mix<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        for (v, mixed) in self.mixed.chunks_exact_mut(S::WIDTH).enumerate() {
            let mut sum = s.splat(A::zero());
            for (i, &factor) in self.factors.iter().enumerate() {
                sum = s.mul_add(s.read(&self.weights[i * self.stride + v * S::WIDTH..]), s.splat(factor), sum);
            }
            s.write(mixed, sum);
        }
    }

    fn cast<B: Real>(self) -> Mix<'a, B> {
        Mix {
            weights: bytemuck::cast_slice(self.weights),
            stride: self.stride,
            factors: bytemuck::cast_slice(self.factors),
            mixed: bytemuck::cast_slice_mut(self.mixed),
        }
    }
}

/// The gradient of the softmax: scores `[rows, KEYS]` become g·p with p = exp(scale·score − lse), and do·v becomes
/// scale·ds = scale·p·(g·do·v − δ), for the columns of whole vectors at hand; 0 for keys that a row does not see.
pub(crate) struct Gradient<'a, A> {
    /// Scores, then g·p, `[rows, KEYS]`.
    pub(crate) scores: &'a mut [A],
    /// do·v, then scale·ds, `[rows, KEYS]`.
    pub(crate) d_scores: &'a mut [A],
    /// The keys that each row sees.
    pub(crate) spans: &'a [[usize; 2]],
    /// The keys that some row sees.
    pub(crate) columns: Range<usize>,
    /// Softmax scale.
    pub(crate) scale: A,
    /// One a row.
    pub(crate) lse: &'a [A],
    /// δ, one a row.
    pub(crate) delta: &'a [A],
    /// g, one a row.
    pub(crate) gates: &'a [A],
}

impl<A: Real> Gradient<'_, A> {
    /// Row i of the scores, of which it sees `span`, in some columns.
    #[inline(always)]
    fn row<S: Simd<A>>(&mut self, s: S, i: usize, span: Range<usize>, columns: Range<usize>) {
        let (scale, zero) = (s.splat(self.scale), s.splat(A::zero()));
        let (lse, delta, gate) = (s.splat(self.lse[i]), s.splat(self.delta[i]), s.splat(self.gates[i]));
        let (scores, d_scores) = (&mut self.scores[i * KEYS..][..KEYS], &mut self.d_scores[i * KEYS..][..KEYS]);
        for at in vectors::<A, S>(&columns) {
            let (scores, d_scores) = (&mut scores[at..], &mut d_scores[at..]);
            let p = seen(s, s.exp(shifted(s, s.read(scores), scale, lse)), at, &span, zero);
            let inner = s.sub(s.mul(gate, s.read(d_scores)), delta);
            let ds = seen(s, s.mul(s.mul(p, inner), scale), at, &span, zero);
            s.write(scores, s.mul(p, gate));
            s.write(d_scores, ds);
        }
    }
}

impl<'a, A: Real> Compute<A> for Gradient<'a, A> {
    type As<B: Real> = Gradient<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(mut self, s: S) {
        for (i, &[start, end]) in self.spans.iter().enumerate() {
            if (start, end) == (0, KEYS) {
                self.row(s, i, 0..KEYS, 0..KEYS);
            } else {
                self.row(s, i, start..end, self.columns.clone());
            }
        }
    }

    fn cast<B: Real>(self) -> Gradient<'a, B> {
        Gradient {
            scores: bytemuck::cast_slice_mut(self.scores),
            d_scores: bytemuck::cast_slice_mut(self.d_scores),
            spans: self.spans,
            columns: self.columns,
            scale: bytemuck::cast(self.scale),
            lse: bytemuck::cast_slice(self.lse),
            delta: bytemuck::cast_slice(self.delta),
            gates: bytemuck::cast_slice(self.gates),
        }
    }
}

/// The softmax of columns: scores `[keys, lanes]` become exp(scale·score − max), one row of queries a lane.
pub(crate) struct Columns<'a, A> {
    /// `[keys, lanes]`.
    pub(crate) scores: &'a mut [A],
    /// Softmax scale.
    pub(crate) scale: A,
    /// Written: greatest scaled score of each lane. Whole vectors.
    pub(crate) max: &'a mut [A],
    /// Written: Σ exp(score − max) of each lane.
    pub(crate) sum: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for Columns<'a, A> {
    type As<B: Real> = Columns<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        let lanes = self.max.len();
        let scale = s.splat(self.scale);
        for at in (0..lanes).step_by(S::WIDTH) {
            let mut best = s.splat(A::neg_infinity());
            for key in self.scores.chunks_exact(lanes) {
                best = s.max(s.read(&key[at..]), best);
            }
            s.write(&mut self.max[at..], s.mul(best, scale));
            // The sums' place serves for what is subtracted.
            for (shift, &max) in self.sum[at..at + S::WIDTH].iter_mut().zip(&self.max[at..]) {
                *shift = finite(max);
            }
            let shift = s.read(&self.sum[at..]);
            let mut sum = s.splat(A::zero());
            for key in self.scores.chunks_exact_mut(lanes) {
                let weight = s.exp(shifted(s, s.read(&key[at..]), scale, shift));
                s.write(&mut key[at..], weight);
                sum = s.add(sum, weight);
            }
            s.write(&mut self.sum[at..], sum);
        }
    }

    fn cast<B: Real>(self) -> Columns<'a, B> {
        Columns {
            scores: bytemuck::cast_slice_mut(self.scores),
            scale: bytemuck::cast(self.scale),
            max: bytemuck::cast_slice_mut(self.max),
            sum: bytemuck::cast_slice_mut(self.sum),
        }
    }
}

/// Σ over the lanes of weights `[keys, lanes]`, each times its factor: one number a key.
pub(crate) struct MixLanes<'a, A> {
    /// `[keys, lanes]`.
    pub(crate) weights: &'a [A],
    /// One a lane: whole vectors.
    pub(crate) factors: &'a [A],
    /// Written: one a key.
    pub(crate) mixed: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for MixLanes<'a, A> {
    type As<B: Real> = MixLanes<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        for (key, mixed) in self.weights.chunks_exact(self.factors.len()).zip(self.mixed) {
            let mut sum = s.splat(A::zero());
            for (weights, factors) in key.chunks_exact(S::WIDTH).zip(self.factors.chunks_exact(S::WIDTH)) {
                sum = s.mul_add(s.read(weights), s.read(factors), sum);
            }
            *mixed = s.sum(sum);
        }
    }

    fn cast<B: Real>(self) -> MixLanes<'a, B> {
        MixLanes {
            weights: bytemuck::cast_slice(self.weights),
            factors: bytemuck::cast_slice(self.factors),
            mixed: bytemuck::cast_slice_mut(self.mixed),
        }
    }
}
