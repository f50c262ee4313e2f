//! Random numbers: one seed, a stream for each use.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What random numbers are drawn for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// Initial values of tensor i of the manifest.
    Parameters,
    /// Order of the data in epoch i.
    Order,
    /// Choice of the validation documents.
    Split,
}

/// The generator of stream `index` for `purpose`: no two share numbers.
pub(crate) fn generator(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((purpose as u64) << 56) | index);
    rng
}
