//! The CPU backend.

#[expect(unsafe_code, reason = "the library's GEMM takes pointers")]
pub(crate) mod gemm;
#[expect(unsafe_code, reason = "the inner loops read without checks what was checked before them")]
pub(crate) mod inner;
pub(crate) mod isa;
pub(crate) mod layer;
pub(crate) mod product;
#[expect(unsafe_code, reason = "intrinsics, loads and stores, and the boundary where features are enabled")]
pub(crate) mod simd;

pub(crate) mod cmp;
pub(crate) mod compress;
pub(crate) mod decode;
pub(crate) mod dense;
pub(crate) mod gate;
pub(crate) mod slc;
pub(crate) mod win;

pub(crate) mod ahead;
pub(crate) mod band;
pub(crate) mod chunks;
pub(crate) mod flash;
pub(crate) mod grad;
pub(crate) mod keys;
pub(crate) mod math;
pub(crate) mod rows;
pub(crate) mod scratch;
pub(crate) mod softmax;
pub(crate) mod tasks;
pub(crate) mod turns;
pub(crate) mod unit;

use isa::Isa;
use nsa_core::DType;
use scratch::Pool;

/// The host's processor with the instruction set chosen.
#[derive(Clone, Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Pool,
}

impl Cpu {
    /// The processor with an instruction set.
    ///
    /// # Errors
    /// The features that it lacks.
    pub fn new(isa: Isa) -> Result<Self, Vec<&'static str>> {
        let missing = isa.missing();
        if missing.is_empty() { Ok(Self { isa, pool: Pool::default() }) } else { Err(missing) }
    }

    /// The instruction set chosen.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Whether tensors of this type are multiplied as pairs of bf16, not widened.
    pub(crate) fn multiplies_pairs(&self, dtype: DType) -> bool {
        dtype == DType::Bf16 && self.isa == Isa::Avx512Bf16
    }

    /// Scratch memory, shared by all clones.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }
}
