//! Row-major f64 tensors, no more than the reference needs.

use nsa_core::{DType, Element, ShapeError};

/// A row-major tensor of f64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Elements, innermost dimension contiguous.
    pub data: Vec<f64>,
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }
    }

    /// A tensor of these elements.
    ///
    /// # Panics
    /// If the number of elements is not that of the shape.
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "elements of shape {shape:?}");
        Self { shape: shape.to_vec(), data }
    }

    /// Widens elements of any type.
    ///
    /// # Panics
    /// If the number of elements is not that of the shape.
    pub fn from_elements<T: Element>(shape: &[usize], data: &[T]) -> Self {
        Self::new(shape, data.iter().map(|x| x.to_f64()).collect())
    }

    /// The innermost row at `index`, which names all dimensions but the last.
    pub fn row(&self, index: &[usize]) -> &[f64] {
        let (start, len) = self.place(index);
        &self.data[start..start + len]
    }

    /// The innermost row at `index`, to be written.
    pub fn row_mut(&mut self, index: &[usize]) -> &mut [f64] {
        let (start, len) = self.place(index);
        &mut self.data[start..start + len]
    }

    fn place(&self, index: &[usize]) -> (usize, usize) {
        assert_eq!(index.len() + 1, self.shape.len(), "an index into all dimensions but the last");
        let mut row = 0;
        for (&i, &size) in index.iter().zip(&self.shape) {
            assert!(i < size, "index {index:?} into shape {:?}", self.shape);
            row = row * size + i;
        }
        let len = self.shape[index.len()];
        (row * len, len)
    }

    /// Every element passed through `f`.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { shape: self.shape.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// Checks the shape, for argument `arg` of `op`, and that there are as many elements.
    ///
    /// # Errors
    /// If it is another shape, or elements are missing.
    pub fn check(&self, op: &'static str, arg: &str, expected: &[usize]) -> Result<(), ShapeError> {
        ShapeError::check(op, arg, expected, &self.shape)?;
        let elements = expected.iter().product::<usize>();
        let arg = || format!("{arg} (its elements)");
        ShapeError::check(op, &arg(), &[elements], &[self.data.len()])
    }
}

/// The tensor with every element rounded to `dtype`.
pub fn quantize(tensor: &Tensor, dtype: DType) -> Tensor {
    tensor.map(|x| crate::arith::round_to(dtype, x))
}
