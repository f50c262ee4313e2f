//! Counters of launches, and how tables and files show them.

use crate::bench::columns::field;
use serde::Deserialize;
use std::ops::AddAssign;

/// Bytes of a sector.
const SECTOR_BYTES: f64 = 32.0;

/// Counters of a launch, as the simulator writes them; also their sums over launches.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
pub struct Counts {
    pub instructions: f64,
    pub tensor_flop: f64,
    pub global_sectors: f64,
    pub unique_bytes: f64,
    pub shared_wavefronts: f64,
    pub shared_ideal: f64,
}

impl Counts {
    /// Header of [`Self::cells`].
    pub const CELLS: [&str; 5] = ["tensor GFLOP", "MB touched", "MB asked", "Minstructions", "passes over ideal"];

    /// Header of [`Self::fields`].
    pub const FIELDS: [&str; 6] =
        ["tensor_flop", "bytes_touched", "bytes_asked", "instructions", "shared_wavefronts", "shared_ideal"];

    /// Bytes that loads and stores ask for, in whole sectors.
    pub fn bytes_asked(&self) -> f64 {
        self.global_sectors * SECTOR_BYTES
    }

    /// Passes over shared memory over those without bank conflicts; nothing without shared memory.
    pub fn conflicts(&self) -> Option<f64> {
        (self.shared_ideal > 0.0).then(|| self.shared_wavefronts / self.shared_ideal)
    }

    /// As people read them.
    pub fn cells(&self) -> [String; 5] {
        [
            format!("{:.2}", self.tensor_flop / 1e9),
            format!("{:.2}", self.unique_bytes / 1e6),
            format!("{:.2}", self.bytes_asked() / 1e6),
            format!("{:.2}", self.instructions / 1e6),
            self.conflicts().map_or("-".into(), |passes| format!("{passes:.2}")),
        ]
    }

    /// As programs read them.
    pub fn fields(&self) -> [String; 6] {
        let asked = self.bytes_asked();
        [self.tensor_flop, self.unique_bytes, asked, self.instructions, self.shared_wavefronts, self.shared_ideal]
            .map(|n| field(Some(n)))
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.instructions += other.instructions;
        self.tensor_flop += other.tensor_flop;
        self.global_sectors += other.global_sectors;
        self.unique_bytes += other.unique_bytes;
        self.shared_wavefronts += other.shared_wavefronts;
        self.shared_ideal += other.shared_ideal;
    }
}

impl From<&cuda_sim::count::Counts> for Counts {
    fn from(counts: &cuda_sim::count::Counts) -> Self {
        Self {
            instructions: counts.instructions() as f64,
            tensor_flop: counts.tensor_flop as f64,
            global_sectors: counts.global_sectors as f64,
            unique_bytes: counts.unique_bytes as f64,
            shared_wavefronts: counts.shared_wavefronts as f64,
            shared_ideal: counts.shared_ideal as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_shown_in_the_order_of_their_headers() {
        let counts = Counts {
            instructions: 1e6,
            tensor_flop: 2e9,
            global_sectors: 1e6,
            unique_bytes: 3e6,
            shared_wavefronts: 6.0,
            shared_ideal: 4.0,
        };
        assert_eq!(counts.cells(), ["2.00", "3.00", "32.00", "1.00", "1.50"]);
        assert_eq!(counts.fields()[..4], ["2.000000e9", "3.000000e6", "3.200000e7", "1.000000e6"]);
        assert_eq!(Counts::default().cells()[4], "-");
    }
}
