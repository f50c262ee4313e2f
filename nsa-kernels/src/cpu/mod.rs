//! The CPU backend.

#[expect(unsafe_code, reason = "the library's GEMM takes pointers")]
pub(crate) mod gemm;
pub(crate) mod layer;

pub(crate) mod cmp;
pub(crate) mod compress;
pub(crate) mod decode;
pub(crate) mod dense;
pub(crate) mod gate;
pub(crate) mod slc;
pub(crate) mod win;

pub(crate) mod band;
pub(crate) mod flash;
pub(crate) mod grad;
pub(crate) mod math;
pub(crate) mod rows;
pub(crate) mod scratch;
pub(crate) mod tasks;
pub(crate) mod tile;

use scratch::Pool;

/// The host's processor with the instruction set chosen.
#[derive(Clone, Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Pool,
}

/// Instruction sets with a path of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the target has at least; the compiler vectorises.
    Portable,
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
        })
    }
}

impl Cpu {
    /// The path that runs everywhere.
    pub fn portable() -> Self {
        Self { isa: Isa::Portable, pool: Pool::default() }
    }

    /// The instruction set chosen.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Scratch memory, shared by all clones.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }
}
