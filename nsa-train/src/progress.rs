//! Showing a run to people: a progress bar on a terminal, log lines elsewhere.

use crate::TrainOptions;
use crate::metrics::{StepLine, ValidationLine};
use crate::model::Profile;
use crate::run::Event;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Seconds between log lines where there is no terminal.
const LOG_PERIOD: Duration = Duration::from_secs(10);
/// How much a new step counts in the loss shown.
const SMOOTHING: f64 = 0.05;

/// Shows a run: hand its [`Progress::show`] to [`crate::run::run`].
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    steps: u64,
    loss: Option<f64>,
    last_log: Option<Instant>,
    rate: Rate,
}

/// Tokens and steps a second since the start.
#[derive(Debug)]
struct Rate {
    start: Instant,
    first_step: Option<u64>,
    tokens_per_step: u64,
}

impl Rate {
    /// Tokens a second and time left, after `step` of `steps`.
    fn at(&mut self, step: u64, steps: u64) -> (f64, Duration) {
        let first = *self.first_step.get_or_insert(step.saturating_sub(1));
        let per_step = self.start.elapsed().as_secs_f64() / (step - first).max(1) as f64;
        let left = Duration::from_secs_f64(per_step * steps.saturating_sub(step) as f64);
        (self.tokens_per_step as f64 / per_step, left)
    }
}

impl Progress {
    /// Progress of a run with `options`, which has done `step` steps: a bar if standard error is a terminal.
    pub fn new(options: &TrainOptions, step: u64) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{bar:28} {pos}/{len} {msg}").expect("a legal template");
            ProgressBar::new(options.steps).with_style(style).with_position(step)
        } else {
            ProgressBar::hidden()
        };
        let rate = Rate { start: Instant::now(), first_step: None, tokens_per_step: options.tokens_per_step() };
        Self { bar, steps: options.steps, loss: None, last_log: None, rate }
    }

    /// Shows an event.
    pub fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Step(line) => self.step(line),
            Event::Validation(line) => self.line(&validation_text(line)),
            Event::Saved(folder) => self.line(&format!("saved {}", folder.display())),
        }
    }

    /// Removes the bar, so that other output may follow.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// A line above the bar, or in the log.
    pub fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            tracing::info!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    fn step(&mut self, line: &StepLine) {
        let loss = self.loss.map_or(line.loss, |loss| loss + SMOOTHING * (line.loss - loss));
        self.loss = Some(loss);
        let (tokens_per_s, left) = self.rate.at(line.step, self.steps);
        let text = format!("loss {loss:.4}, {tokens_per_s:.0} tokens/s, {} left", minutes(left));
        if !self.bar.is_hidden() {
            self.bar.set_position(line.step);
            self.bar.set_message(text);
            return;
        }
        let due = self.last_log.is_none_or(|last| last.elapsed() >= LOG_PERIOD);
        if due || line.step == self.steps {
            self.last_log = Some(Instant::now());
            tracing::info!("step {}/{}: {text}", line.step, self.steps);
        }
    }
}

fn minutes(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

/// A validation in words.
pub fn validation_text(line: &ValidationLine) -> String {
    let ValidationLine { step, loss, bits_per_byte, perplexity, .. } = line;
    format!("step {step}: validation loss {loss:.4}, {bits_per_byte:.4} bits/byte, perplexity {perplexity:.2}")
}

/// The share of each phase as a table, of the steps whose sum `profile` is and which took `seconds` in all.
pub fn profile_table(profile: &Profile, steps: u64, seconds: f64) -> String {
    let steps = steps.max(1) as f64;
    let mut table = format!("{:<20} {:>10} {:>7}\n", "phase", "ms/step", "share");
    let mut row = |name: &str, part: f64| {
        table += &format!("{name:<20} {:>10.2} {:>6.1}%\n", part / steps * 1e3, 100.0 * part / seconds);
    };
    for (phase, part) in profile.iter().filter(|&(_, part)| part > 0.0) {
        row(phase.name(), part);
    }
    row("other", (seconds - profile.total()).max(0.0));
    row("step", seconds);
    table
}
