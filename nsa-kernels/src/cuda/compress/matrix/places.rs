//! What φ of the kinds `linear` and `mlp` takes of a workspace.

use super::{Chunks, Sizes};
use crate::cuda::reduce::take_column_totals;
use crate::cuda::workspace::{Needs, PhiParts, Places};
use nsa_core::{CompressKind, DType};

/// Takes what each step of a call holds while it holds it.
struct Taking {
    places: Places,
    sizes: Sizes,
    dtype: DType,
    /// Whether there is a second layer.
    second: bool,
    given: PhiParts,
    rows: usize,
    /// Elements of all chunks, and whether they lie where they are multiplied.
    gathered: usize,
    in_place: bool,
}

/// What [`forward`](super::forward) takes.
pub(in crate::cuda::compress) fn forward_places(needs: &Needs<'_>, dim: usize, given: PhiParts) -> Places {
    let mut taking = Taking::begun(needs, dim, given);
    if taking.rows > 0 {
        taking.units();
        if taking.second {
            taking.outputs();
        }
    }
    taking.places
}

/// What [`backward`](super::backward) takes.
pub(in crate::cuda::compress) fn backward_places(needs: &Needs<'_>, dim: usize, given: PhiParts) -> Places {
    let mut taking = Taking::begun(needs, dim, given);
    if taking.rows > 0 {
        taking.outputs();
        if taking.second {
            taking.second_backward();
        }
        taking.first_backward();
        if taking.given.bias1 || taking.given.position {
            taking.totals(taking.sizes.hidden);
        }
    }
    taking.places
}

impl Taking {
    /// With what both directions take first.
    fn begun(needs: &Needs<'_>, dim: usize, given: PhiParts) -> Self {
        let config = needs.config;
        let second = config.compress_kind() == CompressKind::Mlp;
        let hidden = config.compress_hidden().filter(|_| second).unwrap_or(dim);
        let (sizes, chunks) = (Sizes::new(config, dim, hidden), Chunks::new(config, needs.packing));
        let mut taking = Self {
            places: Places::default(),
            sizes,
            dtype: needs.dtype,
            second,
            given,
            rows: chunks.blocks.len(),
            gathered: chunks.tokens.len() * sizes.heads * sizes.chunk(),
            in_place: sizes.in_place(&chunks).is_some(),
        };
        taking.network();
        if taking.rows > 0 && !taking.in_place {
            taking.places.take_of::<u8>(taking.gathered * taking.dtype.size_bytes());
        }
        taking
    }

    /// What the layers add to every row, and the second weight in f32.
    fn network(&mut self) {
        let Sizes { heads, dim, hidden, block, .. } = self.sizes;
        if self.given.position {
            let partial = self.places.take_of::<f64>(block * heads * hidden);
            let totals = self.places.take_of::<f64>(heads * hidden);
            self.places.take_of::<f32>(heads * hidden);
            self.places.give_back(totals);
            self.places.give_back(partial);
        } else if self.given.bias1 {
            self.places.take_of::<f32>(heads * hidden);
        }
        if self.second {
            self.widened(heads * hidden * dim);
        }
        if self.given.bias2 {
            self.places.take_of::<f32>(heads * dim);
        }
    }

    /// A copy in f32 of a matrix of the tensors' type: its place.
    fn widened(&mut self, elements: usize) -> Option<usize> {
        (self.dtype != DType::F32).then(|| self.places.take_of::<f32>(elements))
    }

    /// `[rows, G, H]`.
    fn units(&mut self) -> usize {
        self.places.take_of::<f32>(self.rows * self.sizes.heads * self.sizes.hidden)
    }

    /// `[rows, G, D]`.
    fn outputs(&mut self) {
        self.places.take_of::<f32>(self.rows * self.sizes.heads * self.sizes.dim);
    }

    /// Sums of the columns of `[rows, G, width]`.
    fn totals(&mut self, width: usize) {
        let totals = take_column_totals(&mut self.places, [self.rows, self.sizes.heads * width]);
        self.places.give_back(totals);
    }

    fn second_backward(&mut self) {
        if self.given.bias2 {
            self.totals(self.sizes.dim);
        }
        self.units();
        let again = self.units();
        self.places.give_back(again);
    }

    fn first_backward(&mut self) {
        let Sizes { heads, dim, hidden, block, .. } = self.sizes;
        let copies = [self.widened(self.gathered), self.widened(heads * block * dim * hidden)];
        let d_chunks = (!self.in_place).then(|| self.places.take_of::<f32>(self.gathered));
        copies.into_iter().chain([d_chunks]).flatten().for_each(|place| self.places.give_back(place));
    }
}
