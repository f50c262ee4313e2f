//! Instruction sets: which there are, which this machine has, which one runs.

use std::fmt;

/// An instruction set that the kernels have a path for. A value is a choice; [`Isa::missing`] says whether the machine
/// can follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every processor of the target has; the compiler vectorises.
    Portable,
    /// NEON of 64-bit ARM: 4 floats a vector.
    Neon,
    /// AVX2 and FMA: 8 floats a vector.
    Avx2,
    /// AVX-512 F, BW, DQ and VL: 16 floats a vector.
    Avx512,
    /// AVX-512 with BF16: bf16 tensors are multiplied in pairs, without widening.
    Avx512Bf16,
}

impl Isa {
    /// All of them, those of an architecture from the least to the most capable.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// Its name in options and in NSA_BACKEND.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// The features that it needs and this machine lacks.
    pub fn missing(self) -> Vec<&'static str> {
        self.needed().iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect()
    }

    /// Those that this machine has, from the least to the most capable.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.missing().is_empty())
    }

    /// The fastest one on this machine: the most capable that it has, unless that is known to be slower.
    pub fn best() -> Self {
        Self::available().rfind(|isa| isa.slower().is_none()).unwrap_or(Self::Portable)
    }

    /// Why the one before is faster on this machine, if it is.
    pub fn slower(self) -> Option<&'static str> {
        // A Sapphire Rapids core: 55 to 70 GFLOP/s of attention on pairs, 92 to 108 on the same tensors widened.
        (self == Self::Avx512Bf16 && intel()).then_some("processors of Intel multiply pairs of bf16 slower than floats")
    }

    /// Features beyond the target's, and whether this machine has them.
    #[cfg(target_arch = "x86_64")]
    fn needed(self) -> Vec<(&'static str, bool)> {
        macro_rules! features {
            ($($name:tt),*) => { vec![$(($name, std::arch::is_x86_feature_detected!($name))),*] };
        }
        match self {
            Self::Portable => Vec::new(),
            Self::Neon => vec![("a 64-bit ARM processor", false)],
            Self::Avx2 => features!("avx2", "fma"),
            Self::Avx512 => features!("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
            Self::Avx512Bf16 => {
                features!("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
            }
        }
    }

    /// Features beyond the target's, and whether this machine has them.
    #[cfg(not(target_arch = "x86_64"))]
    fn needed(self) -> Vec<(&'static str, bool)> {
        match self {
            Self::Portable => Vec::new(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => vec![("neon", std::arch::is_aarch64_feature_detected!("neon"))],
            #[cfg(not(target_arch = "aarch64"))]
            Self::Neon => vec![("a 64-bit ARM processor", false)],
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => vec![("an x86-64 processor", false)],
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn intel() -> bool {
    raw_cpuid::CpuId::new().get_vendor_info().is_some_and(|vendor| vendor.as_str() == "GenuineIntel")
}

#[cfg(not(target_arch = "x86_64"))]
fn intel() -> bool {
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_capabilities_grow() {
        for isa in Isa::ALL {
            assert_eq!(Isa::named(isa.name()), Some(isa));
        }
        assert_eq!(Isa::named("sse9"), None);
        assert!(Isa::Portable.missing().is_empty());
        // Each of x86-64 needs what the one before needs.
        let counts = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].map(|isa| isa.missing().len());
        assert!(counts.is_sorted(), "{counts:?}");
        assert!(Isa::best().missing().is_empty());
    }
}
