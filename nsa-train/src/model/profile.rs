//! Where the time of a step goes.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Drawing sequences.
    Data,
    /// Token embedding, forward and backward.
    Embedding,
    /// RMSNorms and residual sums.
    Norm,
    /// Projections of the attention: q, k, v, gates, output.
    Projection,
    /// Rotary embedding.
    Rope,
    /// φ, forward and backward.
    Compression,
    /// Attention forward.
    Attention,
    /// Attention backward.
    AttentionBackward,
    /// The MLP's products and activation.
    Mlp,
    /// Head and loss, with their gradients.
    Head,
    /// Gradient norm, AdamW, clearing gradients.
    Optimizer,
}

impl Phase {
    /// Every phase, in the order of a step.
    pub const ALL: [Self; 11] = [
        Self::Data,
        Self::Embedding,
        Self::Norm,
        Self::Projection,
        Self::Rope,
        Self::Compression,
        Self::Attention,
        Self::AttentionBackward,
        Self::Mlp,
        Self::Head,
        Self::Optimizer,
    ];

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Embedding => "embedding",
            Self::Norm => "norm",
            Self::Projection => "projection",
            Self::Rope => "rope",
            Self::Compression => "compression",
            Self::Attention => "attention",
            Self::AttentionBackward => "attention_backward",
            Self::Mlp => "mlp",
            Self::Head => "head",
            Self::Optimizer => "optimizer",
        }
    }
}

/// Seconds spent in each phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<Phase, f64>", into = "BTreeMap<Phase, f64>")]
pub struct Profile {
    seconds: [f64; Phase::ALL.len()],
}

impl From<BTreeMap<Phase, f64>> for Profile {
    fn from(map: BTreeMap<Phase, f64>) -> Self {
        Self { seconds: Phase::ALL.map(|phase| map.get(&phase).copied().unwrap_or(0.0)) }
    }
}

impl From<Profile> for BTreeMap<Phase, f64> {
    fn from(profile: Profile) -> Self {
        profile.iter().filter(|&(_, seconds)| seconds > 0.0).collect()
    }
}

impl Profile {
    /// Runs `work`, whose time belongs to `phase`, within a tracing span of its name.
    pub(crate) fn time<T>(&mut self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let _span = tracing::trace_span!("phase", name = phase.name()).entered();
        let start = Instant::now();
        let result = work();
        self.record(phase, start.elapsed());
        result
    }

    /// Adds time to a phase.
    pub(crate) fn record(&mut self, phase: Phase, time: Duration) {
        self.seconds[phase as usize] += time.as_secs_f64();
    }

    /// Seconds of one phase.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Every phase with its seconds.
    pub fn iter(&self) -> impl Iterator<Item = (Phase, f64)> + '_ {
        Phase::ALL.into_iter().map(|phase| (phase, self.seconds(phase)))
    }

    /// Seconds of all phases.
    pub fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }

    /// Adds the seconds of another profile.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.seconds.iter_mut().zip(other.seconds) {
            *mine += theirs;
        }
    }

    /// Returns the profile and starts anew.
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }
}
