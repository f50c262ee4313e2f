//! The loss curve.

use crate::metrics::Line;
use crate::{Error, Result};
use plotters::prelude::*;
use std::path::Path;

/// Name of the file in a run's folder.
pub const PLOT_FILE: &str = "loss.svg";

const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VALIDATION: RGBColor = RGBColor(214, 39, 40);

/// Draws loss against steps as SVG: every training step faintly, their moving average, the validations as dots.
///
/// # Errors
/// If there is no step to draw or the file cannot be written.
pub fn loss_curve(lines: &[Line], path: &Path) -> Result<()> {
    let train: Vec<(f64, f64)> = lines
        .iter()
        .filter_map(|line| match line {
            Line::Step(step) => Some((step.step as f64, step.loss)),
            Line::Validation(_) => None,
        })
        .collect();
    let validation: Vec<(f64, f64)> = lines
        .iter()
        .filter_map(|line| match line {
            Line::Validation(validation) => Some((validation.step as f64, validation.loss)),
            Line::Step(_) => None,
        })
        .collect();
    let Some(&(last_step, _)) = train.last() else {
        return Err(Error::Plot { path: path.to_owned(), message: "there is no step to draw".to_owned() });
    };
    let mut svg = String::new();
    draw(&mut svg, last_step, &train, &validation)
        .map_err(|error| Error::Plot { path: path.to_owned(), message: error.to_string() })?;
    crate::files::write_atomic(path, svg.as_bytes())
}

type DrawResult<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn draw(svg: &mut String, last_step: f64, train: &[(f64, f64)], validation: &[(f64, f64)]) -> DrawResult<()> {
    let smooth = moving_average(train);
    let (low, high) = range(train, &smooth, validation);
    let root = SVGBackend::with_string(svg, (900, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .caption("Loss", ("sans-serif", 22))
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last_step.max(1.0), low..high)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 16))
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .light_line_style(BLACK.mix(0.04))
        .bold_line_style(BLACK.mix(0.12))
        .draw()?;
    chart.draw_series(LineSeries::new(train.iter().copied(), TRAIN.mix(0.25)))?;
    chart
        .draw_series(LineSeries::new(smooth, TRAIN.stroke_width(2)))?
        .label("training (average)")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], TRAIN.stroke_width(2)));
    if !validation.is_empty() {
        chart.draw_series(LineSeries::new(validation.iter().copied(), VALIDATION.stroke_width(1)))?;
        chart
            .draw_series(validation.iter().map(|&point| Circle::new(point, 3, VALIDATION.filled())))?
            .label("validation")
            .legend(|(x, y)| Circle::new((x + 9, y), 3, VALIDATION.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    drop(chart);
    drop(root);
    Ok(())
}

/// The mean around each step: over a twentieth of the steps, fewer towards both ends, so that it neither lags nor leads.
fn moving_average(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sums = vec![0.0];
    for &(_, loss) in points {
        sums.push(sums[sums.len() - 1] + loss);
    }
    let radius = points.len() / 40;
    let mean = |(i, &(step, _)): (usize, &(f64, f64))| {
        let radius = radius.min(i).min(points.len() - 1 - i);
        (step, (sums[i + radius + 1] - sums[i - radius]) / (2 * radius + 1) as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// The losses to show, with a margin.
fn range(train: &[(f64, f64)], smooth: &[(f64, f64)], validation: &[(f64, f64)]) -> (f64, f64) {
    let losses = || train.iter().chain(smooth).chain(validation).map(|&(_, loss)| loss).filter(|loss| loss.is_finite());
    let (low, high) =
        losses().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| (low.min(loss), high.max(loss)));
    if low > high {
        return (0.0, 1.0);
    }
    let margin = ((high - low) * 0.05).max(1e-3);
    ((low - margin).max(0.0), high + margin)
}
