//! [`Page`]: a self-contained HTML file with embedded images.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// An HTML page. Blocks appear in the order in which they are added.
#[derive(Debug)]
pub struct Page {
    title: String,
    head: String,
    body: String,
}

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Self {
        Self { title: title.to_owned(), head: String::new(), body: format!("<h1>{}</h1>\n", escape(title)) }
    }

    /// Lets a browser read the page again every `seconds`.
    pub fn refresh(&mut self, seconds: usize) -> &mut Self {
        self.head = format!("<meta http-equiv=refresh content={seconds}>");
        self
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
             <meta name=viewport content=\"width=device-width,initial-scale=1\">{}<title>{}</title>\
             <style>{STYLE}</style></head>\n<body><main>\n{}</main></body></html>\n",
            self.head,
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
}
