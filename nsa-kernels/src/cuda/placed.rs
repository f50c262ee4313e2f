//! What steps share whose caches a device is told of before: page tables, and workspaces that grow.

use super::Cuda;
use super::attention::unsupported;
use super::geometry::copy_bytes;
use super::memory::Mirror;
use super::params::In;
use crate::{Pages, Result};
use bytemuck::Pod;
use std::marker::PhantomData;

/// The shortest context that [`room`] is for.
const LEAST_CONTEXT: usize = 1024;

/// Sequences and tokens that a workspace has room for, for a batch of so many, and for those of the one before it.
pub(super) fn room([sequences, context]: [usize; 2], before: Option<[usize; 2]>) -> [usize; 2] {
    let before = before.unwrap_or([0, LEAST_CONTEXT]);
    let (sequences, context) = (sequences.max(before[0]), context.max(before[1]));
    let context = context.checked_next_power_of_two().unwrap_or(context).min(i32::MAX as usize);
    [sequences.next_power_of_two(), context]
}

/// The workspace, if it serves, else the one that is made for the capacity of what was there, whose memory is given back first; and
/// whether it was made.
///
/// # Errors
/// If none can be made.
pub(super) fn serving<W, C>(
    workspace: &mut Option<W>,
    serves: impl FnOnce(&W) -> bool,
    capacity: impl FnOnce(W) -> C,
    make: impl FnOnce(Option<C>) -> Result<W>,
) -> Result<(&mut W, bool)> {
    let outgrown = !workspace.as_ref().is_some_and(serves);
    if outgrown {
        let before = workspace.take().map(capacity);
        *workspace = Some(make(before)?);
    }
    Ok((workspace.as_mut().expect("it was there, or made"), outgrown))
}

/// A table of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageTable {
    /// What its pages are of, for errors.
    pub(super) arg: &'static str,
    /// Elements of a row of one KV head.
    pub(super) dim: usize,
    /// Rows of a page.
    pub(super) page_rows: usize,
    /// Pages of a sequence, at most.
    pub(super) pages: usize,
}

/// N tables a layer, each `[S, pages]` addresses on the host and on the device; 0 where there is no page.
#[derive(Debug)]
pub(super) struct PageTables<const N: usize> {
    cuda: Cuda,
    op: &'static str,
    tables: [PageTable; N],
    sequences: usize,
    /// `[layers, N, S, pages]`.
    addresses: Mirror<u64>,
}

impl<const N: usize> PageTables<N> {
    /// Without pages.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub(super) fn new(
        cuda: &Cuda,
        op: &'static str,
        tables: [PageTable; N],
        [layers, sequences]: [usize; 2],
    ) -> Result<Self> {
        let addresses = Mirror::zeros(cuda, layers * sequences * addresses(&tables))?;
        Ok(Self { cuda: cuda.clone(), op, tables, sequences, addresses })
    }

    /// Notes where the pages of the sequences of a layer are; others have none.
    ///
    /// # Errors
    /// If they are not in this device's memory, or lie or are cut otherwise than kernels can take.
    pub(super) fn place<T: Pod>(&mut self, layer: usize, sequences: &[[&Pages<'_, T>; N]]) -> Result<()> {
        let mut all = Vec::with_capacity(self.len());
        for (at, table) in self.tables.iter().enumerate() {
            for of_sequence in sequences {
                let end = all.len() + table.pages;
                self.push(table, of_sequence[at], &mut all)?;
                all.resize(end, 0);
            }
            all.resize(all.len() + (self.sequences - sequences.len()) * table.pages, 0);
        }
        self.addresses.set(layer * all.len(), &all);
        Ok(())
    }

    fn push<T: Pod>(&self, table: &PageTable, pages: &Pages<'_, T>, all: &mut Vec<u64>) -> Result<()> {
        if pages.len > 0 && pages.page_rows != table.page_rows {
            let what =
                format!("`{}` in pages of {} rows beside ones of {}", table.arg, pages.page_rows, table.page_rows);
            return Err(unsupported(&self.cuda, self.op, &what, "use one number of rows a page"));
        }
        for page in &pages.pages[..pages.len.div_ceil(table.page_rows)] {
            let address = page.on_device(self.op, table.arg, &self.cuda)?.address();
            all.push(aligned::<T>(&self.cuda, self.op, (table.arg, table.dim), address)?);
        }
        Ok(())
    }

    /// Whether so many rows of a sequence of a layer are in the pages that were noted last.
    pub(super) fn hold(&self, layer: usize, sequence: usize, rows: [usize; N]) -> bool {
        let mut table_at = layer * self.len();
        self.tables.iter().zip(rows).all(|(table, rows)| {
            let own = &self.addresses.host()[table_at + sequence * table.pages..][..table.pages];
            table_at += self.sequences * table.pages;
            rows == 0 || own.get((rows - 1) / table.page_rows).is_some_and(|&address| address != 0)
        })
    }

    /// Copies what was noted since it was copied before, in the order of the device's work.
    ///
    /// # Errors
    /// If the device refuses.
    pub(super) fn send(&mut self) -> Result<()> {
        self.addresses.send(self.op)
    }

    /// The tables of a layer.
    pub(super) fn of_layer(&self, layer: usize) -> [In<u64>; N] {
        let mut next = layer * self.len();
        self.tables.map(|table| {
            let at = self.addresses.address(next);
            next += self.sequences * table.pages;
            In(at, PhantomData)
        })
    }

    /// Bytes of the tables of all layers.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.addresses.host())
    }

    /// Addresses of a layer's.
    fn len(&self) -> usize {
        self.sequences * addresses(&self.tables)
    }
}

/// Addresses of a sequence in the tables of a layer.
pub(super) fn addresses(tables: &[PageTable]) -> usize {
    tables.iter().map(|table| table.pages).sum()
}

/// The address, if rows of so many elements there can be copied as kernels do.
///
/// # Errors
/// If not.
pub(super) fn aligned<T>(
    cuda: &Cuda,
    op: &'static str,
    (arg, dim): (&'static str, usize),
    address: u64,
) -> Result<u64> {
    let bytes = copy_bytes(dim, size_of::<T>(), &[]) as u64;
    if address.is_multiple_of(bytes) {
        return Ok(address);
    }
    let what = format!("`{arg}` at an address that is no multiple of {bytes}");
    Err(unsupported(cuda, op, &what, "let it begin where its memory does, or whole rows behind"))
}
