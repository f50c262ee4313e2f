//! Graphs: work that a capture kept, run again and again.

use super::blas::Gemm;
use super::error::CuError;
use super::state::{Ready, State};
use std::sync::Arc;

/// Work of a stream: run at once, or kept by a graph and run at each of its launches. Host memory is held by address.
#[derive(Clone)]
pub enum Work {
    /// A kernel with its parameters.
    Launch(Ready, Vec<u8>),
    /// A copy from the host.
    CopyIn {
        /// Where to.
        to: u64,
        /// The host's address.
        from: usize,
        /// Bytes.
        bytes: usize,
    },
    /// A copy to the host.
    CopyOut {
        /// The host's address.
        to: usize,
        /// Where from.
        from: u64,
        /// Bytes.
        bytes: usize,
    },
    /// A copy on the device.
    Copy {
        /// Where to.
        to: u64,
        /// Where from.
        from: u64,
        /// Bytes.
        bytes: usize,
    },
    /// Repeats a pattern.
    Fill {
        /// Where to.
        to: u64,
        /// The pattern.
        pattern: Vec<u8>,
        /// How often.
        count: usize,
    },
    /// A product of matrices.
    Product(Gemm),
    /// Memory of a graph: the same address at each launch.
    Allocate {
        /// The address.
        address: u64,
        /// Bytes.
        bytes: u64,
    },
    /// Frees memory.
    Free {
        /// Its address.
        address: u64,
    },
}

/// A graph made ready to run.
#[derive(Clone)]
pub struct Executable {
    /// What it does, in order.
    pub work: Arc<Vec<Work>>,
    /// Memory that an earlier launch left allocated is freed by the next.
    frees: bool,
}

/// Memory that a launch left allocated is freed by the next one.
const AUTO_FREE: u64 = 1;
/// Kernels may launch the graph.
const DEVICE_LAUNCH: u64 = 4;
/// Nodes have priorities.
const PRIORITY: u64 = 8;

impl State {
    /// Makes a graph ready to run.
    ///
    /// # Errors
    /// The graph is none, or the flags make no sense or are not supported.
    pub fn instantiate(&mut self, graph: usize, flags: u64) -> Result<usize, CuError> {
        self.alive()?;
        let work = self.graphs.get(&graph).ok_or(CuError::INVALID_VALUE)?.clone();
        if flags & !(AUTO_FREE | DEVICE_LAUNCH | PRIORITY) != 0
            || flags & (AUTO_FREE | DEVICE_LAUNCH) == AUTO_FREE | DEVICE_LAUNCH
        {
            return Err(CuError::INVALID_VALUE);
        }
        if flags & DEVICE_LAUNCH != 0 {
            return Err(CuError::NOT_SUPPORTED);
        }
        let handle = self.handle();
        self.executables.insert(handle, Executable { work, frees: flags & AUTO_FREE != 0 });
        Ok(handle)
    }

    /// An executable that is to be launched on a stream: what is to run now, which is nothing where the stream captures.
    ///
    /// # Errors
    /// It is none, memory of an earlier launch is still allocated, a kernel is there no longer, or what [`State::submit`] says.
    pub fn launch_graph(&mut self, handle: usize, stream: usize) -> Result<Vec<Work>, CuError> {
        let executable = self.executables.get(&handle).ok_or(CuError::INVALID_VALUE)?.clone();
        self.enter(stream)?;
        for work in executable.work.iter() {
            if let Work::Launch(ready, _) = work {
                self.check_loaded(ready)?;
            }
            let Work::Allocate { address, .. } = work else { continue };
            match self.memory.find(*address, 1) {
                Ok(_) if executable.frees => self.memory.free(*address)?,
                Ok(_) => return Err(CuError::INVALID_VALUE),
                Err(_) => {}
            }
        }
        let submitted = executable.work.iter().map(|work| self.submit(stream, work.clone()));
        Ok(submitted.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// Allocates in a stream's order.
    ///
    /// # Errors
    /// The memory is full, or what [`State::submit`] says.
    pub fn allocate_ordered(&mut self, bytes: u64, stream: usize) -> Result<u64, CuError> {
        self.enter(stream)?;
        if !self.captures(stream) {
            return Ok(self.memory.allocate(bytes, false)?);
        }
        let address = self.memory.reserve(bytes);
        self.submit(stream, Work::Allocate { address, bytes })?;
        Ok(address)
    }

    /// Ends a graph; executables made of it live on.
    ///
    /// # Errors
    /// It is none.
    pub fn end_graph(&mut self, graph: usize) -> Result<(), CuError> {
        self.graphs.remove(&graph).map(|_| ()).ok_or(CuError::INVALID_VALUE)
    }

    /// Ends an executable.
    ///
    /// # Errors
    /// It is none.
    pub fn end_executable(&mut self, handle: usize) -> Result<(), CuError> {
        self.executables.remove(&handle).map(|_| ()).ok_or(CuError::INVALID_VALUE)
    }

    /// Whether an executable can be launched on a stream.
    ///
    /// # Errors
    /// One of them is none.
    pub fn check_executable(&self, handle: usize, stream: usize) -> Result<(), CuError> {
        self.alive()?;
        self.check_stream(stream)?;
        self.executables.get(&handle).map(|_| ()).ok_or(CuError::INVALID_VALUE)
    }
}
