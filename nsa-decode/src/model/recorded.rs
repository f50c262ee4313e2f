//! Decoding steps on a device, which is given a whole step at once: all that differs from one step to the
//! next (tokens, where new rows go, where caches are) is written to its memory before.

use super::attention::{self, Caches, Places};
use super::blocks::NewBlocks;
use super::forward::{Pass, Run};
use super::net::Activation;
use super::workspace::Workspace;
use crate::Result;
use nsa_kernels::Backend;
use nsa_kernels::record::Recorder;

/// The steps that were computed in one workspace.
#[derive(Debug)]
pub(super) struct Recorded<T> {
    /// By the number of sequences, and of those that complete a compression block.
    recorder: Recorder<[usize; 2]>,
    places: Option<Places<T>>,
    /// Elements of the workspace that records use.
    workspace: usize,
}

impl<T: Activation> Recorded<T> {
    /// None on a backend that does not record.
    pub(super) fn new(backend: &Backend) -> Option<Self> {
        backend.recorder().map(|recorder| Self { recorder, places: None, workspace: 0 })
    }

    /// Kinds of steps that are recorded.
    pub(super) fn len(&self) -> usize {
        self.recorder.len()
    }

    /// Computes a step. Returns the token-rows of keys and values that each sequence's attention reads in one layer.
    ///
    /// # Errors
    /// If an operation refuses. What was recorded is void then: memory may be another one.
    pub(super) fn step(
        &mut self,
        pass: &Pass<'_, T>,
        ws: &mut Workspace<T>,
        runs: &mut [Run<'_, T>],
    ) -> Result<Vec<usize>> {
        let rows_read = self.placed_step(pass, ws, runs);
        if rows_read.is_err() {
            self.recorder.forget();
        }
        rows_read
    }

    fn placed_step(
        &mut self,
        pass: &Pass<'_, T>,
        ws: &mut Workspace<T>,
        runs: &mut [Run<'_, T>],
    ) -> Result<Vec<usize>> {
        let Self { recorder, places, workspace } = self;
        let (layers, sequences) = (pass.net.layers.len(), runs.len());
        if *workspace != ws.len() {
            recorder.forget();
            *workspace = ws.len();
        }
        if places.as_ref().is_none_or(|places| places.sequences() < sequences) {
            recorder.forget();
            let is_sparse = pass.model.config.nsa_config().is_some();
            *places = Some(Places::new(&pass.model.backend, is_sparse, layers, sequences.next_power_of_two())?);
        }
        let places = places.as_mut().expect("they were there, or made");
        let mut rows_read = Vec::new();
        for layer in 0..layers {
            let placed = attention::place(pass, ws, runs, layer, places)?;
            if placed.anew {
                recorder.forget();
            }
            rows_read = placed.rows_read;
        }
        places.send()?;
        let completing = pass.new_blocks.as_ref().map_or(0, NewBlocks::owners);
        recorder.run([sequences, completing], || pass.compute(ws, &mut Caches::Placed(places)).map(drop))?;
        Ok(rows_read)
    }
}
