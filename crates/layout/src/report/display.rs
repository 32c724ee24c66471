//! How an [`Inspection`] reads on a terminal: a word at the left of a line says what it tells, what is wrong stands near
//! the end, the verdict is the last line. JSON has all that is cut short here.

use crate::manifest::family::SamplingDefaults;
use crate::mapping::UNKNOWN;
use crate::report::cost::CostEstimate;
use crate::report::inspection::Inspection;
use std::collections::BTreeMap;
use std::fmt;

/// Lines of one kind of fault.
const MOST_LINES: usize = 20;
/// Columns, of which the first are the line's word.
const COLUMNS: usize = 100;
const WORD: usize = 12;
/// From so many times 10^12 operations on they are counted in these.
const TERA: f64 = 1.0;

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.lines().iter().try_for_each(|(word, text)| wrap(f, word, text))?;
        if !self.estimates.is_empty() {
            self.table(f)?;
        }
        self.faults().iter().try_for_each(|(word, text)| writeln!(f, "{word:WORD$}{text}"))?;
        write!(f, "{}", if self.complete { "complete" } else { "NOT complete" })
    }
}

impl Inspection {
    fn lines(&self) -> Vec<(&str, String)> {
        let mut lines = vec![
            ("family", self.family_line()),
            ("layout", self.layout_line()),
            ("depth", counts(&self.depth)),
            ("parameters", quantity(self.parameters)),
            (
                "tensors",
                format!("{} used, {} skipped, {} not understood", self.used, self.skipped.len(), self.unmatched.len()),
            ),
        ];
        if !self.components.is_empty() {
            lines.push(("parts", self.components.join(", ")));
        }
        let reasons = self.skipped.iter().fold(BTreeMap::<String, usize>::new(), |mut counts, one| {
            *counts.entry(one.reason.clone()).or_default() += 1;
            counts
        });
        lines.extend(reasons.iter().map(|(reason, count)| ("skipped", format!("{count}: {reason}"))));
        lines.extend(self.storage_lines());
        lines.extend(self.evidence.iter().map(|line| ("evidence", line.clone())));
        lines.extend(self.notes.iter().map(|line| ("note", line.clone())));
        lines
    }

    fn family_line(&self) -> String {
        let (name, defaults) = (&self.variant.name, self.variant.defaults);
        let text =
            if defaults.text_tokens > 0 { format!(", {} text tokens", defaults.text_tokens) } else { String::new() };
        format!("{}, variant {name} ({} steps, guidance {}{text})", self.family, defaults.steps, defaults.guidance)
    }

    fn layout_line(&self) -> String {
        let prefix =
            if self.prefix.is_empty() { String::new() } else { format!(", every name after {:?}", self.prefix) };
        format!("{}{prefix}", self.layout)
    }

    /// How the numbers are kept, and how they are computed with where that is not the same.
    fn storage_lines(&self) -> Vec<(&'static str, String)> {
        let bytes = self.stored.iter().map(|stored| stored.bytes).sum();
        let line = |tensors: Vec<String>, bytes| format!("{}, {} in all", tensors.join(", "), size(bytes));
        let mut lines = Vec::new();
        if !self.stored.is_empty() {
            let stored = self.stored.iter().map(|stored| format!("{} {}", stored.tensors, stored.format));
            lines.push(("stored as", line(stored.collect(), bytes)));
        }
        if self.computed_otherwise(bytes) {
            let read = self.dtypes.iter().map(|(dtype, count)| format!("{count} {dtype}"));
            lines.push(("read as", line(read.collect(), self.bytes)));
        }
        lines
    }

    fn computed_otherwise(&self, stored_bytes: u64) -> bool {
        stored_bytes != self.bytes || self.stored.iter().any(|stored| !self.dtypes.contains_key(&stored.format))
    }

    fn table(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let tera = self.estimates.iter().all(|estimate| estimate.full_teraflop_per_evaluation >= TERA);
        let (unit, factor) = if tera { ("Tflop", 1.0) } else { ("Gflop", 1e3) };
        wrap(f, "cost", &format!("{unit} per evaluation, counted and not measured; {}", self.evaluations()))?;
        let radii = self.estimates[0].clear.iter();
        let radii: String = radii.map(|clear| format!("{:>16}", format!("CLEAR r={}", clear.radius_tokens))).collect();
        writeln!(f, "{:>9} {:>8} {:>11} {:>9}{radii}", "picture", "tokens", "memory", "full")?;
        self.estimates.iter().try_for_each(|estimate| writeln!(f, "{}", row(estimate, factor)))?;
        self.limits().iter().try_for_each(|limit| wrap(f, "note", limit))
    }

    fn evaluations(&self) -> String {
        let SamplingDefaults { steps, evaluations, .. } = self.variant.defaults;
        let plural = if evaluations == 1 { "" } else { "s" };
        format!("a picture takes {steps} steps of {evaluations} evaluation{plural}")
    }

    fn limits(&self) -> Vec<String> {
        let trained =
            self.trained_side_pixels.map(|side| format!("trained at {side} px: larger rows tell the cost alone"));
        let largest = self.largest_side_pixels.map(|side| format!("its positions end at {side} px"));
        trained.into_iter().chain(largest).collect()
    }

    fn faults(&self) -> Vec<(&str, String)> {
        let load_report = self.load_report();
        let missing =
            load_report.missing_in_file().into_keys().map(|name| format!("{name:?}{}", load_report.hint(name)));
        let unmatched = self.unmatched.iter().map(|one| {
            let reason = if one.reason == UNKNOWN { String::new() } else { format!(": {}", one.reason) };
            format!("{:?}{}{reason}", one.name, load_report.hint(&one.name))
        });
        let contradictions = self.contradictions.iter().map(ToString::to_string);
        let misshapen = self.misshapen.iter().map(ToString::to_string);
        [
            few("contradicts", contradictions.collect()),
            few("missing", missing.collect()),
            few("misshapen", misshapen.collect()),
            few("unmatched", unmatched.collect()),
        ]
        .concat()
    }
}

/// The first of `texts`, and how many more there are.
fn few(word: &'static str, texts: Vec<String>) -> Vec<(&'static str, String)> {
    let more = texts.len().saturating_sub(MOST_LINES);
    let rest = (more > 0).then(|| format!("and {more} more; --json lists all"));
    texts.into_iter().take(MOST_LINES).chain(rest).map(|text| (word, text)).collect()
}

fn row(estimate: &CostEstimate, factor: f64) -> String {
    let CostEstimate { side_pixels, image_tokens, full_teraflop_per_evaluation: full, .. } = estimate;
    let (memory, full) = (size(estimate.memory_bytes), figures(full * factor));
    let mut row = format!("{side_pixels:>6} px {image_tokens:>8} {memory:>11} {full:>9}");
    for clear in &estimate.clear {
        let (cost, times) = (figures(clear.teraflop_per_evaluation * factor), figures(clear.full_over_clear));
        row += &format!("{cost:>10}{:>6}", format!("{times}x"));
    }
    row
}

/// As many decimals as say something.
fn figures(number: f64) -> String {
    let decimals = match number {
        1000.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{number:.decimals$}")
}

/// `text` behind `word`, broken between words.
fn wrap(f: &mut fmt::Formatter, word: &str, text: &str) -> fmt::Result {
    let mut line = format!("{word:WORD$}");
    let mut room = COLUMNS - WORD;
    for (at, part) in text.split(' ').enumerate() {
        let length = part.chars().count();
        if at > 0 && length + 1 > room {
            writeln!(f, "{}", line.trim_end())?;
            (line, room) = (" ".repeat(WORD), COLUMNS - WORD);
        } else if at > 0 {
            line.push(' ');
            room = room.saturating_sub(1);
        }
        line += part;
        room = room.saturating_sub(length);
    }
    writeln!(f, "{}", line.trim_end())
}

fn counts(counts: &BTreeMap<String, usize>) -> String {
    counts.iter().map(|(key, count)| format!("{key} {count}")).collect::<Vec<_>>().join(", ")
}

fn quantity(number: u64) -> String {
    match number as f64 {
        many if many >= 1e9 => format!("{:.2} billion", many / 1e9),
        many if many >= 1e6 => format!("{:.1} million", many / 1e6),
        _ => number.to_string(),
    }
}

fn size(bytes: u64) -> String {
    let mebibytes = bytes as f64 / (1 << 20) as f64;
    if mebibytes < 1024.0 { format!("{mebibytes:.1} MiB") } else { format!("{:.2} GiB", mebibytes / 1024.0) }
}
