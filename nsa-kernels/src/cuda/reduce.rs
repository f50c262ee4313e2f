//! Sums over rows, in an order that depends on their number alone.

use super::ahead::Build;
use super::geometry::Geometry;
use super::launch::Call;
use super::params::{In, Out, Params, Stored, params};
use super::program::{Constants, Program};
use super::workspace::{Places, Scratch};
use crate::Result;
use nsa_core::DType;

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "reduce.cu",
    text: include_str!("kernels/reduce.cu"),
    params: &[
        ColumnSums::declaration,
        AddPartials::declaration,
        ColumnSumsDouble::declaration,
        PartTotals::declaration,
    ],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Rows of a part at least.
const MIN_PART_ROWS: usize = 64;
/// Parts at most.
const MAX_PARTS: usize = 256;

params! {
    /// Arguments of `column_sums`.
    struct ColumnSums {
        /// `[rows, columns]`.
        x: In<Stored>,
        /// `[parts, columns]`.
        partial: Out<f32>,
        /// Rows.
        rows: i64,
        /// Columns.
        columns: i64,
        /// Rows of a part.
        part_rows: i64,
    }

    /// Arguments of `add_partials`.
    struct AddPartials {
        /// `[parts, columns]`.
        partial: In<f32>,
        /// `[columns]`.
        y: Out<f32>,
        /// Parts.
        parts: i64,
        /// Columns.
        columns: i64,
    }

    /// Arguments of `column_sums_double`.
    struct ColumnSumsDouble {
        /// `[rows, columns]`.
        x: In<f32>,
        /// `[parts, columns]`.
        partial: Out<f64>,
        /// Rows.
        rows: i64,
        /// Columns.
        columns: i64,
        /// Rows of a part.
        part_rows: i64,
    }

    /// Arguments of `part_totals`.
    struct PartTotals {
        /// `[parts, columns]`.
        partial: In<f64>,
        /// `[columns]`.
        totals: Out<f64>,
        /// Parts.
        parts: i64,
        /// Columns.
        columns: i64,
    }
}

/// Parts of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Parts.
    pub(crate) count: usize,
    /// Rows of each but the last.
    pub(crate) rows: usize,
}

impl Parts {
    /// Of so many rows.
    pub(crate) fn of(rows: usize) -> Self {
        let part_rows = rows.div_ceil(MAX_PARTS).max(MIN_PART_ROWS);
        Self { count: rows.div_ceil(part_rows), rows: part_rows }
    }

    /// A thread a column of each part.
    pub(crate) fn geometry(&self, columns: usize) -> Geometry {
        let mut geometry = Geometry::linear(columns as u64, THREADS);
        geometry.grid[1] = self.count as u64;
        geometry
    }
}

/// What sums over rows run.
pub(crate) fn builds(dtype: DType) -> Vec<Build> {
    let kernels = ["column_sums", "add_partials", "column_sums_double", "part_totals"].map(|name| (name, THREADS));
    vec![Build::new(&PROGRAM, Constants::new(dtype), &kernels)]
}

/// Adds the sum of each column of `x` `[rows, columns]` to `y`.
pub(crate) fn add_column_sums(call: &Call<'_>, x: In<Stored>, [rows, columns]: [usize; 2], y: Out<f32>) -> Result<()> {
    let parts = Parts::of(rows);
    let mut partial = call.workspace::<f32>(parts.count * columns)?;
    let params = ColumnSums {
        x,
        partial: partial.written_by(),
        rows: rows as i64,
        columns: columns as i64,
        part_rows: parts.rows as i64,
    };
    call.launch(&PROGRAM, "column_sums", parts.geometry(columns), params)?;
    add_partials(call, &partial, parts, columns, y)
}

/// Adds partial sums `[parts, columns]` to `y`.
pub(crate) fn add_partials(
    call: &Call<'_>,
    partial: &Scratch<f32>,
    parts: Parts,
    columns: usize,
    y: Out<f32>,
) -> Result<()> {
    let params = AddPartials { partial: partial.read_by(), y, parts: parts.count as i64, columns: columns as i64 };
    call.launch(&PROGRAM, "add_partials", Geometry::linear(columns as u64, THREADS), params)
}

/// The sum of each column of `x` `[rows, columns]`, in double.
pub(crate) fn column_totals(call: &Call<'_>, x: In<f32>, [rows, columns]: [usize; 2]) -> Result<Scratch<f64>> {
    let parts = Parts::of(rows);
    let mut partial = call.workspace::<f64>(parts.count * columns)?;
    let params = ColumnSumsDouble {
        x,
        partial: partial.written_by(),
        rows: rows as i64,
        columns: columns as i64,
        part_rows: parts.rows as i64,
    };
    call.of_type(DType::F32).launch(&PROGRAM, "column_sums_double", parts.geometry(columns), params)?;
    totals_of_parts(call, &partial, [parts.count, columns])
}

/// Takes of a workspace what [`add_column_sums`] does.
pub(super) fn take_column_sums(places: &mut Places, [rows, columns]: [usize; 2]) {
    places.take_of::<f32>(Parts::of(rows).count * columns);
}

/// Takes of a workspace what [`column_totals`] does: the place of its result.
pub(super) fn take_column_totals(places: &mut Places, [rows, columns]: [usize; 2]) -> usize {
    let partial = places.take_of::<f64>(Parts::of(rows).count * columns);
    let totals = places.take_of::<f64>(columns);
    places.give_back(partial);
    totals
}

/// Sums over parts, `[columns]`, of partial sums `[parts, columns]`, in double.
pub(crate) fn totals_of_parts(
    call: &Call<'_>,
    partial: &Scratch<f64>,
    [parts, columns]: [usize; 2],
) -> Result<Scratch<f64>> {
    let mut totals = call.workspace::<f64>(columns)?;
    let params = PartTotals {
        partial: partial.read_by(),
        totals: totals.written_by(),
        parts: parts as i64,
        columns: columns as i64,
    };
    let geometry = Geometry::linear(columns as u64, THREADS);
    call.of_type(DType::F32).launch(&PROGRAM, "part_totals", geometry, params)?;
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::Parts;

    #[test]
    fn parts_cover_all_rows() {
        for rows in [0, 1, 63, 64, 65, 16_384, 16_385, 1 << 20] {
            let parts = Parts::of(rows);
            assert!(parts.count * parts.rows >= rows && parts.count <= 256, "{rows}");
            assert!(parts.count == 0 || (parts.count - 1) * parts.rows < rows, "{rows}");
        }
    }
}
