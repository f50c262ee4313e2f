//! Tensor maps: what `cuTensorMapEncodeTiled` writes and bulk tensor copies read. The real layout is not published; this is
//! the simulator's own.

/// Bytes of a map.
pub const BYTES: usize = 128;
/// The most dimensions.
pub const MAX_RANK: usize = 5;
const MAGIC: u32 = 0x70a6_51c3;

/// A tensor in global memory and the tiles that copies move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorMap {
    /// `CUtensorMapDataType`
    pub data_type: u32,
    /// Address of the first element.
    pub address: u64,
    /// Sizes, the innermost first.
    pub sizes: Vec<u64>,
    /// Bytes between neighbours, for all dimensions but the innermost.
    pub strides: Vec<u64>,
    /// The tile's sizes.
    pub tile: Vec<u32>,
    /// Steps of elements.
    pub steps: Vec<u32>,
    /// `CUtensorMapSwizzle`: 0 none, 1 to 3 for 32, 64 and 128 bytes.
    pub swizzle: u32,
    /// Fill with NaN outside the tensor.
    pub nan_fill: bool,
}

/// Bytes of an element of a `CUtensorMapDataType`.
pub fn element_bytes(data_type: u32) -> Option<u32> {
    match data_type {
        0 => Some(1),
        1 | 6 | 9 => Some(2),
        2 | 3 | 7 | 10..=12 => Some(4),
        4 | 5 | 8 => Some(8),
        _ => None,
    }
}

impl TensorMap {
    /// Whether the driver would take it.
    pub fn is_valid(&self) -> bool {
        let rank = self.sizes.len();
        let Some(bytes) = element_bytes(self.data_type) else { return false };
        let lengths = [self.tile.len(), self.steps.len(), self.strides.len() + 1];
        if rank == 0 || rank > MAX_RANK || lengths != [rank; 3] || !self.address.is_multiple_of(16) {
            return false;
        }
        let inner = u64::from(self.tile[0]) * u64::from(bytes);
        let span = [u64::MAX, 32, 64, 128].get(self.swizzle as usize).copied();
        self.sizes.iter().all(|size| (1..=1 << 32).contains(size))
            && self.strides.iter().all(|stride| stride.is_multiple_of(16) && *stride < 1 << 40)
            && self.tile.iter().all(|size| (1..=256).contains(size))
            && self.steps.iter().all(|step| (1..=8).contains(step))
            && inner.is_multiple_of(16)
            && span.is_some_and(|span| inner <= span)
    }

    /// Bytes from a row of a tile to the next in shared memory: a swizzle's rows are as wide as its span.
    pub fn pitch(&self) -> u32 {
        let inner = self.tile[0] * element_bytes(self.data_type).unwrap_or(1);
        [inner, 32, 64, 128].get(self.swizzle as usize).map_or(inner, |span| inner.max(*span))
    }

    /// The map's bytes.
    pub fn encode(&self) -> [u8; BYTES] {
        let mut out = Vec::with_capacity(BYTES);
        out.extend(MAGIC.to_le_bytes());
        out.extend([self.data_type as u8, self.sizes.len() as u8, self.swizzle as u8, u8::from(self.nan_fill)]);
        out.extend(self.address.to_le_bytes());
        for at in 0..MAX_RANK {
            out.extend(self.sizes.get(at).copied().unwrap_or(0).to_le_bytes());
        }
        for at in 0..MAX_RANK - 1 {
            out.extend(self.strides.get(at).copied().unwrap_or(0).to_le_bytes());
        }
        for at in 0..MAX_RANK {
            out.extend((self.tile.get(at).copied().unwrap_or(0) as u16).to_le_bytes());
        }
        for at in 0..MAX_RANK {
            out.push(self.steps.get(at).copied().unwrap_or(0) as u8);
        }
        out.resize(BYTES, 0);
        let mut bytes = [0; BYTES];
        bytes.copy_from_slice(&out);
        bytes
    }

    /// The map of some bytes, if they are one.
    pub fn decode(bytes: &[u8; BYTES]) -> Option<Self> {
        let number =
            |at: usize, count: usize| bytes[at..at + count].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let rank = usize::from(bytes[5]);
        if number(0, 4) != u64::from(MAGIC) || rank == 0 || rank > MAX_RANK {
            return None;
        }
        Some(Self {
            data_type: u32::from(bytes[4]),
            address: number(8, 8),
            sizes: (0..rank).map(|at| number(16 + 8 * at, 8)).collect(),
            strides: (0..rank - 1).map(|at| number(56 + 8 * at, 8)).collect(),
            tile: (0..rank).map(|at| number(88 + 2 * at, 2) as u32).collect(),
            steps: (0..rank).map(|at| number(98 + at, 1) as u32).collect(),
            swizzle: u32::from(bytes[6]),
            nan_fill: bytes[7] != 0,
        })
    }
}
