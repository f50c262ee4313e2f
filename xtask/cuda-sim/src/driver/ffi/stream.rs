//! Streams, events, captures, graphs.

use super::{Outcome, bytes, bytes_mut, call, put, state};
use crate::driver::capture::Mode;
use crate::driver::error::CuError;
use crate::driver::graph::Work;
use std::ffi::{c_int, c_uint, c_ulonglong};

/// `CU_STREAM_NON_BLOCKING`
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_RECORD_EXTERNAL`, `CU_EVENT_WAIT_EXTERNAL`
const EXTERNAL: c_uint = 1;

exports! {
    /// A new stream.
    fn cuStreamCreate(stream: *mut usize, flags: c_uint) { new_stream(stream, flags) }

    /// A new stream.
    fn cuStreamCreateWithPriority(stream: *mut usize, flags: c_uint, _priority: c_int) { new_stream(stream, flags) }

    /// Ends a stream.
    fn cuStreamDestroy_v2(stream: usize) { state()?.end_stream(stream) }

    /// Waits for a stream, which is complete already.
    fn cuStreamSynchronize(stream: usize) { state()?.wait_stream(stream) }

    /// Whether a stream is complete, which it is.
    fn cuStreamQuery(stream: usize) { state()?.wait_stream(stream) }

    /// Lets a stream wait for an event, which is complete already or a place in a capture.
    fn cuStreamWaitEvent(stream: usize, event: usize, flags: c_uint) {
        state()?.stream_waits(stream, event, flags & EXTERNAL != 0)
    }

    /// A new event.
    fn cuEventCreate(event: *mut usize, _flags: c_uint) {
        let mut state = state()?;
        state.alive()?;
        put(event, state.new_event())
    }

    /// Records an event.
    fn cuEventRecord(event: usize, stream: usize) { state()?.record_event(event, stream) }

    /// Whether an event is complete, which it is.
    fn cuEventQuery(event: usize) { state()?.wait_event(event) }

    /// Waits for an event, which is complete already.
    fn cuEventSynchronize(event: usize) { state()?.wait_event(event) }

    /// Milliseconds between two events.
    fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) { put(milliseconds, state()?.elapsed(start, end)?) }

    /// Milliseconds between two events.
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) { put(milliseconds, state()?.elapsed(start, end)?) }

    /// Ends an event.
    fn cuEventDestroy_v2(event: usize) { state()?.end_event(event) }
}

exports! {
    /// Begins to capture a stream.
    fn cuStreamBeginCapture_v2(stream: usize, mode: c_int) {
        let mode = match mode {
            0 => Mode::Global,
            1 => Mode::ThreadLocal,
            2 => Mode::Relaxed,
            _ => return Err(CuError::INVALID_VALUE),
        };
        state()?.begin_capture(stream, mode)
    }

    /// Ends a capture; the graph is null where it failed.
    fn cuStreamEndCapture(stream: usize, graph: *mut usize) {
        put(graph, 0)?;
        put(graph, state()?.end_capture(stream)?)
    }

    /// Whether a stream captures.
    fn cuStreamIsCapturing(stream: usize, status: *mut c_int) { put(status, state()?.capture_status(stream)?) }

    /// Makes a graph ready to run.
    fn cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: c_ulonglong) {
        put(executable, state()?.instantiate(graph, flags)?)
    }

    /// Runs a graph.
    fn cuGraphLaunch(executable: usize, stream: usize) {
        let work = state()?.launch_graph(executable, stream)?;
        work.iter().try_for_each(run)
    }

    /// A graph needs nothing before its first launch.
    fn cuGraphUpload(executable: usize, stream: usize) { state()?.check_executable(executable, stream) }

    /// Ends an executable graph.
    fn cuGraphExecDestroy(executable: usize) { state()?.end_executable(executable) }

    /// Ends a graph.
    fn cuGraphDestroy(graph: usize) { state()?.end_graph(graph) }
}

fn new_stream(stream: *mut usize, flags: c_uint) -> Outcome {
    let mut state = state()?;
    state.alive()?;
    if flags & !NON_BLOCKING != 0 {
        return Err(CuError::INVALID_VALUE);
    }
    put(stream, state.new_stream(flags == NON_BLOCKING))
}

/// Work of a stream: kept by its capture, else run.
pub fn submit(stream: usize, work: Work) -> Outcome {
    let work = state()?.submit(stream, work)?;
    work.as_ref().map_or(Ok(()), run)
}

/// Work that its caller waits for.
pub fn now(work: Work) -> Outcome {
    state()?.synchronous()?;
    run(&work)
}

/// Does work. The state is not locked meanwhile.
fn run(work: &Work) -> Outcome {
    let (memory, options) = {
        let state = state()?;
        state.alive()?;
        (state.memory.clone(), state.setup.options.clone())
    };
    match work {
        Work::Launch(ready, arguments) => {
            if let Err(error) = ready.run(arguments, &memory, &options) {
                // As on a device, the launch itself succeeds and what follows fails.
                state()?.fail(error);
            }
        }
        Work::CopyIn { bytes: 0, .. } | Work::CopyOut { bytes: 0, .. } => {}
        Work::CopyIn { to, from, bytes: count } => memory.copy_in(*to, bytes(*from as *const _, *count)?)?,
        Work::CopyOut { to, from, bytes: count } => memory.copy_out(*from, bytes_mut(*to as *mut _, *count)?)?,
        Work::Copy { to, from, bytes } => memory.copy(*to, *from, *bytes as u64)?,
        Work::Fill { to, pattern, count } => memory.copy_in(*to, &pattern.repeat(*count))?,
        Work::Product(gemm) => gemm.run(&memory)?,
        Work::Allocate { address, bytes } => memory.allocate_at(*address, *bytes)?,
        Work::Free { address } => memory.free(*address)?,
    }
    Ok(())
}
