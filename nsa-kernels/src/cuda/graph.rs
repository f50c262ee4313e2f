//! Work that is recorded once and given to the device again and again as a whole (CUDA graphs): one call instead of one a
//! kernel.
//!
//! A thread that records gives its work to a second stream, where it is recorded and not done. Other threads' work goes to the
//! device meanwhile, and into no record.

use super::blas::Blas;
use super::{Cuda, failed};
use crate::{Error, Result};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode as CaptureMode};
use cudarc::driver::{CudaGraph, CudaStream, result};
use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError};

/// The name of recordings in errors.
const OP: &str = "Cuda::record";

/// Recorded work. It uses the memory that it was recorded with, which must be there still when it is launched.
pub struct Graph {
    /// None if there was nothing to do.
    graph: Option<CudaGraph>,
    /// Where the work goes, with the kernels that are in it.
    cuda: Cuda,
}

// SAFETY: the driver lets any thread use a graph, one at a time. A `Graph` owns its own, and no reference to it goes to other
// threads: it is not `Sync`.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

/// What work is given to while it is recorded.
#[derive(Debug)]
pub(super) struct Recording {
    stream: Arc<CudaStream>,
    /// cuBLAS on that stream. It makes memory when it is opened, so that this is done before anything is recorded.
    blas: OnceLock<Arc<Blas>>,
}

impl Recording {
    fn new(cuda: &Cuda) -> Result<Self> {
        let stream = cuda.stream().context().new_stream().map_err(|error| failed(OP, &error))?;
        Ok(Self { stream, blas: OnceLock::new() })
    }

    /// cuBLAS on the stream that records.
    ///
    /// # Errors
    /// If no work before needed it.
    pub(super) fn blas(&self) -> Result<Arc<Blas>> {
        self.blas.get().cloned().ok_or_else(|| {
            let message = "cuBLAS is not open: do the same work once before it is recorded".to_owned();
            Error::Device { op: OP.to_owned(), message }
        })
    }
}

thread_local! {
    /// The stream whose work this thread records, and what records it.
    static RECORDING: RefCell<Option<(Arc<CudaStream>, Arc<Recording>)>> = const { RefCell::new(None) };
}

/// What records this thread's work for `stream`, if anything does.
pub(super) fn recording(stream: &Arc<CudaStream>) -> Option<Arc<Recording>> {
    RECORDING.with_borrow(|recording| {
        recording.as_ref().filter(|(recorded, _)| recorded == stream).map(|(_, recording)| recording.clone())
    })
}

/// The stream that this thread's work for `stream` goes to.
pub(super) fn target(stream: &Arc<CudaStream>) -> Arc<CudaStream> {
    recording(stream).map_or_else(|| stream.clone(), |recording| recording.stream.clone())
}

/// Checks that this thread does not record work for `stream`; `what` cannot be recorded.
///
/// # Errors
/// If it does.
pub(super) fn check_not_recording(stream: &Arc<CudaStream>, what: impl FnOnce() -> String) -> Result<()> {
    match recording(stream) {
        None => Ok(()),
        Some(_) => Err(Error::Device { op: OP.to_owned(), message: what() }),
    }
}

/// A recording of this thread's that has begun. It ends when this is dropped, also by a panic: the stream would go on recording.
struct Begun<'r>(&'r Recording);

impl<'r> Begun<'r> {
    fn new(cuda: &Cuda, recording: &'r Arc<Recording>) -> Result<Self> {
        // Other threads may make memory meanwhile.
        let begun = recording.stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        begun.map_err(|error| failed(OP, &error))?;
        RECORDING.set(Some((cuda.stream().clone(), recording.clone())));
        Ok(Self(recording))
    }

    fn end(self) -> Result<Option<CudaGraph>> {
        let graph = self.0.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(|error| failed(OP, &error))?;
        RECORDING.set(None);
        std::mem::forget(self);
        Ok(graph)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        RECORDING.set(None);
        let stream = &self.0.stream;
        // The bindings return what went wrong somewhere before, and do not end anything then.
        let _ = stream.context().check_err();
        // What it holds is of no use to anyone.
        let _ = stream.end_capture(CUgraphInstantiate_flags(0));
    }
}

impl Cuda {
    /// Records what `work` gives to the device in this thread, which is not done now. Kernels must have been compiled before, so
    /// do the work once first. What waits for the device, makes memory or copies from the host cannot be recorded: operations
    /// are recorded in a [`Workspace`](super::workspace::Workspace), and [`Ready::launch`](super::decode::Ready::launch) as it
    /// is.
    ///
    /// # Errors
    /// What `work` says; if it did what cannot be recorded; or if it records.
    pub fn record<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        if RECORDING.with_borrow(Option::is_some) {
            let message = "this thread records already: a record cannot be made in another".to_owned();
            return Err(Error::Device { op: OP.to_owned(), message }.into());
        }
        // One thread at a time has the second stream.
        let mut there = self.inner.recording.lock().unwrap_or_else(PoisonError::into_inner);
        let recording = match &*there {
            Some(recording) => recording.clone(),
            None => there.insert(Arc::new(Recording::new(self)?)).clone(),
        };
        if self.inner.blas.get().is_some() && recording.blas.get().is_none() {
            let opened = Blas::open(self, &recording.stream)?;
            recording.blas.get_or_init(|| opened);
        }
        let begun = Begun::new(self, &recording)?;
        work()?;
        Ok(Graph { graph: begun.end()?, cuda: self.clone() })
    }
}

impl Graph {
    /// Gives the work to the device, on the stream of the [`Cuda`] that recorded it. Nothing is waited for.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn launch(&self) -> Result<()> {
        let Some(graph) = &self.graph else { return Ok(()) };
        let failed = |error| failed("Graph::launch", &error);
        let stream = self.cuda.stream();
        stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: the graph is there as long as `self`, and no other thread uses it; so is the stream, of the same context.
        unsafe { result::graph::launch(graph.cu_graph_exec(), stream.cu_stream()) }.map_err(failed)
    }
}
