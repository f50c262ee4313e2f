//! The loop around the steps: metrics, validation, checkpoints, plot, a way to stop.

use crate::checkpoint;
use crate::eval::Evaluation;
use crate::metrics::{Line, METRICS_FILE, StepLine, ValidationLine, Writer};
use crate::model::Profile;
use crate::plot::{PLOT_FILE, loss_curve};
use crate::trainer::Trainer;
use crate::{Error, Result, metrics};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What happens during a run, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A step was taken.
    Step(&'a StepLine),
    /// The model was evaluated.
    Validation(&'a ValidationLine),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Whether it was stopped before its last step.
    pub interrupted: bool,
    /// Steps done in all.
    pub step: u64,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// The last validation of this run, if there was one.
    pub validation: Option<ValidationLine>,
    /// The plot, if a step was ever taken.
    pub plot: Option<PathBuf>,
    /// Seconds of all steps of this run, by phase.
    pub profile: Profile,
    /// Steps of this run.
    pub steps_taken: u64,
    /// Seconds of those steps.
    pub seconds: f64,
}

/// Trains to the last step, or until `stop` is set: then saves and returns. In the folder `run` it leaves
/// `metrics.jsonl`, checkpoints `step-NNNNNNNN` and `loss.svg`.
///
/// # Errors
/// If the loss or the gradient is not finite ([`Error::Diverged`] names the step and the last good checkpoint, which
/// stays), an operation fails or a file cannot be written.
pub fn run(trainer: &mut Trainer, run: &Path, stop: &AtomicBool, watch: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    std::fs::create_dir_all(run).map_err(Error::write(run))?;
    let _alone = lock(run)?;
    let metrics = Writer::open(&run.join(METRICS_FILE), trainer.state().step)?;
    let mut session = Session { run, metrics, watch, saved: None, validation: None };
    let (mut profile, mut seconds) = (Profile::default(), 0.0);
    let first = trainer.state().step;
    while !trainer.is_done() && !stop.load(Ordering::Relaxed) {
        let line = trainer.step().map_err(|error| session.with_last_checkpoint(error))?;
        profile.add(&line.phases);
        seconds += line.seconds;
        session.metrics.write(&Line::Step(line))?;
        (session.watch)(Event::Step(&line));
        let every = |period: u64| period > 0 && line.step.is_multiple_of(period);
        let options = *trainer.options();
        if every(options.eval_every) && !trainer.is_done() {
            session.validate(trainer)?;
        }
        if every(options.save_every) && !trainer.is_done() {
            session.save(trainer)?;
        }
    }
    let interrupted = !trainer.is_done();
    if !interrupted {
        session.validate(trainer)?;
    }
    let checkpoint = session.save(trainer)?;
    let plot = draw(run)?;
    let (step, validation) = (trainer.state().step, session.validation);
    Ok(Outcome { interrupted, step, checkpoint, validation, plot, profile, steps_taken: step - first, seconds })
}

/// Name of the file that a process holds which trains in a run's folder.
const LOCK_FILE: &str = ".lock";

/// Holds a run's folder for this process, as long as what it returns is there. [`run`] does so; what is read of a folder before is
/// another process's, perhaps, if it is not held meanwhile.
///
/// # Errors
/// If another process holds it, or a file cannot be written.
pub fn lock(run: &Path) -> Result<File> {
    let path = run.join(LOCK_FILE);
    let file = File::create(&path).map_err(Error::write(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::content(run, "another process trains here: wait for it, or choose another folder"));
        }
        Err(TryLockError::Error(error)) => {
            tracing::warn!(%error, "{} cannot be locked: another process that trains here would not be noticed", run.display());
        }
    }
    Ok(file)
}

/// Draws the metrics of a run; there is no plot before the first step.
fn draw(run: &Path) -> Result<Option<PathBuf>> {
    let lines = metrics::read(&run.join(METRICS_FILE))?;
    if !lines.iter().any(|line| matches!(line, Line::Step(_))) {
        return Ok(None);
    }
    let path = run.join(PLOT_FILE);
    loss_curve(&lines, &path)?;
    Ok(Some(path))
}

struct Session<'a> {
    run: &'a Path,
    metrics: Writer,
    watch: &'a mut dyn FnMut(Event<'_>),
    saved: Option<PathBuf>,
    validation: Option<ValidationLine>,
}

impl Session<'_> {
    fn validate(&mut self, trainer: &mut Trainer) -> Result<()> {
        let start = Instant::now();
        let evaluation = trainer.validate().inspect_err(|_| {
            // What was trained is not lost by it; if it cannot be saved either, the first error is the one that matters.
            let _ = self.save(trainer);
        });
        let Some(Evaluation { loss, bits_per_byte, perplexity, tokens, .. }) = evaluation? else {
            return Ok(());
        };
        let seconds = start.elapsed().as_secs_f64();
        let line = ValidationLine { step: trainer.state().step, loss, bits_per_byte, perplexity, tokens, seconds };
        self.metrics.write(&Line::Validation(line))?;
        (self.watch)(Event::Validation(&line));
        self.validation = Some(line);
        Ok(())
    }

    fn save(&mut self, trainer: &Trainer) -> Result<PathBuf> {
        let folder = trainer.save(self.run).map_err(|error| self.with_last_checkpoint(error))?;
        (self.watch)(Event::Saved(&folder));
        self.saved = Some(folder.clone());
        Ok(folder)
    }

    /// An error of a step, with the checkpoint that is still good.
    fn with_last_checkpoint(&self, error: Error) -> Error {
        match error {
            Error::Diverged { step, quantity, value, .. } => {
                let newest = || checkpoint::list(self.run).ok()?.pop().map(|(_, folder)| folder);
                Error::Diverged { step, quantity, value, checkpoint: self.saved.clone().or_else(newest) }
            }
            other => other,
        }
    }
}
