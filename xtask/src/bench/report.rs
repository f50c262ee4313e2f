//! The figures as a table, CSV and a plot.

use super::problem::{flop, pairs};
use anyhow::{Result, anyhow};
use comfy_table::{CellAlignment, Table};
use nsa_core::NsaConfig;
use plotters::prelude::*;
use std::fmt::Write;
use std::path::Path;

/// One candidate's times for one pass at one length.
#[derive(Clone, Debug)]
pub struct Row {
    who: String,
    what: &'static str,
    tokens: usize,
    median_s: f64,
    min_s: f64,
    max_s: f64,
}

impl Row {
    /// From at least one run.
    pub fn new(who: &str, what: &'static str, tokens: usize, seconds: &[f64]) -> Self {
        let mut sorted = seconds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        let (min_s, max_s) = (sorted[0], sorted[sorted.len() - 1]);
        Self { who: who.to_owned(), what, tokens, median_s: (low + high) / 2.0, min_s, max_s }
    }

    /// FLOP that this candidate must do: NSA its own pairs of query and key, the others all causal pairs.
    fn flop(&self, config: &NsaConfig) -> f64 {
        let (sparse, full) = pairs(config, self.tokens);
        flop(config, if self.who == "nsa" { sparse } else { full }, self.what == "backward")
    }
}

/// Prints the table; writes `bench-DTYPE.csv` and `bench-DTYPE.svg` into `out`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(config: &NsaConfig, dtype: &str, rows: &[Row], out: &Path) -> Result<()> {
    let nsa = |row: &Row| {
        rows.iter().find(|r| r.who == "nsa" && r.what == row.what && r.tokens == row.tokens).map(|r| r.median_s)
    };
    let mut table = Table::new();
    table.set_header(["tokens", "pass", "who", "median s", "min", "max", "GFLOP/s", "NSA is faster by"]);
    let mut csv = String::from("tokens,pass,who,dtype,median_s,min_s,max_s,gflop_per_s,nsa_speedup\n");
    for row in rows {
        let rate = row.flop(config) / row.median_s / 1e9;
        let speedup = nsa(row).map(|seconds| row.median_s / seconds);
        let shown = match speedup {
            Some(speedup) if row.who != "nsa" => format!("{speedup:.2}×"),
            _ => String::new(),
        };
        table.add_row([
            row.tokens.to_string(),
            row.what.to_owned(),
            row.who.clone(),
            format!("{:.4}", row.median_s),
            format!("{:.4}", row.min_s),
            format!("{:.4}", row.max_s),
            format!("{rate:.1}"),
            shown,
        ]);
        let speedup = speedup.map_or(String::new(), |s| format!("{s:.4}"));
        writeln!(
            csv,
            "{},{},{},{dtype},{:e},{:e},{:e},{rate:.3},{speedup}",
            row.tokens, row.what, row.who, row.median_s, row.min_s, row.max_s
        )?;
    }
    for column in [0, 3, 4, 5, 6, 7] {
        table.column_mut(column).expect("a column of the header").set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    for pass in ["forward", "backward"] {
        if let Some((ours, dense)) = exponents(rows, pass) {
            println!("{pass}: time grows as tokens^{ours:.2} for NSA, tokens^{dense:.2} for full attention");
        }
    }
    std::fs::create_dir_all(out)?;
    let (csv_path, svg_path) = (out.join(format!("bench-{dtype}.csv")), out.join(format!("bench-{dtype}.svg")));
    crate::files::write_atomic(&csv_path, csv.as_bytes())?;
    crate::files::write_atomic(&svg_path, plot(rows)?.as_bytes())?;
    println!("{}\n{}", csv_path.display(), svg_path.display());
    Ok(())
}

/// Exponents of a power law through the medians (least squares on logarithms), for NSA and our full attention.
fn exponents(rows: &[Row], pass: &str) -> Option<(f64, f64)> {
    let slope = |who: &str| {
        let points: Vec<(f64, f64)> = rows
            .iter()
            .filter(|r| r.who == who && r.what == pass)
            .map(|r| ((r.tokens as f64).ln(), r.median_s.ln()))
            .collect();
        let n = points.len() as f64;
        let (mean_x, mean_y) =
            (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
        let spread: f64 = points.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
        let common: f64 = points.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
        (spread > 0.0).then(|| common / spread)
    };
    Some((slope("nsa")?, slope("dense")?))
}

/// Median time against length, both logarithmic; forward and backward side by side.
fn plot(rows: &[Row]) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (1000, 420)).into_drawing_area();
        draw(&area, rows).map_err(|error| anyhow!("cannot draw the plot: {error}"))?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(area: &Area<'_>, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.who.as_str()) {
            names.push(&row.who);
        }
    }
    let bounds = |value: fn(&Row) -> f64| {
        let all = rows.iter().map(value);
        (all.clone().fold(f64::INFINITY, f64::min), all.fold(0.0, f64::max))
    };
    let ((t0, t1), (s0, s1)) = (bounds(|r| r.tokens as f64), bounds(|r| r.median_s));
    for (panel, pass) in area.split_evenly((1, 2)).iter().zip(["forward", "backward"]) {
        let mut chart = ChartBuilder::on(panel)
            .caption(pass, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d((t0 * 0.9..t1 * 1.1).log_scale(), (s0 * 0.7..s1 * 1.4).log_scale())?;
        chart.configure_mesh().x_desc("tokens").y_desc("seconds").light_line_style(WHITE).draw()?;
        for (i, &name) in names.iter().enumerate() {
            let color = [RGBColor(200, 60, 40), RGBColor(40, 90, 180), RGBColor(60, 150, 70)][i % 3];
            let points: Vec<(f64, f64)> = rows
                .iter()
                .filter(|r| r.who == name && r.what == pass)
                .map(|r| (r.tokens as f64, r.median_s))
                .collect();
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK.mix(0.3))
            .background_style(WHITE)
            .label_font(("sans-serif", 14))
            .draw()?;
    }
    area.present()?;
    Ok(())
}
