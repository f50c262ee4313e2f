//! What the run is doing: a line that changes on a terminal, lines in a log elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Least time between lines of a log.
const LOG_PERIOD: Duration = Duration::from_secs(10);
/// How often a terminal's line shows the time.
const TICK: Duration = Duration::from_secs(1);

/// Shows a run.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    last_log: Instant,
}

impl Progress {
    /// A line on standard error if that is a terminal.
    pub fn new() -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("[{elapsed_precise}] {msg}").expect("a legal template");
            ProgressBar::new_spinner().with_style(style)
        } else {
            ProgressBar::hidden()
        };
        bar.enable_steady_tick(TICK);
        Self { bar, last_log: Instant::now() }
    }

    /// What happens now.
    pub fn show(&mut self, text: String) {
        if !self.bar.is_hidden() {
            self.bar.set_message(text);
        } else if self.last_log.elapsed() >= LOG_PERIOD {
            eprintln!("{text}");
            self.last_log = Instant::now();
        }
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| println!("{text}"));
    }

    /// Removes the line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
