//! Devices that the simulator can pretend to be.

/// What a kind of device is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: &'static str,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_multiprocessor: u32,
    /// Bytes of shared memory that a CTA may ask for.
    pub shared_optin: u32,
    /// Attributes in which it differs from [`ATTRIBUTES`].
    differs: &'static [(usize, i32)],
}

/// Bytes of shared memory that a CTA gets without asking.
pub const SHARED_DEFAULT: u32 = 48 * 1024;
/// Bytes of shared memory that the system keeps of each CTA's.
pub const SHARED_RESERVED: u32 = 1024;

/// `CUdevice_attribute` 1, 2, … of an H100 with driver 580.
const ATTRIBUTES: [i32; 147] = [
    1024, 1024, 1024, 64, 2147483647, 65535, 65535, 49152, 65536, 32, 2147483647, 65536, 1980000, 512, 1, 132, 0, 0, 1,
    0, 131072, 131072, 65536, 16384, 16384, 16384, 32768, 32768, 2048, 512, 1, 1, 0, 6, 0, 2619000, 5120, 52428800,
    2048, 3, 1, 32768, 2048, 1, 32768, 32768, 8192, 8192, 32768, 0, 32, 32768, 32768, 2046, 32768, 131072, 65536,
    16384, 16384, 16384, 32768, 2048, 32768, 32768, 2048, 32768, 32768, 2046, 268435456, 131072, 65000, 2097120, 32768,
    32768, 9, 0, 32768, 1, 1, 1, 233472, 65536, 1, 0, 0, 0, 2, 0, 1, 1, 1, 0, 0, 0, 1, 1, 232448, 0, 1, 0, 0, 1, 1, 0,
    0, 32, 1, 32768000, 134217728, 1, 1024, 1, 1, 1, 1, 1, 1, 100, 9, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 0, -1, 0, 0, 0, 0,
    0, 0, 0, 590352606, 381751518, 1, 1, 0, 1, 1, 0, 0,
];

const A100: Profile = Profile {
    name: "NVIDIA A100-SXM4-80GB",
    capability: (8, 0),
    multiprocessors: 108,
    memory_bytes: 85_017_493_504,
    shared_multiprocessor: 164 * 1024,
    shared_optin: 163 * 1024,
    // Clock, multiprocessors, memory clock, L2 cache, capability, shared memory of a multiprocessor and of a CTA, clusters,
    // tensor maps.
    differs: &[
        (13, 1_410_000),
        (16, 108),
        (36, 1_593_000),
        (38, 41_943_040),
        (75, 8),
        (81, 167_936),
        (97, 166_912),
        (120, 0),
        (127, 0),
    ],
};

const H100: Profile = Profile {
    name: "NVIDIA H100 80GB HBM3",
    capability: (9, 0),
    multiprocessors: 132,
    memory_bytes: 85_017_493_504,
    shared_multiprocessor: 228 * 1024,
    shared_optin: 227 * 1024,
    differs: &[],
};

impl Profile {
    /// A device by its short name: `a100` or `h100`.
    pub fn named(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "a100" => Some(A100),
            "h100" => Some(H100),
            _ => None,
        }
    }

    /// `CUdevice_attribute` by its number.
    pub fn attribute(&self, attribute: i32) -> Option<i32> {
        let number = usize::try_from(attribute).ok()?;
        let own = self.differs.iter().find(|differs| differs.0 == number).map(|differs| differs.1);
        own.or_else(|| ATTRIBUTES.get(number.checked_sub(1)?).copied())
    }
}
