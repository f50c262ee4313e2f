//! What the tables and CSV files of all benches have in common.

use super::turns::Times;
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use std::path::Path;

/// Header of [`time_cells`].
pub const TIME_CELLS: [&str; 4] = ["median", "min", "max", "n"];

/// Header of [`time_fields`].
pub const TIME_FIELDS: [&str; 4] = ["samples", "median_s", "min_s", "max_s"];

/// A table with this header, its columns from `numbers` on flush right.
pub fn table(header: &[&str], numbers: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_FULL_CONDENSED);
    table.set_header(header);
    for column in table.column_iter_mut().skip(numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Times as people read them; dashes if there are none.
pub fn time_cells(times: Option<Times>) -> [String; 4] {
    let cells = |times: Times| {
        let [median, min, max] = [times.median_s, times.min_s, times.max_s].map(seconds);
        [median, min, max, times.samples.to_string()]
    };
    times.map_or_else(|| [(); 4].map(|()| "-".to_owned()), cells)
}

/// Times as programs read them; empty if there are none.
pub fn time_fields(times: Option<Times>) -> [String; 4] {
    let [median, min, max] =
        [|t: Times| t.median_s, |t: Times| t.min_s, |t: Times| t.max_s].map(|of| field(times.map(of)));
    [times.map_or(0, |times| times.samples).to_string(), median, min, max]
}

/// A number as programs read it; empty if there is none.
pub fn field(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| format!("{value:.6e}"))
}

/// Four digits with a unit.
pub fn seconds(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    let digits = if value >= 100.0 {
        1
    } else if value >= 10.0 {
        2
    } else {
        3
    };
    format!("{value:.digits$} {unit}")
}

/// Rows under a header as CSV.
///
/// # Errors
/// If a row has more or fewer fields than the header.
pub fn csv(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(header)?;
    for row in rows {
        writer.write_record(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// Writes a file of figures into the folder `out`, and prints its path.
///
/// # Errors
/// If it cannot be written.
pub fn write(out: &Path, name: &str, text: &str) -> Result<()> {
    let path = out.join(name);
    crate::files::write_atomic(&path, text.as_bytes())?;
    println!("{}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_four_digits() {
        for (value, shown) in [(304.04, "304.0 s"), (12.345, "12.35 s"), (0.2346, "234.6 ms"), (2e-5, "20.00 µs")] {
            assert_eq!(seconds(value), shown);
        }
    }

    #[test]
    fn what_did_not_run_has_dashes_and_empty_fields() {
        assert_eq!(time_cells(None), ["-", "-", "-", "-"]);
        assert_eq!(time_fields(None), ["0", "", "", ""]);
        let times = Times { median_s: 0.5, min_s: 0.25, max_s: 2.0, samples: 7 };
        assert_eq!(time_cells(Some(times)), ["500.0 ms", "250.0 ms", "2.000 s", "7"]);
        assert_eq!(time_fields(Some(times)), ["7", "5.000000e-1", "2.500000e-1", "2.000000e0"]);
    }

    #[test]
    fn fields_with_commas_and_quotes_are_quoted() {
        let row = |fields: [&str; 2]| fields.map(str::to_owned).to_vec();
        assert_eq!(csv(&["a", "b"], [row(["1", "x, \"y\""])]).expect("text"), "a,b\n1,\"x, \"\"y\"\"\"\n");
        assert!(csv(&["a"], [row(["1", "2"])]).is_err());
    }
}
