//! How an [`Inspection`] is printed: a word at the left of each line names its topic, problems come near the end, and
//! the last line is the verdict. Long lists are cut here; the JSON has them whole.

use crate::manifest::family::{SamplingDefaults, Variant};
use crate::mapping::UNKNOWN;
use crate::report::cost::{CostEstimate, DistillationEstimate};
use crate::report::inspection::{Inspection, UnusedTensor};
use std::collections::BTreeMap;
use std::fmt;

/// Lines of one kind of problem.
const MOST_LINES: usize = 20;
/// Columns of a line, and of the word at its left.
const COLUMNS: usize = 100;
const WORD: usize = 12;
const MEBIBYTE: f64 = (1 << 20) as f64;
/// From this many Tflop on, costs are printed in Tflop, below in Gflop.
const TERA: f64 = 1.0;

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.lines().iter().try_for_each(|(word, text)| wrap(f, word, text))?;
        if !self.estimates.is_empty() {
            self.table(f)?;
        }
        self.problem_lines().iter().try_for_each(|(word, text)| writeln!(f, "{word:WORD$}{text}"))?;
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
        lines.extend(self.attention.iter().map(|plan| ("attention", plan.clone())));
        if !self.components.is_empty() {
            lines.push(("components", self.components.join(", ")));
        }
        let reasons = self.skipped.iter().fold(BTreeMap::<String, usize>::new(), |mut counts, tensor| {
            *counts.entry(tensor.reason.clone()).or_default() += 1;
            counts
        });
        lines.extend(reasons.iter().map(|(reason, count)| ("skipped", format!("{count}: {reason}"))));
        lines.extend(self.storage_lines());
        lines.extend(self.component_line());
        lines.extend(self.evidence.iter().map(|line| ("evidence", line.clone())));
        lines.extend(self.notes.iter().map(|line| ("note", line.clone())));
        lines
    }

    fn family_line(&self) -> String {
        let Variant { name, defaults } = &self.variant;
        let guidance = if self.takes_guidance { format!(", guidance {}", defaults.guidance) } else { String::new() };
        let text =
            if defaults.text_tokens > 0 { format!(", {} text tokens", defaults.text_tokens) } else { String::new() };
        format!("{}, variant {name} ({} steps{guidance}{text})", self.family, defaults.steps)
    }

    fn layout_line(&self) -> String {
        let prefix = if self.prefix.is_empty() { String::new() } else { format!(", prefix {:?}", self.prefix) };
        format!("{}{prefix}", self.layout)
    }

    fn component_line(&self) -> Option<(&'static str, String)> {
        let sizes: Vec<String> =
            self.component_bytes.iter().map(|(name, bytes)| format!("{name} {}", size(*bytes))).collect();
        (!sizes.is_empty()).then(|| ("beside it", format!("{} in memory, each for its stage alone", sizes.join(", "))))
    }

    /// How the tensors are stored, and how they are read if that differs.
    fn storage_lines(&self) -> Vec<(&'static str, String)> {
        let bytes = self.stored.iter().map(|stored| stored.bytes).sum();
        let line = |tensors: Vec<String>, bytes| format!("{}, {} in all", tensors.join(", "), size(bytes));
        let mut lines = Vec::new();
        if !self.stored.is_empty() {
            let stored = self.stored.iter().map(|stored| format!("{} {}", stored.tensors, stored.format));
            lines.push(("stored as", line(stored.collect(), bytes)));
        }
        if self.is_read_differently(bytes) {
            let read = self.dtypes.iter().map(|(dtype, count)| format!("{count} {dtype}"));
            lines.push(("read as", line(read.collect(), self.bytes)));
        }
        lines
    }

    fn is_read_differently(&self, stored_bytes: u64) -> bool {
        stored_bytes != self.bytes || self.stored.iter().any(|stored| !self.dtypes.contains_key(&stored.format))
    }

    fn table(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let is_large = self.estimates.iter().all(|estimate| estimate.full_teraflop_per_evaluation >= TERA);
        let (unit, factor) = if is_large { ("Tflop", 1.0) } else { ("Gflop", 1e3) };
        wrap(f, "cost", &format!("{unit} per evaluation, counted and not measured; {}", self.evaluations()))?;
        let radii = self.estimates[0].clear.iter();
        let radii: String = radii.map(|clear| format!("{:>16}", format!("CLEAR r={}", clear.radius_tokens))).collect();
        writeln!(f, "{:>9} {:>8} {:>11} {:>9}{radii}", "image", "tokens", "memory", "full")?;
        self.estimates.iter().try_for_each(|estimate| writeln!(f, "{}", row(estimate, factor)))?;
        self.distillation_line().iter().try_for_each(|line| wrap(f, "distilling", line))?;
        self.limits().iter().try_for_each(|limit| wrap(f, "note", limit))
    }

    fn distillation_line(&self) -> Option<String> {
        let DistillationEstimate { memory_bytes, batch, side_pixels } = self.distillation?;
        Some(format!(
            "about {} of memory, with {batch} samples of {side_pixels} px per step",
            rounded_size(memory_bytes)
        ))
    }

    fn evaluations(&self) -> String {
        let SamplingDefaults { steps, evaluations, .. } = self.variant.defaults;
        let plural = if evaluations == 1 { "" } else { "s" };
        format!("an image takes {steps} steps of {evaluations} evaluation{plural}")
    }

    fn limits(&self) -> Vec<String> {
        let trained =
            self.trained_side_pixels.map(|side| format!("trained at {side} px; larger sizes show only the cost"));
        let largest = self.largest_side_pixels.map(|side| format!("its position embeddings end at {side} px"));
        trained.into_iter().chain(largest).collect()
    }

    fn problem_lines(&self) -> Vec<(&str, String)> {
        let load_report = self.load_report();
        let missing =
            load_report.missing_in_file().into_keys().map(|name| format!("{name:?}{}", load_report.hint(name)));
        let unmatched = self.unmatched.iter().map(|UnusedTensor { name, reason }| {
            let reason = if reason == UNKNOWN { String::new() } else { format!(": {reason}") };
            format!("{name:?}{}{reason}", load_report.hint(name))
        });
        let contradictions = self.contradictions.iter().map(ToString::to_string);
        let misshapen = self.misshapen.iter().map(ToString::to_string);
        let uncomputable = self.uncomputable.iter().map(ToString::to_string);
        [
            few("conflict", contradictions.collect()),
            few("missing", missing.collect()),
            few("wrong shape", misshapen.collect()),
            few("format", uncomputable.collect()),
            few("unmatched", unmatched.collect()),
            few("component", self.unusable_components.iter().map(ToString::to_string).collect()),
        ]
        .concat()
    }
}

/// A line for each of the first `texts`, and one with the number of the others.
fn few(word: &'static str, texts: Vec<String>) -> Vec<(&'static str, String)> {
    let more = texts.len().saturating_sub(MOST_LINES);
    let rest = (more > 0).then(|| format!("and {more} more; --json lists all"));
    texts.into_iter().take(MOST_LINES).chain(rest).map(|text| (word, text)).collect()
}

/// A row of the table; `factor` converts Tflop to the table's unit.
fn row(estimate: &CostEstimate, factor: f64) -> String {
    let CostEstimate { side_pixels, image_tokens, .. } = estimate;
    let memory = size(estimate.memory_bytes);
    let full = figures(estimate.full_teraflop_per_evaluation * factor);
    let mut row = format!("{side_pixels:>6} px {image_tokens:>8} {memory:>11} {full:>9}");
    for clear in &estimate.clear {
        let cost = figures(clear.teraflop_per_evaluation * factor);
        let ratio = format!("{}x", figures(clear.full_over_clear));
        row += &format!("{cost:>9} {ratio:>6}");
    }
    row
}

/// A number with at least three significant digits.
fn figures(number: f64) -> String {
    let decimals = match number {
        1000.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{number:.decimals$}")
}

/// Prints `text` after `word`, broken between words at [`COLUMNS`].
fn wrap(f: &mut fmt::Formatter, word: &str, text: &str) -> fmt::Result {
    let mut line = format!("{word:WORD$}");
    let mut room = COLUMNS - WORD;
    for (index, piece) in text.split(' ').enumerate() {
        let length = piece.chars().count();
        if index > 0 && length + 1 > room {
            writeln!(f, "{}", line.trim_end())?;
            line = " ".repeat(WORD);
            room = COLUMNS - WORD;
        } else if index > 0 {
            line.push(' ');
            room = room.saturating_sub(1);
        }
        line += piece;
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
    let mebibytes = bytes as f64 / MEBIBYTE;
    if mebibytes < 1024.0 { format!("{mebibytes:.1} MiB") } else { format!("{:.2} GiB", mebibytes / 1024.0) }
}

/// A size that is only about right.
fn rounded_size(bytes: u64) -> String {
    let mebibytes = bytes as f64 / MEBIBYTE;
    if mebibytes < 1024.0 { format!("{mebibytes:.0} MiB") } else { format!("{:.1} GiB", mebibytes / 1024.0) }
}
