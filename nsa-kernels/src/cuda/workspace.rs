//! Device memory that a caller lends to operations for what they need besides their tensors.
//!
//! Without it a call takes such memory from the device's pool, in the order of the stream, and copies tables of its sequences to
//! the device. In a [`Workspace`] it does neither from the second call of the same shapes on, so that it can be recorded:
//!
//! ```no_run
//! # use nsa_kernels::{Result, cuda::{Cuda, workspace::Workspace}};
//! # fn step(cuda: &Cuda, mut work: impl FnMut() -> Result<()>) -> Result<()> {
//! let mut workspace = Workspace::new(cuda);
//! cuda.with_workspace(&mut workspace, &mut work)?;
//! println!("{} bytes", workspace.bytes());
//! let graph = cuda.record(|| cuda.with_workspace(&mut workspace, &mut work))?;
//! graph.launch()
//! # }
//! ```
//!
//! [`Needs`] says before what it will hold, [`layer`] for the layer operations.

pub mod layer;
mod needs;

pub use needs::{Needs, PhiParts};

use super::Cuda;
use super::graph::check_not_recording;
use super::launch::Names;
use super::memory::DeviceBuffer;
use super::params::{In, Out};
use crate::{Error, Result};
use bytemuck::Pod;
use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places begin at multiples of so many bytes.
const ALIGNMENT: usize = 256;

/// Memory for operations, as much as the work in it has needed at once so far, and the tables that it has copied to the device.
/// Tables stay as long as the workspace: it is for work of a few shapes that comes again.
pub struct Workspace {
    cuda: Cuda,
    arena: Lent,
}

/// Of the workspace that operations are in.
#[derive(Clone, Default)]
pub(super) struct Lent(Arc<Mutex<Arena>>);

#[derive(Default)]
struct Arena {
    memory: Option<DeviceBuffer<u8>>,
    places: Places,
    tables: HashMap<Vec<u8>, Arc<DeviceBuffer<u8>>>,
}

impl Arena {
    /// Bytes of its memory.
    fn held(&self) -> usize {
        self.memory.as_ref().map_or(0, DeviceBuffer::len)
    }
}

/// Which bytes are taken: the last ones are given back first, others when all behind them are.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Where each ends, and whether it is still taken; each begins where the one before ends.
    ends: Vec<(usize, bool)>,
    /// Bytes that were taken at once, at most.
    most: usize,
}

impl Places {
    /// Takes so many bytes: the place's number, and where it begins.
    fn take(&mut self, bytes: usize) -> (usize, usize) {
        let start = self.ends.last().map_or(0, |&(end, _)| end);
        let end = start + bytes.max(1).next_multiple_of(ALIGNMENT);
        self.most = self.most.max(end);
        self.ends.push((end, true));
        (self.ends.len() - 1, start)
    }

    /// Gives a place back, by its number.
    pub(super) fn give_back(&mut self, number: usize) {
        self.ends[number].1 = false;
        while self.ends.pop_if(|(_, taken)| !*taken).is_some() {}
    }
}

/// Bytes of so many elements; if these are more than there are addresses, still so many that nobody has them.
fn bytes_of<T>(len: usize) -> usize {
    len.checked_mul(size_of::<T>()).unwrap_or(usize::MAX / 2)
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl Workspace {
    /// An empty one, which grows after the first work in it.
    pub fn new(cuda: &Cuda) -> Self {
        Self { cuda: cuda.clone(), arena: Lent::default() }
    }

    /// One of so many bytes, as [`Needs`] says them.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn with_bytes(cuda: &Cuda, bytes: usize) -> Result<Self> {
        let mut workspace = Self::new(cuda);
        workspace.arena.lock().places.most = bytes;
        workspace.grow()?;
        Ok(workspace)
    }

    /// Bytes of device memory that it holds, those of tables not included.
    pub fn bytes(&self) -> usize {
        self.arena.lock().held()
    }

    /// Makes room for what the work in it has needed, if nothing of it is in use. Without memory for that it is empty.
    fn grow(&mut self) -> Result<()> {
        let mut arena = self.arena.lock();
        if !arena.places.ends.is_empty() || arena.held() >= arena.places.most {
            return Ok(());
        }
        // The old memory is given back first, and what was needed is forgotten: the next work may need less.
        arena.memory = None;
        let most = std::mem::take(&mut arena.places.most);
        arena.memory = Some(DeviceBuffer::unwritten(&self.cuda, most)?);
        arena.places.most = most;
        Ok(())
    }
}

impl Cuda {
    /// Does `work`, whose operations on this device in this thread take the memory that they need from `workspace`. What it lacks comes from the
    /// device, as ever, and the workspace then grows to what the work needed: a graph that was recorded in it before is void.
    ///
    /// # Errors
    /// What `work` says; if the device has too little memory; if the work is recorded, and the workspace lacks what it needs.
    ///
    /// # Panics
    /// If the workspace is another stream's.
    pub fn with_workspace<R, E: From<Error>>(
        &self,
        workspace: &mut Workspace,
        work: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        assert!(workspace.cuda.stream() == self.stream(), "a workspace is used on the stream that it was made for");
        let before = self.lend(Some(workspace.arena.clone()));
        let result = {
            let _restored = Restored { cuda: self, before };
            work()
        };
        if result.is_err() {
            // It grows for work that is done, not for what there was no memory for.
            let mut arena = workspace.arena.lock();
            arena.places.most = arena.held();
        }
        let result = result?;
        workspace.grow()?;
        Ok(result)
    }

    /// Lets this thread's operations use another workspace, or none; gives back which one it was.
    fn lend(&self, lent: Option<Lent>) -> Option<Lent> {
        let mut all = self.inner.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = std::thread::current().id();
        match lent {
            Some(lent) => all.insert(thread, lent),
            None => all.remove(&thread),
        }
    }

    fn lent(&self) -> Option<Lent> {
        let all = self.inner.lent.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&std::thread::current().id()).cloned()
    }

    /// That work which is being recorded finds what it needs in its workspace.
    fn check_not_recording(&self, what: &str) -> Result<()> {
        check_not_recording(self.stream(), || {
            format!("the workspace lacks {what}: do the same work in it once before it is recorded")
        })
    }
}

/// Lends what was lent before, also after a panic.
struct Restored<'c> {
    cuda: &'c Cuda,
    before: Option<Lent>,
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        self.cuda.lend(self.before.take());
    }
}

impl Lent {
    fn lock(&self) -> MutexGuard<'_, Arena> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Elements that a call has for itself until it ends. They may be dropped once the kernels that use them are launched: what takes
/// the memory then comes behind them on the stream.
pub(crate) struct Scratch<T> {
    held: Held,
    len: usize,
    of: PhantomData<T>,
}

enum Held {
    Own(DeviceBuffer<u8>),
    Piece(Piece),
    Table(Arc<DeviceBuffer<u8>>),
}

/// A place of a workspace's memory, or beyond its end.
struct Piece {
    lent: Lent,
    number: usize,
    start: usize,
    /// Memory for it that the workspace does not have yet.
    beyond: Option<DeviceBuffer<u8>>,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.lent.lock().places.give_back(self.number);
    }
}

impl<T: Pod> Scratch<T> {
    /// What was there before.
    pub(super) fn unwritten(cuda: &Cuda, len: usize) -> Result<Self> {
        let bytes = bytes_of::<T>(len);
        let Some(lent) = cuda.lent() else {
            return Ok(Self { held: Held::Own(DeviceBuffer::unwritten(cuda, bytes)?), len, of: PhantomData });
        };
        let mut arena = lent.lock();
        let (number, start) = arena.places.take(bytes);
        let fits = arena.memory.as_ref().is_some_and(|memory| start + bytes <= memory.len());
        drop(arena);
        let mut piece = Piece { lent, number, start, beyond: None };
        if !fits {
            cuda.check_not_recording(&format!("{bytes} bytes"))?;
            piece.beyond = Some(DeviceBuffer::unwritten(cuda, bytes)?);
        }
        Ok(Self { held: Held::Piece(piece), len, of: PhantomData })
    }

    /// Zeros.
    pub(super) fn zeros(cuda: &Cuda, len: usize) -> Result<Self> {
        let mut scratch = Self::unwritten(cuda, len)?;
        let bytes = len * size_of::<T>();
        let zero = |memory: &mut DeviceBuffer<u8>, start: usize| {
            memory.mem_mut(start..start + bytes).fill("Backend::alloc", bytes, 0)
        };
        match &mut scratch.held {
            Held::Own(memory) | Held::Piece(Piece { beyond: Some(memory), .. }) => zero(memory, 0)?,
            Held::Piece(Piece { lent, start, .. }) => {
                zero(lent.lock().memory.as_mut().expect("the place is in it"), *start)?;
            }
            Held::Table(_) => unreachable!("it was just made"),
        }
        Ok(scratch)
    }

    /// A copy of the host's elements, to be read.
    pub(super) fn upload(cuda: &Cuda, data: &[T]) -> Result<Self> {
        let (bytes, len) = (bytemuck::cast_slice::<T, u8>(data), data.len());
        let Some(lent) = cuda.lent() else {
            return Ok(Self { held: Held::Own(DeviceBuffer::upload(cuda, bytes)?), len, of: PhantomData });
        };
        let mut arena = lent.lock();
        let table = match arena.tables.get(bytes) {
            Some(table) => table.clone(),
            None => {
                cuda.check_not_recording("a table of these sequences")?;
                let table = Arc::new(DeviceBuffer::upload(cuda, bytes)?);
                arena.tables.insert(bytes.to_vec(), table.clone());
                table
            }
        };
        drop(arena);
        Ok(Self { held: Held::Table(table), len, of: PhantomData })
    }

    /// Copies elements to the host, and waits for them.
    pub(crate) fn read(&self, op: &str, target: &mut [T]) -> Result<()> {
        let count = target.len().min(self.len) * size_of::<T>();
        let target = &mut bytemuck::cast_slice_mut::<T, u8>(target)[..count];
        match &self.held {
            Held::Own(memory) | Held::Piece(Piece { beyond: Some(memory), .. }) => {
                memory.mem(0..count).read(op, target)
            }
            Held::Table(memory) => memory.mem(0..count).read(op, target),
            Held::Piece(Piece { lent, start, .. }) => {
                let arena = lent.lock();
                let memory = arena.memory.as_ref().expect("the place is in it");
                memory.mem(*start..start + count).read(op, target)
            }
        }
    }
}

impl<T> Scratch<T> {
    fn address(&self) -> u64 {
        match &self.held {
            Held::Own(memory) | Held::Piece(Piece { beyond: Some(memory), .. }) => memory.mem(0..0).address(),
            Held::Table(memory) => memory.mem(0..0).address(),
            Held::Piece(Piece { lent, start, .. }) => {
                lent.lock().memory.as_ref().expect("the place is in it").mem(*start..*start).address()
            }
        }
    }

    /// The address as a kernel's argument that is read.
    pub(crate) fn read_by<K: Names>(&self) -> In<K> {
        In(self.address(), PhantomData)
    }

    /// The address as a kernel's argument that is written.
    pub(crate) fn written_by<K: Names>(&mut self) -> Out<K> {
        Out(self.address(), PhantomData)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_again_once_those_behind_them_are_free() {
        let mut places = Places::default();
        let [first, second, third] = [1, 300, 0].map(|bytes| places.take(bytes));
        assert_eq!([first, second, third], [(0, 0), (1, 256), (2, 768)]);
        places.give_back(second.0);
        assert_eq!(places.take(1), (3, 1024));
        places.give_back(3);
        places.give_back(third.0);
        assert_eq!(places.take(8), (1, 256));
        places.give_back(1);
        places.give_back(first.0);
        assert_eq!((places.ends.len(), places.most, places.take(5)), (0, 1280, (0, 0)));
    }
}
