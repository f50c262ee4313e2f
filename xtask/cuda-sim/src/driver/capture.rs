//! Captures of streams into graphs, and what a capture forbids.

use super::error::CuError;
use super::graph::Work;
use super::state::State;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::ThreadId;

/// Which calls of which threads a capture forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Calls that may be unsafe, from all threads.
    Global,
    /// The same, from the thread that began it.
    ThreadLocal,
    /// Only what conflicts with the capture.
    Relaxed,
}

/// How many pieces of work of each stream come before a place.
pub type Known = BTreeMap<usize, usize>;

/// A capture that has begun.
struct Capture {
    origin: usize,
    mode: Mode,
    thread: ThreadId,
    invalid: bool,
    work: Vec<Work>,
    /// The streams that take part, and what comes before what they do next.
    streams: BTreeMap<usize, Known>,
}

impl Capture {
    /// Work of streams that the first one does not wait for.
    fn unjoined(&self) -> bool {
        let joined = &self.streams[&self.origin];
        self.streams.iter().any(|(stream, known)| known.get(stream) > joined.get(stream))
    }
}

/// What an event marks.
#[derive(Clone, Debug, Default)]
pub enum Mark {
    /// Nothing yet.
    #[default]
    Never,
    /// A time.
    At(std::time::Instant),
    /// A place in a capture.
    Captured(u64, Known),
}

/// The captures that have begun and not ended.
#[derive(Default)]
pub struct Captures {
    open: BTreeMap<u64, Capture>,
    last: u64,
}

impl Captures {
    fn of(&mut self, stream: usize) -> Option<(u64, &mut Capture)> {
        let mut open = self.open.iter_mut();
        open.find(|(_, capture)| capture.streams.contains_key(&stream)).map(|(id, capture)| (*id, capture))
    }

    /// Ends the use of captures that a call interferes with; `error` if there are any.
    fn interfere(&mut self, with: impl Fn(&Capture) -> bool, error: CuError) -> Result<(), CuError> {
        let mut result = Ok(());
        for capture in self.open.values_mut().filter(|capture| with(capture)) {
            capture.invalid = true;
            result = Err(error);
        }
        result
    }

    /// A stream was ended: so is the capture that began on it.
    pub fn end_stream(&mut self, stream: usize) {
        self.open.retain(|_, capture| capture.origin != stream);
    }
}

impl State {
    /// Takes work of a stream: what a capture keeps is gone, anything else is to be run now.
    ///
    /// # Errors
    /// The context has failed, the stream is none, or a capture forbids it.
    pub fn submit(&mut self, stream: usize, work: Work) -> Result<Option<Work>, CuError> {
        self.enter(stream)?;
        let Some((_, capture)) = self.captures.of(stream) else { return Ok(Some(work)) };
        if capture.invalid {
            return Err(CuError::STREAM_CAPTURE_INVALIDATED);
        }
        capture.work.push(work);
        *capture.streams.entry(stream).or_default().entry(stream).or_default() += 1;
        Ok(None)
    }

    /// A stream is used: it exists, and where it is the legacy one, no capture is of streams that wait for that.
    pub(super) fn enter(&mut self, stream: usize) -> Result<(), CuError> {
        self.alive()?;
        self.check_stream(stream)?;
        if stream > 1 {
            return Ok(());
        }
        let streams = &self.streams;
        let blocking = |capture: &Capture| {
            let mut taking_part = capture.streams.keys();
            taking_part.any(|stream| streams.get(stream).is_none_or(|stream| !stream.non_blocking))
        };
        self.captures.interfere(blocking, CuError::STREAM_CAPTURE_IMPLICIT)
    }

    /// Whether a stream captures.
    pub fn captures(&mut self, stream: usize) -> bool {
        self.captures.of(stream).is_some()
    }

    /// A call that may wait for the device or change what it holds: captures forbid it, by their mode.
    ///
    /// # Errors
    /// The context has failed, or a capture forbids it.
    pub fn unsafe_call(&mut self) -> Result<(), CuError> {
        self.alive()?;
        let me = std::thread::current().id();
        let forbids = |capture: &Capture| match capture.mode {
            Mode::Global => true,
            Mode::ThreadLocal => capture.thread == me,
            Mode::Relaxed => false,
        };
        self.captures.interfere(forbids, CuError::STREAM_CAPTURE_UNSUPPORTED)
    }

    /// A copy or fill that its caller waits for: work of the legacy stream.
    ///
    /// # Errors
    /// As those of the two.
    pub fn synchronous(&mut self) -> Result<(), CuError> {
        self.enter(0)?;
        self.unsafe_call()
    }

    /// Waits for a stream, or asks whether it is done.
    ///
    /// # Errors
    /// The context has failed, the stream is none or captures.
    pub fn wait_stream(&mut self, stream: usize) -> Result<(), CuError> {
        self.enter(stream)?;
        self.captures.interfere(|capture| capture.streams.contains_key(&stream), CuError::STREAM_CAPTURE_UNSUPPORTED)
    }

    /// Waits for the whole device.
    ///
    /// # Errors
    /// The context has failed or a stream captures.
    pub fn wait_all(&mut self) -> Result<(), CuError> {
        self.alive()?;
        self.captures.interfere(|_| true, CuError::STREAM_CAPTURE_UNSUPPORTED)
    }

    /// Waits for an event, or asks for it.
    ///
    /// # Errors
    /// The context has failed, or the event is none or of a capture, or a capture forbids it.
    pub fn wait_event(&mut self, event: usize) -> Result<(), CuError> {
        self.alive()?;
        match self.mark(event)? {
            Mark::Captured(id, _) => {
                if let Some(capture) = self.captures.open.get_mut(&id) {
                    capture.invalid = true;
                }
                Err(CuError::CAPTURED_EVENT)
            }
            _ => self.unsafe_call(),
        }
    }

    /// Marks an event: the time, or the place in a capture.
    ///
    /// # Errors
    /// The context has failed, or the stream or event is none.
    pub fn record_event(&mut self, event: usize, stream: usize) -> Result<(), CuError> {
        self.enter(stream)?;
        let mark = match self.captures.of(stream) {
            Some((_, capture)) if capture.invalid => return Err(CuError::STREAM_CAPTURE_INVALIDATED),
            Some((id, capture)) => Mark::Captured(id, capture.streams[&stream].clone()),
            None => Mark::At(std::time::Instant::now()),
        };
        *self.events.get_mut(&event).ok_or(CuError::INVALID_HANDLE)? = mark;
        Ok(())
    }

    /// Lets a stream wait for an event: in a capture it joins what the event marks. `external` events are no part of one.
    ///
    /// # Errors
    /// The context has failed, the stream or event is none, or the wait would cross the borders of a capture.
    pub fn stream_waits(&mut self, stream: usize, event: usize, external: bool) -> Result<(), CuError> {
        self.enter(stream)?;
        let mark = self.mark(event)?;
        if external {
            return Ok(());
        }
        let own = self.captures.of(stream).map(|(id, _)| id);
        let Mark::Captured(id, known) = mark else {
            let isolated = |capture: &Capture| capture.streams.contains_key(&stream) && !matches!(mark, Mark::Never);
            return self.captures.interfere(isolated, CuError::STREAM_CAPTURE_ISOLATION);
        };
        if let Some(own) = own.filter(|own| *own != id) {
            for other in [own, id] {
                self.captures.open.entry(other).and_modify(|capture| capture.invalid = true);
            }
            return Err(CuError::STREAM_CAPTURE_MERGE);
        }
        let capture = self.captures.open.get_mut(&id).ok_or(CuError::CAPTURED_EVENT)?;
        if capture.invalid {
            return Err(CuError::STREAM_CAPTURE_INVALIDATED);
        }
        if stream <= 1 {
            capture.invalid = true;
            return Err(CuError::STREAM_CAPTURE_IMPLICIT);
        }
        let ahead = capture.streams.entry(stream).or_default();
        for (stream, count) in known {
            let count = count.max(ahead.get(&stream).copied().unwrap_or(0));
            ahead.insert(stream, count);
        }
        Ok(())
    }

    /// Begins to capture a stream.
    ///
    /// # Errors
    /// The context has failed, the stream is none or the legacy one, or captures already.
    pub fn begin_capture(&mut self, stream: usize, mode: Mode) -> Result<(), CuError> {
        self.alive()?;
        self.check_stream(stream)?;
        if stream <= 1 {
            return Err(CuError::STREAM_CAPTURE_UNSUPPORTED);
        }
        if self.captures.of(stream).is_some() {
            return Err(CuError::ILLEGAL_STATE);
        }
        let thread = std::thread::current().id();
        let streams = BTreeMap::from([(stream, Known::new())]);
        self.captures.last += 1;
        let capture = Capture { origin: stream, mode, thread, invalid: false, work: Vec::new(), streams };
        self.captures.open.insert(self.captures.last, capture);
        Ok(())
    }

    /// Ends a capture: its graph.
    ///
    /// # Errors
    /// The stream captures nothing, the capture began on another stream or thread, is invalid, or has work that is not
    /// joined.
    pub fn end_capture(&mut self, stream: usize) -> Result<usize, CuError> {
        self.alive()?;
        self.check_stream(stream)?;
        let (id, capture) = self.captures.of(stream).ok_or(CuError::ILLEGAL_STATE)?;
        if capture.origin != stream {
            capture.invalid = true;
            return Err(CuError::STREAM_CAPTURE_UNMATCHED);
        }
        if capture.mode != Mode::Relaxed && capture.thread != std::thread::current().id() {
            return Err(CuError::STREAM_CAPTURE_WRONG_THREAD);
        }
        let capture = self.captures.open.remove(&id).ok_or(CuError::ILLEGAL_STATE)?;
        if capture.invalid {
            return Err(CuError::STREAM_CAPTURE_INVALIDATED);
        }
        if capture.unjoined() {
            return Err(CuError::STREAM_CAPTURE_UNJOINED);
        }
        let handle = self.handle();
        self.graphs.insert(handle, Arc::new(capture.work));
        Ok(handle)
    }

    /// `CUstreamCaptureStatus`: 0 none, 1 active, 2 invalid.
    ///
    /// # Errors
    /// The stream is none, or the legacy one while a stream that waits for it captures.
    pub fn capture_status(&mut self, stream: usize) -> Result<i32, CuError> {
        self.check_stream(stream)?;
        let blocking = |stream: &usize| self.streams.get(stream).is_none_or(|stream| !stream.non_blocking);
        if stream <= 1 && self.captures.open.values().any(|capture| capture.streams.keys().any(blocking)) {
            return Err(CuError::STREAM_CAPTURE_IMPLICIT);
        }
        Ok(self.captures.of(stream).map_or(0, |(_, capture)| 1 + i32::from(capture.invalid)))
    }
}
