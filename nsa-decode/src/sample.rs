//! Drawing the next token from logits.

use crate::error::SamplingError;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use std::cmp::Ordering;

/// How tokens are drawn. The steps follow one another in this order, each on what the one before has left:
/// repetition penalty, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token always. At least 0 and finite.
    pub temperature: f64,
    /// Keeps this many likeliest tokens. At least 1.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of likeliest tokens whose probabilities reach this sum. In (0, 1].
    pub top_p: Option<f64>,
    /// Keeps tokens that are at least this share as likely as the likeliest. In [0, 1].
    pub min_p: Option<f64>,
    /// Divides positive and multiplies negative logits of tokens that the sequence holds already; 1 changes nothing.
    /// Positive and finite.
    pub repetition_penalty: f64,
    /// Seed of the generator: the same seed, logits and parameters draw the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// The model's own distribution, seed 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Takes the likeliest token always; ties go to the lower id.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every parameter.
    ///
    /// # Errors
    /// The first rule broken, with the parameter and its value.
    pub fn check(&self) -> Result<(), SamplingError> {
        let rule = |holds: bool, field, value: &dyn ToString, rule| match holds {
            true => Ok(()),
            false => Err(SamplingError::Parameter { field, value: value.to_string(), rule }),
        };
        let temperature = self.temperature;
        rule(
            temperature >= 0.0 && temperature.is_finite(),
            "temperature",
            &temperature,
            "must be at least 0 and finite",
        )?;
        if let Some(k) = self.top_k {
            rule(k >= 1, "top_k", &k, "must be at least 1")?;
        }
        if let Some(p) = self.top_p {
            rule(p > 0.0 && p <= 1.0, "top_p", &p, "must be above 0 and at most 1")?;
        }
        if let Some(p) = self.min_p {
            rule((0.0..=1.0).contains(&p), "min_p", &p, "must be at least 0 and at most 1")?;
        }
        let penalty = self.repetition_penalty;
        rule((1e-3..=1e3).contains(&penalty), "repetition_penalty", &penalty, "must be from 0.001 to 1000")
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// Its probability among those left; while filters run, its logit.
    pub probability: f64,
}

/// Refuses logits that have no distribution.
fn check(logits: &[f32]) -> Result<(), SamplingError> {
    if let Some(token) = logits.iter().position(|&logit| logit.is_nan() || logit == f32::INFINITY) {
        return Err(SamplingError::Logit { token, value: logits[token] });
    }
    match logits.iter().any(|&logit| logit > f32::NEG_INFINITY) {
        true => Ok(()),
        false => Err(SamplingError::NoCandidate { count: logits.len() }),
    }
}

/// The token with the greatest logit, the first of several; none is NaN.
fn likeliest(logits: &[f32]) -> u32 {
    // Eight maxima, which the compiler keeps in vectors.
    let (chunks, rest) = logits.as_chunks::<8>();
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 8];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, logit);
        }
    }
    let greatest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| greater(a, b));
    logits.iter().position(|&logit| logit == greatest).map_or(0, |token| token as u32)
}

/// Likelier first, ties to the lower id: a total order, so that every filter is deterministic.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.probability.total_cmp(&a.probability).then(a.token.cmp(&b.token))
}

/// Draws tokens, with a generator of its own and scratch that is kept from draw to draw.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha12Rng,
    candidates: Vec<Candidate>,
    seen: Vec<bool>,
}

impl Sampler {
    /// A sampler; `stream` tells apart the sequences of a batch, which share a seed but not their random numbers.
    ///
    /// # Errors
    /// If a parameter breaks a rule.
    pub fn new(sampling: Sampling, stream: u64) -> Result<Self, SamplingError> {
        sampling.check()?;
        let mut rng = ChaCha12Rng::seed_from_u64(sampling.seed);
        rng.set_stream(stream);
        Ok(Self { sampling, rng, candidates: Vec::new(), seen: Vec::new() })
    }

    /// The parameters.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Draws the next token; `history` is what the repetition penalty looks at.
    ///
    /// # Errors
    /// If a logit is NaN or +∞, or none is finite.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SamplingError> {
        let draw = match self.sampling.temperature == 0.0 {
            true => 0.0,
            false => self.rng.random::<f64>(),
        };
        let candidates = self.distribution(logits, history)?;
        let mut sum = 0.0;
        for candidate in candidates {
            sum += candidate.probability;
            if sum > draw {
                return Ok(candidate.token);
            }
        }
        // Rounding left the sum just below the draw: the last token that can be drawn.
        let last = candidates.iter().rfind(|candidate| candidate.probability > 0.0);
        Ok(last.expect("probabilities sum to one").token)
    }

    /// The tokens that may be drawn, with their probabilities, after all filters.
    ///
    /// # Errors
    /// If a logit is NaN or +∞, or none is finite.
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Result<&[Candidate], SamplingError> {
        check(logits)?;
        if self.sampling.temperature == 0.0 && self.sampling.repetition_penalty == 1.0 {
            self.candidates.clear();
            self.candidates.push(Candidate { token: likeliest(logits), probability: 1.0 });
            return Ok(&self.candidates);
        }
        self.load(logits);
        self.penalise(history);
        if self.sampling.temperature == 0.0 {
            let best = self.candidates.iter().min_by(|a, b| likelier(a, b)).map(|best| best.token);
            self.candidates.clear();
            self.candidates.extend(best.map(|token| Candidate { token, probability: 1.0 }));
            return Ok(&self.candidates);
        }
        self.keep_top_k();
        self.weigh();
        self.keep_top_p();
        self.keep_min_p();
        let total: f64 = self.candidates.iter().map(|candidate| candidate.probability).sum();
        self.candidates.iter_mut().for_each(|candidate| candidate.probability /= total);
        Ok(&self.candidates)
    }

    fn load(&mut self, logits: &[f32]) {
        let candidate = |(token, &logit)| Candidate { token, probability: f64::from(logit) };
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits).map(candidate));
    }

    /// Once for each distinct token of the history.
    fn penalise(&mut self, history: &[u32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        self.seen.clear();
        self.seen.resize(self.candidates.len(), false);
        for &token in history {
            let Some(seen) = self.seen.get_mut(token as usize) else { continue };
            if std::mem::replace(seen, true) {
                continue;
            }
            let logit = &mut self.candidates[token as usize].probability;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }

    fn keep_top_k(&mut self) {
        let Some(k) = self.sampling.top_k.filter(|&k| k < self.candidates.len()) else { return };
        self.candidates.select_nth_unstable_by(k - 1, likelier);
        self.candidates.truncate(k);
        self.candidates.sort_unstable_by(likelier);
    }

    /// exp((logit − largest)/temperature): the likeliest token weighs 1.
    fn weigh(&mut self) {
        let largest = self.candidates.iter().fold(f64::NEG_INFINITY, |max, c| max.max(c.probability));
        for candidate in &mut self.candidates {
            candidate.probability = ((candidate.probability - largest) / self.sampling.temperature).exp();
        }
    }

    /// Sorts no more than it keeps, times a small factor: vocabularies are long, nuclei short.
    fn keep_top_p(&mut self) {
        let Some(p) = self.sampling.top_p.filter(|&p| p < 1.0) else { return };
        let goal = p * self.candidates.iter().map(|candidate| candidate.probability).sum::<f64>();
        let (mut sorted, mut sum, mut stretch) = (0, 0.0, 64);
        while sorted < self.candidates.len() {
            let end = (sorted + stretch).min(self.candidates.len());
            if end < self.candidates.len() {
                self.candidates[sorted..].select_nth_unstable_by(end - sorted - 1, likelier);
            }
            self.candidates[sorted..end].sort_unstable_by(likelier);
            for place in sorted..end {
                sum += self.candidates[place].probability;
                if sum >= goal {
                    self.candidates.truncate(place + 1);
                    return;
                }
            }
            (sorted, stretch) = (end, 4 * stretch);
        }
    }

    /// The likeliest token weighs 1, so the share is the weight.
    fn keep_min_p(&mut self) {
        let Some(p) = self.sampling.min_p else { return };
        self.candidates.retain(|candidate| candidate.probability >= p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    fn distribution(sampling: Sampling, logits: &[f32], history: &[u32]) -> Vec<(u32, f64)> {
        let mut sampler = Sampler::new(sampling, 0).unwrap();
        let mut list: Vec<_> =
            sampler.distribution(logits, history).unwrap().iter().map(|c| (c.token, c.probability)).collect();
        list.sort_by_key(|&(token, _)| token);
        list
    }

    fn assert_close(got: &[(u32, f64)], expected: &[(u32, f64)]) {
        assert_eq!(got.len(), expected.len(), "{got:?} {expected:?}");
        for (g, e) in got.iter().zip(expected) {
            assert!(g.0 == e.0 && (g.1 - e.1).abs() < 1e-6, "{got:?} {expected:?}");
        }
    }

    #[test]
    fn the_likeliest_is_the_first_of_the_greatest() {
        let mut logits: Vec<f32> = (0..1003).map(|i| ((i * 37) % 101) as f32 - 90.0).collect();
        logits[5] = f32::NEG_INFINITY;
        let first = logits.iter().position(|&x| x == 10.0).unwrap() as u32;
        assert_eq!(distribution(Sampling::greedy(), &logits, &[]), [(first, 1.0)]);
        // With a penalty that changes nothing but the way: no token was there before.
        let penalised = Sampling { repetition_penalty: 1.5, ..Sampling::greedy() };
        assert_eq!(distribution(penalised, &logits, &[]), [(first, 1.0)]);
        logits[1002] = 11.0;
        assert_eq!(distribution(Sampling::greedy(), &logits, &[]), [(1002, 1.0)]);
    }

    #[test]
    fn plain_and_temperature() {
        let logits = logits(&[0.1, 0.2, 0.7]);
        assert_close(&distribution(Sampling::default(), &logits, &[]), &[(0, 0.1), (1, 0.2), (2, 0.7)]);
        let cold = Sampling { temperature: 0.5, ..Sampling::default() };
        let total = 0.01 + 0.04 + 0.49;
        assert_close(&distribution(cold, &logits, &[]), &[(0, 0.01 / total), (1, 0.04 / total), (2, 0.49 / total)]);
        // So cold that the logits over the temperature overflow exp and even their difference does.
        let frozen = Sampling { temperature: 1e-300, ..Sampling::default() };
        assert_close(&distribution(frozen, &logits, &[]), &[(0, 0.0), (1, 0.0), (2, 1.0)]);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(distribution(Sampling::greedy(), &[1.0, 3.0, 3.0, 2.0], &[]), [(1, 1.0)]);
        assert_eq!(distribution(Sampling::greedy(), &[-1.0, f32::NEG_INFINITY], &[]), [(0, 1.0)]);
    }

    #[test]
    fn top_k_ties_go_to_the_lower_id() {
        let top = |k| Sampling { top_k: Some(k), ..Sampling::default() };
        let logits = [0.0, 1.0, 1.0, 1.0, -2.0];
        assert_close(&distribution(top(2), &logits, &[]), &[(1, 0.5), (2, 0.5)]);
        assert_close(&distribution(top(1), &logits, &[]), &[(1, 1.0)]);
        assert_eq!(distribution(top(9), &logits, &[]).len(), 5);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_p() {
        let top = |p| Sampling { top_p: Some(p), ..Sampling::default() };
        let logits = logits(&[0.1, 0.4, 0.3, 0.2]);
        assert_close(&distribution(top(0.69), &logits, &[]), &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
        assert_close(&distribution(top(0.71), &logits, &[]), &[(1, 4.0 / 9.0), (2, 3.0 / 9.0), (3, 2.0 / 9.0)]);
        assert_close(&distribution(top(1e-9), &logits, &[]), &[(1, 1.0)]);
        assert_eq!(distribution(top(1.0), &logits, &[]).len(), 4);
        // Equal tokens: the set is exact and takes the lower ids. Sums of powers of two are exact.
        assert_close(&distribution(top(0.5), &[0.0; 4], &[]), &[(0, 0.5), (1, 0.5)]);
    }

    #[test]
    fn top_p_agrees_with_a_full_sort_on_a_long_vocabulary() {
        let mut rng = ChaCha12Rng::seed_from_u64(3);
        let logits: Vec<f32> = (0..5000).map(|_| (rng.random::<f32>() * 8.0).floor() / 2.0).collect();
        let full = distribution(Sampling::default(), &logits, &[]);
        for p in [0.001, 0.05, 0.3, 0.9, 0.9999] {
            let mut order = full.clone();
            order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut sum = 0.0;
            let count = 1 + order
                .iter()
                .take_while(|c| {
                    sum += c.1;
                    sum < p
                })
                .count();
            order.truncate(count);
            order.sort_by_key(|c| c.0);
            let got = distribution(Sampling { top_p: Some(p), ..Sampling::default() }, &logits, &[]);
            assert_eq!(got.len(), count, "p = {p}");
            assert!(got.iter().zip(&order).all(|(g, o)| g.0 == o.0), "p = {p}");
        }
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let min = |p| Sampling { min_p: Some(p), ..Sampling::default() };
        let logits = logits(&[0.05, 0.5, 0.25, 0.2]);
        assert_close(&distribution(min(0.45), &logits, &[]), &[(1, 2.0 / 3.0), (2, 1.0 / 3.0)]);
        assert_close(&distribution(min(1.0), &logits, &[]), &[(1, 1.0)]);
        assert_eq!(distribution(min(0.0), &logits, &[]).len(), 4);
    }

    #[test]
    fn filters_follow_one_another() {
        // top-k leaves 0.4, 0.3, 0.2; of these 0.4/0.9 + 0.3/0.9 = 0.78 reach top-p 0.7; min-p 0.8 > 3/4 leaves the first.
        let logits = logits(&[0.1, 0.4, 0.3, 0.2]);
        let sampling = Sampling { top_k: Some(3), top_p: Some(0.7), ..Sampling::default() };
        assert_close(&distribution(sampling.clone(), &logits, &[]), &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
        assert_close(&distribution(Sampling { min_p: Some(0.8), ..sampling }, &logits, &[]), &[(1, 1.0)]);
    }

    #[test]
    fn repetition_penalty_counts_each_token_once_and_follows_the_sign() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let got = distribution(sampling, &[2.0, -1.0, 1.0], &[0, 0, 1, 99]);
        let weights = [1f64.exp(), (-2f64).exp(), 1f64.exp()];
        let total: f64 = weights.iter().sum();
        assert_close(&got, &[(0, weights[0] / total), (1, weights[1] / total), (2, weights[2] / total)]);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let probabilities = [0.05, 0.6, 0.0, 0.35];
        let logits = logits(&probabilities);
        let draw = |seed, stream| {
            let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }, stream).unwrap();
            (0..20_000).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
        };
        let tokens = draw(7, 0);
        for (token, p) in probabilities.iter().enumerate() {
            let count = tokens.iter().filter(|&&t| t as usize == token).count() as f64;
            // Five standard deviations of a binomial count.
            let bound = 5.0 * (20_000.0 * p * (1.0 - p)).sqrt();
            assert!((count - 20_000.0 * p).abs() <= bound, "token {token}: {count}");
        }
        assert_eq!(tokens, draw(7, 0));
        assert_ne!(tokens, draw(8, 0));
        assert_ne!(tokens, draw(7, 1));
    }

    #[test]
    fn bad_logits_are_errors() {
        let mut sampler = Sampler::new(Sampling::default(), 0).unwrap();
        let error = sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err();
        assert!(matches!(error, SamplingError::Logit { token: 1, value } if value.is_nan()), "{error}");
        let error = sampler.sample(&[f32::INFINITY, 0.0], &[]).unwrap_err();
        assert_eq!(error, SamplingError::Logit { token: 0, value: f32::INFINITY });
        let error = sampler.sample(&[f32::NEG_INFINITY; 3], &[]).unwrap_err();
        assert_eq!(error, SamplingError::NoCandidate { count: 3 });
        assert_eq!(sampler.sample(&[], &[]).unwrap_err(), SamplingError::NoCandidate { count: 0 });
    }

    /// Penalties at their limits, on the largest logits that there are.
    #[test]
    fn penalties_leave_a_distribution() {
        for repetition_penalty in [1e-3, 1e3] {
            let mut sampler = Sampler::new(Sampling { repetition_penalty, ..Sampling::default() }, 0).unwrap();
            for logits in [[f32::MAX, 1.0], [f32::MIN, -1.0], [f32::MIN, f32::MIN]] {
                assert!(sampler.sample(&logits, &[0, 1]).unwrap() < 2);
            }
        }
    }

    #[test]
    fn bad_parameters_name_field_value_and_rule() {
        let base = Sampling::default;
        for (sampling, message) in [
            (Sampling { temperature: -0.5, ..base() }, "`temperature` = -0.5: must be at least 0 and finite"),
            (Sampling { temperature: f64::NAN, ..base() }, "`temperature` = NaN: must be at least 0 and finite"),
            (Sampling { top_k: Some(0), ..base() }, "`top_k` = 0: must be at least 1"),
            (Sampling { top_p: Some(0.0), ..base() }, "`top_p` = 0: must be above 0 and at most 1"),
            (Sampling { top_p: Some(1.5), ..base() }, "`top_p` = 1.5: must be above 0 and at most 1"),
            (Sampling { min_p: Some(-0.1), ..base() }, "`min_p` = -0.1: must be at least 0 and at most 1"),
            (Sampling { repetition_penalty: 0.0, ..base() }, "`repetition_penalty` = 0: must be from 0.001 to 1000"),
            (
                Sampling { repetition_penalty: 1e4, ..base() },
                "`repetition_penalty` = 10000: must be from 0.001 to 1000",
            ),
        ] {
            let error = Sampler::new(sampling, 0).unwrap_err();
            assert_eq!(error.to_string(), format!("sampling parameter {message}"));
        }
    }
}
