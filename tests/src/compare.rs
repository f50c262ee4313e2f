//! Comparison against the error model: truth in f64, and the same mathematics rounded where a kernel rounds. A kernel
//! is right if its error is about the rounded one's: within the ratios, the factor for chance and the floors below, each
//! with its reason.

use crate::generate;
use nsa_core::{DType, Element};

/// A kernel's largest error, and its worst row's RMS error, over the rounded reference's.
pub const WORST_RATIO: f64 = 1.5;
/// A kernel's RMS error over the rounded reference's.
pub const RMS_RATIO: f64 = 1.1;
/// Standard errors that chance may add to both ratios. An RMS of N draws has a relative standard error of 1/√(2N), the
/// ratio of two such 1/√N; a call of N tokens makes about N independent draws, at most one an element. Three, because
/// the table makes some thousands of comparisons. At 1025 tokens that is 9 %.
const CHANCE: f64 = 3.0;
/// Ulps of the accumulator, at the largest value of the output, that a kernel's error may reach in any case.
///
/// The ratios above compare draws of rounding noise; over few or short sums that says nothing: with one key the rounded
/// loops can be exact by luck (0 · 1.5 is still 0) while a kernel that sums in eight lanes is an ulp away. Four ulps
/// (2.4e-7 in f32) cover the few roundings that every output has; the planted faults are larger.
const FLOOR_ULPS: f64 = 4.0;
/// The same for outputs whose terms cancel: ulps at the bound of the terms (`Compared::magnitude`, from the largest rows
/// of the inputs, so that typical terms are several times smaller). With one token dq is exactly 0, and a kernel that
/// sums do·v and δ in different orders is off by a fraction of an ulp of ‖do‖·‖v‖.
const TERM_ULPS: f64 = 0.5;

/// Errors of an f64 kernel over those of f32 in ulps: the truth has the same noise as the kernel, and with mixed orders of
/// summation their difference is up to three times either's.
pub const F64_NOISE: f64 = 3.0;

/// What a kernel wrote beside what it should have written.
#[derive(Clone, Debug)]
pub struct Compared {
    /// The output's name.
    pub tensor: String,
    /// In f64.
    pub truth: Vec<f64>,
    /// Rounded where a kernel rounds: one version an order of summation and multiple of P and dS. Two draws of rounding noise over
    /// few independent sums differ by chance; more draws say what is usual.
    pub rounded: Vec<Vec<f64>>,
    /// The kernel's.
    pub kernel: Vec<f64>,
    /// Elements of a row.
    pub row: usize,
    /// Type that the output is stored in.
    pub storage: DType,
    /// Type that the kernel accumulates in.
    pub accumulator: DType,
    /// Independent draws of rounding noise, at least about: tokens of the call, or blocks for what comes through φ.
    pub draws: usize,
    /// What the arithmetic may err in every element by its documentation, absolute; 0 where it rounds as IEEE 754 asks.
    pub approximated: f64,
    /// A bound on the terms that the output is summed from (Cauchy–Schwarz over the inputs): results may cancel, the
    /// noise of their terms does not.
    pub magnitude: f64,
}

/// Sizes of an error.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// The largest.
    pub max: f64,
    /// RMS over all elements.
    pub rms: f64,
    /// RMS of the worst row.
    pub row_rms: f64,
}

/// The verdict on one output.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The output's name.
    pub tensor: String,
    /// The kernel's error.
    pub kernel: Figures,
    /// The rounded reference's error.
    pub rounded: Figures,
    /// RMS of the truth.
    pub size: f64,
    /// What the kernel's error may be.
    pub limit: Figures,
    /// A hash of every bit that the kernel wrote.
    pub bits: u64,
    /// What is wrong, if anything is.
    pub failure: Option<String>,
}

impl Outcome {
    /// The kernel's errors over what they may be, the worst of the three: above 1 is red.
    pub fn worst_share(&self) -> f64 {
        let share = |error: f64, limit: f64| if error == 0.0 { 0.0 } else { error / limit };
        share(self.kernel.max, self.limit.max)
            .max(share(self.kernel.rms, self.limit.rms))
            .max(share(self.kernel.row_rms, self.limit.row_rms))
    }

    /// What is wrong, if the errors are more than `factor` times what they may be, or no errors of rounding at all.
    pub fn failure_beyond(&self, factor: f64) -> Option<&str> {
        let compared = self.limit.max > 0.0;
        self.failure.as_deref().filter(|_| !(compared && self.worst_share() <= factor))
    }
}

/// Half an ulp at 1: what one rounding to nearest may cost, relative.
pub fn unit_roundoff(dtype: DType) -> f64 {
    let bits = match dtype {
        DType::Bf16 => 8,
        DType::F16 => 11,
        DType::F32 => 24,
        DType::F64 => 53,
    };
    0.5f64.powi(bits)
}

/// Largest difference of two outputs over the largest finite number expected: numbers that are equal, infinite ones too, differ by
/// nothing, a NaN from anything by infinity.
///
/// # Panics
/// If one has more elements than the other.
pub fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let distance = |(&x, &y): (&f32, &f32)| match (x - y).abs() {
        _ if x == y => 0.0,
        distance if distance.is_nan() => f32::INFINITY,
        distance => distance,
    };
    let worst = got.iter().zip(expected).map(distance).fold(0.0, f32::max);
    let largest = expected.iter().filter(|x| x.is_finite()).fold(0.0f32, |max, x| max.max(x.abs()));
    if worst == 0.0 { 0.0 } else { worst / largest }
}

/// An output of storage type `T` in its versions: truth, two rounded, the kernel's.
pub(crate) fn compared<T: Element>(name: &str, versions: [Vec<f64>; 4], row: usize, magnitude: f64) -> Compared {
    let [truth, first, second, kernel] = versions;
    Compared {
        tensor: name.to_owned(),
        truth,
        rounded: vec![first, second],
        kernel,
        row,
        storage: T::DTYPE,
        accumulator: <T::Acc as Element>::DTYPE,
        magnitude,
        draws: usize::MAX,
        approximated: 0.0,
    }
}

impl Compared {
    /// Judges the kernel's output.
    pub fn judge(&self) -> Outcome {
        let mut outcome = Outcome {
            tensor: self.tensor.clone(),
            kernel: Figures::default(),
            rounded: Figures::default(),
            size: 0.0,
            limit: Figures::default(),
            bits: generate::hash(self.kernel.iter().flat_map(|x| x.to_bits().to_le_bytes())),
            failure: None,
        };
        if self.kernel.len() != self.truth.len() {
            let (kernel, truth) = (self.kernel.len(), self.truth.len());
            outcome.failure = Some(format!("{kernel} elements instead of {truth}"));
            return outcome;
        }
        if let Some(version) = self.rounded.iter().find(|version| version.len() != self.truth.len()) {
            let (rounded, truth) = (version.len(), self.truth.len());
            outcome.failure = Some(format!("the rounded reference has {rounded} elements instead of {truth}"));
            return outcome;
        }
        if let Some(failure) = self.not_finite() {
            outcome.failure = Some(failure);
            return outcome;
        }
        outcome.kernel = self.figures(&self.kernel);
        outcome.rounded = self.rounded_figures();
        let finite: Vec<f64> = self.truth.iter().copied().filter(|x| x.is_finite()).collect();
        outcome.size = rms(finite.iter().copied());
        let largest = finite.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        outcome.limit = self.limit(&outcome.rounded, largest, outcome.size);
        outcome.failure = self.broken(&outcome);
        outcome
    }

    /// What the kernel's error may be: the ratios over the rounded reference's error, or the floor: the output's own
    /// rounding to storage and a few ulps of the accumulator. Of the RMS of a row half of it, and of the RMS over many
    /// elements less, down to a sixteenth or what one more rounding of every element would cost; of one element all.
    fn limit(&self, rounded: &Figures, largest: f64, size: f64) -> Figures {
        let storage = if self.storage == self.accumulator { 0.0 } else { unit_roundoff(self.storage) * largest };
        let ulps = FLOOR_ULPS * largest + TERM_ULPS * self.magnitude;
        let floor = storage + unit_roundoff(self.accumulator) * ulps;
        let count = self.truth.len().max(1) as f64;
        let chance = 1.0 + CHANCE / (self.draws as f64).min(count).max(1.0).sqrt();
        let independent = count.min(self.draws as f64 * self.row.max(1) as f64).max(1.0);
        let rms_floor = (floor / independent.sqrt().min(16.0)).max(unit_roundoff(self.accumulator) * size);
        let row_floor = floor / (self.row.max(1) as f64).sqrt().min(2.0);
        Figures {
            max: (WORST_RATIO * chance * rounded.max).max(floor) + self.approximated,
            // Errors anywhere up to the bound.
            rms: (RMS_RATIO * chance * rounded.rms).max(rms_floor) + self.approximated / 3f64.sqrt(),
            row_rms: (WORST_RATIO * chance * rounded.row_rms).max(row_floor) + self.approximated,
        }
    }

    /// NaN anywhere, the truth included, or infinities that are not the truth's (lse of a row without keys is −∞ in all three).
    fn not_finite(&self) -> Option<String> {
        let wrong = |x: f64, truth: f64| {
            x.is_nan() || truth.is_nan() || ((x.is_infinite() || truth.is_infinite()) && x != truth)
        };
        (0..self.truth.len()).find(|&i| wrong(self.kernel[i], self.truth[i])).map(|i| {
            let (row, column) = (i / self.row.max(1), i % self.row.max(1));
            format!("row {row}, column {column}: {} instead of {}", self.kernel[i], self.truth[i])
        })
    }

    fn errors<'a>(&'a self, values: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        // Infinities are equal here.
        values.iter().zip(&self.truth).map(|(x, truth)| if truth.is_finite() { x - truth } else { 0.0 })
    }

    fn figures(&self, values: &[f64]) -> Figures {
        let errors: Vec<f64> = self.errors(values).collect();
        Figures {
            max: errors.iter().fold(0.0, |m: f64, e| m.max(e.abs())),
            rms: rms(errors.iter().copied()),
            row_rms: errors.chunks(self.row.max(1)).map(|row| rms(row.iter().copied())).fold(0.0, f64::max),
        }
    }

    /// The worst of the rounded versions. Nothing is finer than f64 to be the truth of a kernel that accumulates in f64:
    /// its rounded versions run in f32, and their errors count in f64's ulps.
    fn rounded_figures(&self) -> Figures {
        let ulps = if self.accumulator == DType::F64 {
            F64_NOISE * unit_roundoff(DType::F64) / unit_roundoff(DType::F32)
        } else {
            1.0
        };
        self.rounded.iter().map(|version| self.figures(version)).fold(Figures::default(), |worst, version| Figures {
            max: worst.max.max(ulps * version.max),
            rms: worst.rms.max(ulps * version.rms),
            row_rms: worst.row_rms.max(ulps * version.row_rms),
        })
    }

    fn broken(&self, outcome: &Outcome) -> Option<String> {
        let Outcome { kernel, rounded, limit, .. } = outcome;
        let mut broken = Vec::new();
        for (name, error, rounded, limit) in [
            ("max error", kernel.max, rounded.max, limit.max),
            ("RMS error", kernel.rms, rounded.rms, limit.rms),
            ("worst row's RMS error", kernel.row_rms, rounded.row_rms, limit.row_rms),
        ] {
            // Written so that NaN fails.
            if !matches!(error.partial_cmp(&limit), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
                broken.push(format!("{name} {error:.3e} above {limit:.3e} (rounded reference: {rounded:.3e})"));
            }
        }
        let worst = self.errors(&self.kernel).enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))?;
        let (i, row) = (worst.0, self.row.max(1));
        (!broken.is_empty()).then(|| {
            let place = format!("row {}, column {}", i / row, i % row);
            format!("{}; worst at {place}: {} instead of {}", broken.join("; "), self.kernel[i], self.truth[i])
        })
    }
}

pub(crate) fn rms(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x * x, count + 1));
    (sum / count.max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(kernel: Vec<f64>) -> Compared {
        let truth: Vec<f64> = (0..64).map(|i| (f64::from(i) * 0.7).sin()).collect();
        let rounded = vec![truth.iter().map(|&x| f64::from(x as f32)).collect()];
        Compared {
            tensor: "o".into(),
            truth,
            rounded,
            kernel,
            row: 8,
            storage: DType::F32,
            accumulator: DType::F32,
            approximated: 0.0,
            magnitude: 1.0,
            draws: 8,
        }
    }

    #[test]
    fn rounding_passes_and_anything_larger_fails() {
        let rounded = compared(Vec::new()).rounded.remove(0);
        assert_eq!(compared(rounded.clone()).judge().failure, None);
        let mut off = rounded.clone();
        off[17] += 3e-7;
        let failure = compared(off).judge().failure.unwrap();
        assert!(failure.contains("max error") && failure.contains("row 2, column 1"), "{failure}");
    }

    #[test]
    fn missing_elements_nan_and_infinities_fail() {
        let rounded = compared(Vec::new()).rounded.remove(0);
        assert!(compared(rounded[1..].to_vec()).judge().failure.is_some());
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut kernel = rounded.clone();
            kernel[9] = bad;
            assert!(compared(kernel).judge().failure.unwrap().contains("row 1, column 1"));
        }
        // A finite value where the truth is −∞ is as wrong.
        let mut case = compared(rounded);
        case.truth[3] = f64::NEG_INFINITY;
        assert!(case.judge().failure.is_some());
        case.kernel[3] = f64::NEG_INFINITY;
        case.rounded[0][3] = f64::NEG_INFINITY;
        assert_eq!(case.judge().failure, None);
        // Nothing is right beside a truth that is no number, or in part.
        case.truth[4] = f64::NAN;
        assert!(case.judge().failure.unwrap().contains("instead of NaN"));
        case.truth[4] = case.kernel[4];
        case.rounded[0].pop();
        assert!(case.judge().failure.unwrap().contains("63 elements instead of 64"));
    }

    #[test]
    fn differences_of_what_is_no_number_are_infinite() {
        let inf = f32::INFINITY;
        assert_eq!(difference(&[1.0, -inf, 2.5], &[1.0, -inf, 2.0]), 0.25);
        assert_eq!(difference(&[0.0], &[0.0]), 0.0);
        for (got, expected) in
            [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::NAN, f32::NAN), (inf, -inf), (1.0, inf), (1.0, 0.0)]
        {
            assert_eq!(difference(&[got, 1.0], &[expected, 1.0]).is_infinite(), expected != 0.0, "{got} {expected}");
        }
    }
}
