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
    /// Bytes of L2 cache.
    pub l2_bytes: u32,
    /// Clock in kHz.
    pub clock_khz: u32,
    /// Memory clock in kHz.
    pub memory_clock_khz: u32,
    /// Width of the memory bus in bits.
    pub bus_bits: u32,
}

/// Bytes of shared memory that a CTA gets without asking.
pub const SHARED_DEFAULT: u32 = 48 * 1024;
/// Bytes of shared memory that the system keeps of each CTA's.
pub const SHARED_RESERVED: u32 = 1024;

const A100: Profile = Profile {
    name: "NVIDIA A100-SXM4-80GB",
    capability: (8, 0),
    multiprocessors: 108,
    memory_bytes: 80 << 30,
    shared_multiprocessor: 164 * 1024,
    shared_optin: 163 * 1024,
    l2_bytes: 40 << 20,
    clock_khz: 1_410_000,
    memory_clock_khz: 1_593_000,
    bus_bits: 5120,
};

const H100: Profile = Profile {
    name: "NVIDIA H100 80GB HBM3",
    capability: (9, 0),
    multiprocessors: 132,
    memory_bytes: 80 << 30,
    shared_multiprocessor: 228 * 1024,
    shared_optin: 227 * 1024,
    l2_bytes: 50 << 20,
    clock_khz: 1_980_000,
    memory_clock_khz: 2_619_000,
    bus_bits: 5120,
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

    /// `CUdevice_attribute` by its number; 0 for what the device does not have.
    pub fn attribute(&self, attribute: i32) -> Option<i32> {
        let value = match attribute {
            1 | 2 | 4 => 1024,
            3 => 64,
            5 => i32::MAX,
            6 | 7 => 65535,
            8 => SHARED_DEFAULT as i32,
            9 => 65536,
            10 => 32,
            11 => i32::MAX,
            12 | 82 => 65536,
            13 => self.clock_khz as i32,
            14 => 512,
            15 | 31 | 41 | 78 | 79 | 80 | 83 | 89 | 90 | 91 => 1,
            16 => self.multiprocessors as i32,
            35 => self.memory_clock_khz as i32,
            36 => self.bus_bits as i32,
            37 | 38 => self.l2_bytes as i32,
            39 => 2048,
            40 => 3,
            _ => return self.late_attribute(attribute),
        };
        Some(value)
    }

    fn late_attribute(&self, attribute: i32) -> Option<i32> {
        let value = match attribute {
            75 => self.capability.0 as i32,
            76 => self.capability.1 as i32,
            81 => self.shared_multiprocessor as i32,
            95 | 96 | 115 | 121 => 1,
            97 => self.shared_optin as i32,
            106 => 32,
            111 => SHARED_RESERVED as i32,
            120 => i32::from(self.capability.0 >= 9),
            1..=150 => 0,
            _ => return None,
        };
        Some(value)
    }
}
