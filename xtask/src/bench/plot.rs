//! Time against length, both logarithmic: one panel a pass.

use super::fit::Point;
use super::report::{Report, Who};
use super::work::Pass;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

const PANEL: (u32, u32) = (480, 420);
const NSA: RGBColor = RGBColor(200, 60, 40);
const DENSE: RGBColor = RGBColor(40, 90, 180);
const PEERS: [RGBColor; 2] = [RGBColor(60, 150, 70), RGBColor(150, 90, 170)];
const LIMIT: RGBColor = RGBColor(120, 120, 120);
/// Gap and length of the dashes of the limit.
const DASH: (u32, u32) = (6, 4);

type Drawn<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A line of a panel.
struct Series {
    name: String,
    color: RGBColor,
    dashed: bool,
    points: Vec<Point>,
}

/// The plot of one dtype as SVG.
///
/// # Errors
/// If the drawing library fails.
pub fn svg(report: &Report<'_>, dtype: &str) -> Result<String> {
    let panels: Vec<(Pass, Vec<Series>)> = Pass::ALL
        .into_iter()
        .map(|pass| (pass, series(report, dtype, pass)))
        .filter(|(_, series)| series.iter().any(|line| !line.points.is_empty()))
        .collect();
    let mut text = String::new();
    let size = (PANEL.0 * panels.len().max(1) as u32, PANEL.1);
    draw(SVGBackend::with_string(&mut text, size).into_drawing_area(), &panels, (dtype, report.batch))
        .map_err(|error| anyhow!("cannot draw the plot: {error}"))?;
    Ok(text)
}

fn series(report: &Report<'_>, dtype: &str, pass: Pass) -> Vec<Series> {
    let mut peers = PEERS.into_iter().cycle();
    let mut all: Vec<Series> = Vec::new();
    for who in report.who() {
        let (name, color) = match &who {
            Who::Nsa => ("NSA".to_owned(), NSA),
            Who::Dense => ("full attention".to_owned(), DENSE),
            Who::PeerDense(name) => (format!("{name}, full attention"), peers.next().unwrap_or(LIMIT)),
            Who::PeerSparse(name) => (name.clone(), peers.next().unwrap_or(LIMIT)),
        };
        all.push(Series { name, color, dashed: false, points: report.points(dtype, &[pass], &who) });
    }
    let points = report.limit_points(dtype, pass);
    all.push(Series { name: "NSA's work at full attention's rate".to_owned(), color: LIMIT, dashed: true, points });
    all.retain(|line| !line.points.is_empty());
    all
}

fn draw(
    area: DrawingArea<SVGBackend<'_>, Shift>,
    panels: &[(Pass, Vec<Series>)],
    (dtype, batch): (&str, usize),
) -> Drawn<()> {
    area.fill(&WHITE)?;
    for (panel, (pass, series)) in area.split_evenly((1, panels.len().max(1))).iter().zip(panels) {
        let unit = match (pass, batch) {
            (Pass::Decode, 1) => "one decoding step".to_owned(),
            (Pass::Decode, _) => format!("one decoding step of {batch} sequences"),
            _ => pass.name().to_owned(),
        };
        draw_panel(panel, &format!("{unit}, {dtype}"), series)?;
    }
    area.present()?;
    Ok(())
}

fn draw_panel(panel: &DrawingArea<SVGBackend<'_>, Shift>, caption: &str, series: &[Series]) -> Drawn<()> {
    let points = || series.iter().flat_map(|line| &line.points);
    let least = |of: fn(&Point) -> f64| points().map(of).fold(f64::INFINITY, f64::min);
    let most = |of: fn(&Point) -> f64| points().map(of).fold(0.0, f64::max);
    // Lengths double: equal steps of their binary logarithm. Room for the legend above the lines.
    let (x0, x1) = (least(|p| p.0.log2()) - 0.2, most(|p| p.0.log2()) + 0.2);
    let (y0, y1) = (least(|p| p.1) * 0.7, most(|p| p.1));
    let y1 = y1 * (y1 / y0).powf(0.5).max(4.0);
    let mut chart = ChartBuilder::on(panel)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(x0..x1, (y0..y1).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc("time")
        .x_labels(((x1 - x0).round() as usize + 1).min(9))
        .x_label_formatter(&|x| length(x.exp2()))
        .y_label_formatter(&|y| time(*y))
        .light_line_style(WHITE)
        .draw()?;
    for line in series {
        let style = line.color.stroke_width(2);
        let points: Vec<Point> = line.points.iter().map(|p| (p.0.log2(), p.1)).collect();
        let drawn = if line.dashed {
            chart.draw_series(DashedLineSeries::new(points, DASH.0, DASH.1, style))?
        } else {
            chart.draw_series(LineSeries::new(points, style).point_size(3))?
        };
        drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .label_font(("sans-serif", 13))
        .draw()?;
    Ok(())
}

/// 512, 1k, 64k.
fn length(tokens: f64) -> String {
    match tokens.round() as u64 {
        tokens if tokens >= 1024 && tokens % 1024 == 0 => format!("{}k", tokens / 1024),
        tokens => tokens.to_string(),
    }
}

/// 10 µs, 1 ms, 100 s.
fn time(seconds: f64) -> String {
    let (factor, unit) =
        [(1.0, "s"), (1e3, "ms")].into_iter().find(|(f, _)| seconds * f > 0.999).unwrap_or((1e6, "µs"));
    format!("{} {unit}", (seconds * factor * 100.0).round() / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Row;
    use crate::bench::turns::Times;
    use nsa_core::{CompressKind, NsaConfig};

    #[test]
    fn a_panel_for_every_pass_that_ran_and_a_line_for_every_contender() {
        let config = NsaConfig::builder(2, 1, 16, 16).compress_kind(CompressKind::Mean).build().expect("valid");
        let mut rows = Vec::new();
        for (tokens, who) in [(1024, Who::Nsa), (1024, Who::Dense), (2048, Who::Nsa), (2048, Who::Dense)] {
            let times = Some(Times { median_s: 0.1, min_s: 0.1, max_s: 0.1, samples: 1 });
            let note = String::new();
            rows.push(Row { tokens, dtype: "f32", element_bytes: 4, pass: Pass::Forward, who, times, note });
        }
        let svg = svg(&Report { config: &config, batch: 1, rows }, "f32").expect("it is drawn");
        for text in ["forward, f32", "NSA", "full attention", "work at full", "1k", "2k"] {
            assert!(svg.contains(text), "no {text}");
        }
        assert!(!svg.contains("decoding") && !svg.contains("backward"));
        assert!(super::svg(&Report { config: &config, batch: 1, rows: Vec::new() }, "f32").is_ok());
    }

    #[test]
    fn labels_of_the_axes() {
        assert_eq!([1e-5, 1e-3, 0.1, 1.0, 100.0].map(time), ["10 µs", "1 ms", "100 ms", "1 s", "100 s"]);
        assert_eq!([511.7, 1024.0, 1536.0, 65_536.0].map(length), ["512", "1k", "1536", "64k"]);
    }
}
