//! Copies that are made together, as rows go to many caches in a decoding step.

use crate::{Backend, Error, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::{Element, ShapeError};

/// One of the copies of [`all`].
#[derive(Debug)]
pub struct Piece<'a, T: Element> {
    /// `[P]`, another number in each copy.
    pub source: Tensor<'a, T, 1>,
    /// Written: `[P]`.
    pub target: TensorMut<'a, T, 1>,
}

/// Copies each source to its target. On a device, up to 32 copies are one launch.
///
/// **Shapes**: on the fields of [`Piece`].
///
/// **Numerics**: the same bits.
///
/// **Source**: reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a target is not as long as its source, or not in the backend's memory.
pub fn all<T: Element>(backend: &Backend, copies: Vec<Piece<'_, T>>) -> Result<()> {
    const OP: &str = "copy::all";
    for copy in &copies {
        copy.target.check(OP, "target", copy.source.shape())?;
    }
    match backend {
        Backend::Cpu(_) => cpu::layer::copy::all(copies),
        Backend::Cuda(cuda) => cuda::layer::copy::all(cuda, OP, copies),
    }
}

/// Copies that a device makes later, maybe as a part of work that is [recorded](crate::record) before it is known what they copy:
/// their places lie on the device, in slots of some copies each.
#[derive(Debug)]
pub struct Table {
    slots: usize,
    copies: usize,
    device: cuda::layer::copy::Table,
}

impl Table {
    const OP: &'static str = "copy::Table";

    /// Of `slots` slots of up to `copies` copies, with nothing to copy.
    ///
    /// # Errors
    /// On the CPU, which makes copies when they are asked for ([`all`]), or if a device has no memory for it.
    pub fn new(backend: &Backend, slots: usize, copies: usize) -> Result<Self> {
        match backend {
            Backend::Cpu(_) => Err(Error::Unsupported {
                op: Self::OP,
                backend: backend.name(),
                what: "copies that are made later".to_owned(),
                advice: "make them with `copy::all`",
            }),
            Backend::Cuda(cuda) => {
                Ok(Self { slots, copies, device: cuda::layer::copy::Table::new(cuda, [slots, copies])? })
            }
        }
    }

    /// Slots, and copies of each.
    pub fn shape(&self) -> [usize; 2] {
        [self.slots, self.copies]
    }

    /// Notes the copies of a slot, in place of those before. Their memory must be there when they are made.
    ///
    /// # Errors
    /// If there is no such slot or there are more copies than it has, a target is not as long as its source, or one is not in the
    /// device's memory.
    pub fn set<T: Element>(&mut self, slot: usize, copies: Vec<Piece<'_, T>>) -> Result<()> {
        self.check(slot)?;
        ShapeError::check(Self::OP, "copies", &[copies.len().min(self.copies)], &[copies.len()])?;
        for copy in &copies {
            copy.target.check(Self::OP, "target", copy.source.shape())?;
        }
        self.device.set(Self::OP, slot, copies)
    }

    /// Tells the device what was noted since it was told before: one copy, in the order of its work.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn send(&mut self) -> Result<()> {
        self.device.send(Self::OP)
    }

    /// Makes the copies of a slot, as the device was told last when it comes to them. One launch.
    ///
    /// **Numerics**: the same bits.
    ///
    /// # Errors
    /// If there is no such slot, or the device refuses.
    pub fn run(&self, slot: usize) -> Result<()> {
        self.check(slot)?;
        self.device.run(Self::OP, slot)
    }

    fn check(&self, slot: usize) -> Result<()> {
        Ok(ShapeError::check(Self::OP, "slots", &[self.slots.max(slot + 1)], &[self.slots])?)
    }
}
