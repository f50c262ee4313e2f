//! Work that is recorded once and given to the device again and again as a whole (CUDA graphs): one call instead of one a
//! kernel.

use super::{Cuda, failed};
use crate::Result;
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode as CaptureMode};
use std::fmt;

/// The name of recordings in errors.
pub(super) const OP: &str = "Cuda::record";

/// Recorded work. It uses the memory that it was recorded with, which must be there still when it is launched.
pub struct Graph(Option<CudaGraph>);

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

impl Cuda {
    /// Records what `work` gives to the device, which is not done now. Kernels must have been compiled before, so do the work
    /// once first. What waits for the device or makes memory cannot be recorded: operations are recorded in a
    /// [`Workspace`](super::workspace::Workspace), and [`Ready::launch`](super::decode::Ready::launch) as it is.
    ///
    /// # Errors
    /// What `work` says, or the driver if it did what cannot be recorded.
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let stream = self.stream();
        // Other threads may make memory meanwhile.
        let begun = stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        begun.map_err(|error| failed(OP, &error))?;
        let worked = work();
        // Also after an error: the stream would go on recording.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        worked?;
        graph.map(Graph).map_err(|error| failed(OP, &error))
    }
}

impl Graph {
    /// Gives the work to the device, on the stream that it was recorded on. Nothing is waited for.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn launch(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |graph| graph.launch().map_err(|error| failed("Graph::launch", &error)))
    }
}
