//! Work that comes again and again with the same shapes, as steps of decoding do: a device gets it as one piece, which costs
//! the host one call instead of one an operation.
//!
//! What changes from one time to the next must be in memory that the work reads: it is written before, by
//! [`Buffer::write`](crate::Buffer::write), [`copy::Table`](crate::layer::copy::Table) and
//! [`decode::Workspace::place`](crate::op::decode::Workspace::place).
//!
//! ```no_run
//! # use nsa_kernels::{Backend, Buffer, Result};
//! # fn generate(backend: &Backend, token: &mut Buffer<u32>, step: impl Fn(&Buffer<u32>) -> Result<u32>) -> Result<()> {
//! # let (mut next, draw) = (0, || Ok::<u32, nsa_kernels::Error>(0));
//! let mut recorder = backend.recorder().expect("a GPU");
//! loop {
//!     token.write(&[next])?;
//!     // Called, then recorded, then repeated; of another number of sequences by another key.
//!     let sequences = 1;
//!     recorder.run(sequences, || step(token).map(drop))?;
//!     next = draw()?;
//! }
//! # }
//! ```

use crate::cuda::Cuda;
use crate::cuda::graph::Graph;
use crate::cuda::workspace::Workspace;
use crate::{Backend, Error};

/// Records that are kept, at most: those that were used last.
const RECORDS: usize = 32;

/// Work that was done before, by a key that tells apart what differs in what is called: numbers of rows, for one.
#[derive(Debug)]
pub struct Recorder<K> {
    cuda: Cuda,
    workspace: Workspace,
    /// The last used first.
    records: Vec<Record<K>>,
}

#[derive(Debug)]
struct Record<K> {
    key: K,
    /// None if the work was done, and not recorded yet.
    graph: Option<Graph>,
}

impl Backend {
    /// What records work, on backends that are given it; none on the CPU, which does it when it is called.
    pub fn recorder<K: PartialEq>(&self) -> Option<Recorder<K>> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(cuda) => {
                Some(Recorder { cuda: cuda.clone(), workspace: Workspace::new(cuda), records: Vec::new() })
            }
        }
    }
}

impl<K: PartialEq> Recorder<K> {
    /// Does `work`: the first time with this key as it is, from then on as what is recorded the second time. All that it calls
    /// must be the same every time, with memory at the same places ([`Recorder::forget`]) and nothing that waits for the device,
    /// makes memory or copies from the host, but at the first time. Operations find what they need besides their tensors in
    /// memory that the recorder keeps for them.
    ///
    /// # Errors
    /// What `work` says, or if it did what cannot be recorded.
    pub fn run<E: From<Error>>(&mut self, key: K, work: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let found = self.records.iter().position(|record| record.key == key);
        let Some(at) = found else {
            let held = self.workspace.bytes();
            let done = self.cuda.with_workspace(&mut self.workspace, work);
            // Also if there was no memory for what the work needed: what was there is given back by then.
            if self.workspace.bytes() != held {
                self.forget();
            }
            done?;
            self.records.insert(0, Record { key, graph: None });
            self.records.truncate(RECORDS);
            return Ok(());
        };
        self.records[..=at].rotate_right(1);
        let graph = match self.records[0].graph.take() {
            Some(graph) => graph,
            None => self.cuda.record(|| self.cuda.with_workspace(&mut self.workspace, work))?,
        };
        Ok(self.records[0].graph.insert(graph).launch()?)
    }

    /// Forgets all records. To be called when memory that they use is another one.
    pub fn forget(&mut self) {
        self.records.clear();
    }

    /// Records that are kept.
    pub fn len(&self) -> usize {
        self.records.iter().filter(|record| record.graph.is_some()).count()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
