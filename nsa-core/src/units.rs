//! Large numbers as people read them.

use std::fmt;

/// A count, printed in thousands, millions or billions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&scaled(self.0, 1000.0, &["", "K", "M", "B", "T"]))
    }
}

/// A number of bytes, printed with a binary unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&scaled(self.0, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB"]))
    }
}

fn scaled(value: u64, base: f64, units: &[&str]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= base && unit + 1 < units.len() {
        scaled /= base;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { 2 };
    format!("{scaled:.digits$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_unit_that_leaves_a_whole_is_taken() {
        let bytes = [0, 1023, 1536, 5 << 30].map(|count| Bytes(count).to_string());
        assert_eq!(bytes, ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]);
        assert_eq!([999, 1000, 27_100_000].map(|count| Count(count).to_string()), ["999", "1.00K", "27.10M"]);
        assert_eq!(format!("{:>10}|", Bytes(2048)), "  2.00 KiB|");
    }
}
