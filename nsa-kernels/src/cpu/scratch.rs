//! Scratch memory that outlives a call: vectors are taken and given back, so that nothing is allocated in the steady
//! state.

use bytemuck::{Pod, Zeroable};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A cache line: the unit and alignment of scratch memory.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Scratch vectors, shared by all clones of a backend.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Free>>);

/// Vectors that nobody has, by their lengths: a call of many sequences leaves many.
type Free = BTreeMap<usize, Vec<Vec<Line>>>;

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl Pool {
    /// `len` elements with unspecified contents (NaN in debug builds), aligned to a cache line; they return to the
    /// pool when dropped.
    pub(crate) fn take<T: Pod>(&self, len: usize) -> Scratch<'_, T> {
        let needed = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        let mut lines = self.best_fit(needed);
        if lines.len() < needed {
            lines.resize(needed, Line([0; 64]));
        }
        if cfg!(debug_assertions) {
            lines[..needed].fill(Line([0xff; 64]));
        }
        Scratch { pool: self, lines, len, element: PhantomData }
    }

    /// `len` elements of zero bits.
    pub(crate) fn zeroed<T: Pod>(&self, len: usize) -> Scratch<'_, T> {
        let mut scratch = self.take(len);
        scratch.fill(T::zeroed());
        scratch
    }

    /// 0, `step`, 2 · `step`, …: `count` places.
    pub(crate) fn multiples(&self, count: usize, step: usize) -> Scratch<'_, usize> {
        let mut places = self.take(count);
        places.iter_mut().enumerate().for_each(|(i, place)| *place = i * step);
        places
    }

    /// The smallest vector of at least `needed` lines, else the largest.
    fn best_fit(&self, needed: usize) -> Vec<Line> {
        let mut free = self.free();
        let Some(len) = free.range(needed..).next().or_else(|| free.last_key_value()).map(|(&len, _)| len) else {
            return Vec::new();
        };
        let of_length = free.get_mut(&len).expect("just found");
        let found = of_length.pop().expect("lengths without vectors are not kept");
        if of_length.is_empty() {
            free.remove(&len);
        }
        found
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Elements borrowed from a [`Pool`].
pub(crate) struct Scratch<'p, T> {
    pool: &'p Pool,
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Deref for Scratch<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Scratch<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T> Drop for Scratch<'_, T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if !lines.is_empty() {
            self.pool.free().entry(lines.len()).or_default().push(lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_come_back_and_are_taken_again() {
        let pool = Pool::default();
        let (small, large) = (pool.take::<f32>(10), pool.zeroed::<f64>(1000));
        assert!(large.iter().all(|&x| x == 0.0));
        assert_eq!((small.len(), large.len()), (10, 1000));
        let (at_small, at_large) = (small.as_ptr() as usize, large.as_ptr() as usize);
        assert_eq!((at_small % 64, at_large % 64), (0, 0));
        drop((small, large));
        // The best fit: the small one for few elements, the large one for as many as it holds.
        assert_eq!(pool.take::<u8>(3).as_ptr() as usize, at_small);
        assert_eq!(pool.clone().take::<i32>(2000).as_ptr() as usize, at_large);
        assert_eq!(pool.take::<f32>(0).len(), 0);
        assert_eq!(*pool.multiples(3, 7), [0, 7, 14]);
    }
}
