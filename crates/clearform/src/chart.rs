//! [`chart`]: curves as SVG.

use super::page::escape;
use std::fmt::Write as _;

/// One curve of a chart.
#[derive(Debug)]
pub struct Series<'a> {
    /// Name in the legend.
    pub name: &'a str,
    /// One value per step.
    pub values: &'a [f64],
}

/// Width and height of a chart, in SVG units.
const CHART: (f64, f64) = (720.0, 260.0);
/// Space on the left for the labels of the axis.
const MARGIN: f64 = 46.0;
const COLOURS: [&str; 6] = ["#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2"];

/// Curves over steps on a logarithmic scale, as SVG. Values that are not positive and finite are skipped.
pub fn chart(series: &[Series<'_>]) -> String {
    let scale = LogScale::over(series);
    let mut svg = format!("<svg viewBox=\"0 0 {} {}\" role=img>", CHART.0, CHART.1);
    scale.draw_grid(&mut svg);
    for (index, curve) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let _ = write!(
            svg,
            "<path d=\"{}\" fill=none stroke=\"{colour}\" stroke-width=1.6 />\
             <text x=\"{}\" y=\"{}\" fill=\"{colour}\">{}</text>",
            scale.path(curve.values),
            MARGIN + 12.0 + 190.0 * (index % 3) as f64,
            16.0 + 16.0 * (index / 3) as f64,
            escape(curve.name)
        );
    }
    svg + "</svg>"
}

/// Maps steps and values to the chart; the axis shows decades from `low` to `high`.
struct LogScale {
    low: f64,
    high: f64,
    steps: usize,
}

impl LogScale {
    fn over(series: &[Series<'_>]) -> Self {
        let values = || series.iter().flat_map(|curve| curve.values).filter(|value| drawable(**value));
        let logs = || values().map(|value| value.log10());
        let low = logs().fold(f64::MAX, f64::min);
        let high = logs().fold(f64::MIN, f64::max);
        let steps = series.iter().map(|curve| curve.values.len()).max().unwrap_or(0).max(2);
        if low > high {
            Self { low: -1.0, high: 0.0, steps }
        } else {
            Self { low: low.floor(), high: high.ceil(), steps }
        }
    }

    fn x(&self, step: usize) -> f64 {
        MARGIN + (CHART.0 - MARGIN - 8.0) * step as f64 / (self.steps - 1) as f64
    }

    fn y(&self, log: f64) -> f64 {
        let span = (self.high - self.low).max(1.0);
        CHART.1 - 24.0 - (CHART.1 - 64.0) * (log - self.low) / span
    }

    fn path(&self, values: &[f64]) -> String {
        let points = values.iter().enumerate().filter(|(_, value)| drawable(**value));
        let mut path = String::new();
        for (step, value) in points {
            let command = if path.is_empty() { 'M' } else { 'L' };
            let _ = write!(path, "{command}{:.1} {:.1}", self.x(step), self.y(value.log10()));
        }
        path
    }

    fn draw_grid(&self, svg: &mut String) {
        for decade in self.low as i32..=self.high as i32 {
            let y = self.y(f64::from(decade));
            let label = 10f64.powi(decade);
            let _ = write!(
                svg,
                "<line x1={MARGIN} x2={} y1={y:.1} y2={y:.1} class=grid /><text x=4 y={:.1}>{label}</text>",
                CHART.0 - 8.0,
                y + 4.0
            );
        }
        let _ = write!(svg, "<text x={} y={}>step {}</text>", CHART.0 - 80.0, CHART.1 - 6.0, self.steps);
    }
}

fn drawable(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_span_the_chart() {
        let svg = chart(&[Series { name: "loss", values: &[1.0, 0.1, f64::NAN, 0.01] }]);
        assert!(svg.contains("M46.0 40.0L"), "the first value is at the top left: {svg}");
        assert!(svg.contains("L712.0 236.0"), "the last value is at the bottom right: {svg}");
    }
}
