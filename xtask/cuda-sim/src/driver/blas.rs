//! Products of matrices for `libcublas.so`, on the CPU: columns in parallel, sums in f64 and rounded once.

use super::error::CuError;
use crate::memory::DeviceMemory;
use half::{bf16, f16};
use rayon::prelude::*;

/// How elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// f16
    Half,
    /// bf16
    Brain,
    /// f32
    Single,
    /// f64
    Double,
}

impl Stored {
    /// A `cudaDataType`.
    pub fn of_data_type(data_type: i32) -> Option<Self> {
        match data_type {
            0 => Some(Self::Single),
            1 => Some(Self::Double),
            2 => Some(Self::Half),
            14 => Some(Self::Brain),
            _ => None,
        }
    }

    /// Whether products of these types are made where sums are of a `cublasComputeType_t`: the table of `cublasGemmEx`.
    pub fn multiply([a, b, c]: [Self; 3], compute: i32) -> bool {
        a == b
            && match compute {
                64 | 65 => (a, c) == (Self::Half, Self::Half),
                68 | 69 => a != Self::Double && (c == a || c == Self::Single),
                74 | 75 | 77 => (a, c) == (Self::Single, Self::Single),
                70 | 71 => (a, c) == (Self::Double, Self::Double),
                _ => false,
            }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::Half | Self::Brain => 2,
            Self::Single => 4,
            Self::Double => 8,
        }
    }

    fn read(self, bytes: &[u8]) -> f64 {
        match self {
            Self::Half => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
            Self::Brain => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
            Self::Single => f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
            Self::Double => f64::from_bits(bytes.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte))),
        }
    }

    fn write(self, value: f64, bytes: &mut [u8]) {
        match self {
            Self::Half => bytes.copy_from_slice(&f16::from_f32(value as f32).to_le_bytes()),
            Self::Brain => bytes.copy_from_slice(&bf16::from_f32(value as f32).to_le_bytes()),
            Self::Single => bytes.copy_from_slice(&(value as f32).to_le_bytes()),
            Self::Double => bytes.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// Matrices in device memory, column by column.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// The first element.
    pub address: u64,
    /// Elements from column to column.
    pub leading: i64,
    /// Elements from matrix to matrix of a batch.
    pub stride: i64,
    /// How elements are stored.
    pub stored: Stored,
    /// Rows are columns.
    pub transposed: bool,
}

/// C = α op(A) op(B) + β C
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of C, its columns, and the depth of the sums.
    pub sizes: [i64; 3],
    /// A.
    pub a: Matrix,
    /// B.
    pub b: Matrix,
    /// C.
    pub c: Matrix,
    /// α and β.
    pub scales: [f64; 2],
    /// Products.
    pub batch: i64,
}

impl Matrix {
    /// Whether columns lie apart, of a matrix that has so many rows and columns.
    fn holds(&self, rows: i64, columns: i64) -> bool {
        self.leading >= if self.transposed { columns } else { rows }.max(1)
    }

    /// Element numbers of a matrix of a batch that has so many rows and columns, and its bytes.
    fn read(&self, memory: &DeviceMemory, number: i64, rows: usize, columns: usize) -> Result<Vec<f64>, CuError> {
        let (height, width) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let size = self.stored.bytes() as usize;
        let mut out = vec![0.0; rows * columns];
        let mut bytes = vec![0; height * size];
        for column in 0..width {
            memory.copy_out(self.column(number, column), &mut bytes)?;
            for (row, element) in bytes.chunks_exact(size).enumerate() {
                let place = if self.transposed { row * rows + column } else { column * rows + row };
                out[place] = self.stored.read(element);
            }
        }
        Ok(out)
    }

    fn column(&self, number: i64, column: usize) -> u64 {
        let elements = number * self.stride + column as i64 * self.leading;
        self.address.wrapping_add_signed(elements * self.stored.bytes() as i64)
    }
}

impl Gemm {
    /// Checks the sizes.
    ///
    /// # Errors
    /// Sizes that make no sense.
    pub fn check(&self) -> Result<(), CuError> {
        let [m, n, k] = self.sizes;
        let apart = self.a.holds(m, k) && self.b.holds(k, n) && self.c.holds(m, n);
        if self.sizes.iter().any(|size| *size < 0) || self.batch < 0 || !apart {
            return Err(CuError::INVALID_VALUE);
        }
        Ok(())
    }

    /// Computes all products of the batch, whose sizes were checked.
    ///
    /// # Errors
    /// Matrices beyond their memory.
    pub fn run(&self, memory: &DeviceMemory) -> Result<(), CuError> {
        let [rows, columns, depth] = self.sizes.map(|size| size as usize);
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        (0..self.batch).try_for_each(|number| self.one(memory, number, [rows, columns, depth]))
    }

    fn one(&self, memory: &DeviceMemory, number: i64, [rows, columns, depth]: [usize; 3]) -> Result<(), CuError> {
        let a = self.a.read(memory, number, rows, depth)?;
        let b = self.b.read(memory, number, depth, columns)?;
        let [alpha, beta] = self.scales;
        // C is not read where β is 0: it may hold anything.
        let mut c = if beta == 0.0 { vec![0.0; rows * columns] } else { self.c.read(memory, number, rows, columns)? };
        c.par_chunks_exact_mut(rows).enumerate().for_each(|(column, out)| {
            let mut sums = vec![0.0; rows];
            for (k, left) in a.chunks_exact(rows).enumerate() {
                pulp::Arch::new().dispatch(Add { sums: &mut sums, left, right: b[column * depth + k] });
            }
            for (out, sum) in out.iter_mut().zip(&sums) {
                *out = if beta == 0.0 { alpha * sum } else { alpha * sum + beta * *out };
            }
        });
        let size = self.c.stored.bytes() as usize;
        let mut bytes = vec![0; rows * size];
        for (column, values) in c.chunks_exact(rows).enumerate() {
            values
                .iter()
                .zip(bytes.chunks_exact_mut(size))
                .for_each(|(value, bytes)| self.c.stored.write(*value, bytes));
            memory.copy_in(self.c.column(number, column), &bytes)?;
        }
        Ok(())
    }
}

/// sums += left · right
struct Add<'s> {
    sums: &'s mut [f64],
    left: &'s [f64],
    right: f64,
}

impl pulp::WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        for (sum, left) in self.sums.iter_mut().zip(self.left) {
            *sum = left.mul_add(self.right, *sum);
        }
    }
}
