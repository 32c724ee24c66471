//! [`Page`]: a self-contained HTML file with embedded images, and [`chart`]: curves as SVG.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt::Write as _;

/// An HTML page. Blocks appear in the order in which they are added.
#[derive(Debug)]
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Self {
        Self { title: title.to_owned(), body: format!("<h1>{}</h1>\n", escape(title)) }
    }

    /// Adds a section heading.
    pub fn heading(&mut self, text: &str) -> &mut Self {
        self.block(&format!("<h2>{}</h2>", escape(text)))
    }

    /// Adds a paragraph of plain text.
    pub fn paragraph(&mut self, text: &str) -> &mut Self {
        self.block(&format!("<p>{}</p>", escape(text)))
    }

    /// Adds a table. The first column is aligned left, the others right.
    pub fn table(&mut self, headings: &[&str], rows: &[Vec<String>]) -> &mut Self {
        let head = row("th", headings.iter().copied());
        let rows: String = rows.iter().map(|cells| row("td", cells.iter().map(String::as_str))).collect();
        self.block(&format!("<div class=scroll><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"))
    }

    /// Adds a PNG image with a caption.
    pub fn image(&mut self, png: &[u8], caption: &str) -> &mut Self {
        let data = STANDARD.encode(png);
        let caption = escape(caption);
        self.block(&format!(
            "<figure><img alt=\"{caption}\" src=\"data:image/png;base64,{data}\"><figcaption>{caption}</figcaption></figure>"
        ))
    }

    /// Adds an SVG with a caption.
    pub fn svg(&mut self, svg: &str, caption: &str) -> &mut Self {
        self.block(&format!("<figure>{svg}<figcaption>{}</figcaption></figure>", escape(caption)))
    }

    /// The page as HTML.
    pub fn render(&self) -> String {
        format!(
            "<!doctype html>\n<html lang=en><head><meta charset=utf-8>\
             <meta name=viewport content=\"width=device-width,initial-scale=1\"><title>{}</title>\
             <style>{STYLE}</style></head>\n<body><main>\n{}</main></body></html>\n",
            escape(&self.title),
            self.body
        )
    }

    fn block(&mut self, html: &str) -> &mut Self {
        self.body.push_str(html);
        self.body.push('\n');
        self
    }
}

fn row<'a>(tag: &str, cells: impl Iterator<Item = &'a str>) -> String {
    let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
    format!("<tr>{cells}</tr>")
}

/// `text` with HTML's special characters escaped.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

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

const STYLE: &str = "\
:root{color-scheme:light dark;--line:#d4d4d8;--soft:#71717a}\
@media(prefers-color-scheme:dark){:root{--line:#3f3f46;--soft:#a1a1aa}}\
body{font:16px/1.55 system-ui,sans-serif;margin:0}main{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem}\
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem}h2{font-size:1.25rem;margin:2.4rem 0 .4rem}p{max-width:46rem}\
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}\
th,td{padding:.45rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}\
th{color:var(--soft);font-weight:500}th:first-child,td:first-child{text-align:left}\
figure{margin:1.2rem 0}img{max-width:100%;border-radius:8px}figcaption{color:var(--soft);font-size:.9rem}\
svg{width:100%;height:auto;font:12px system-ui,sans-serif}svg text:not([fill]){fill:var(--soft)}\
.grid{stroke:var(--line)}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn html_in_text_is_escaped() {
        let mut page = Page::new("<b>");
        page.paragraph("a & \"b\"").table(&["<i>"], &[vec!["<u>".into()]]);
        let html = page.render();
        assert!(html.contains("&lt;b&gt;") && html.contains("a &amp; &quot;b&quot;"));
        assert!(!html.contains("<b>") && !html.contains("<i>") && !html.contains("<u>"));
    }

    #[test]
    fn curves_span_the_chart() {
        let svg = chart(&[Series { name: "loss", values: &[1.0, 0.1, f64::NAN, 0.01] }]);
        assert!(svg.contains("M46.0 40.0L"), "the first value is at the top left: {svg}");
        assert!(svg.contains("L712.0 236.0"), "the last value is at the bottom right: {svg}");
    }
}
