//! The page "What fits on my machine?": its tables are those of the forecast.

#![allow(clippy::unwrap_used)]

use clearform::bench::WeightFormat;
use clearform::published_memory;
use std::path::Path;

const PAGE: &str = "docs/what-fits.md";
const MODELS: [&str; 5] = ["flux-dev", "sd3.5-large", "sd3.5-medium", "sd3-medium", "pixart-sigma"];
/// The largest first.
const FORMATS: [&str; 4] = ["bf16", "q8_0", "q5_k", "q4_k"];
const SIDES: [usize; 4] = [1024, 2048, 4096, 8192];
/// Gigabytes of memory.
const MACHINES: [u64; 7] = [4, 6, 8, 12, 16, 24, 32];

fn gigabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

fn format(name: &str) -> WeightFormat {
    name.parse().unwrap()
}

/// Peak memory by model, format and size: with all weights in memory, and with blocks streamed.
fn peaks() -> String {
    let head = format!(
        "| model | format | {} |\n|---|---|{}\n",
        SIDES.map(|side| format!("{side} px")).join(" | "),
        "---|".repeat(4)
    );
    let rows = MODELS.iter().flat_map(|model| FORMATS.map(|name| (*model, name))).map(|(model, name)| {
        let cells = SIDES.map(|side| {
            let memory = published_memory(model, format(name), side).unwrap();
            format!("{} / {}", gigabytes(memory.resident), gigabytes(memory.streamed))
        });
        format!("| {model} | {name} | {} |\n", cells.join(" | "))
    });
    head + &rows.collect::<String>()
}

/// The largest format that a machine's memory holds at 1024 and 2048 px, or whether it streams one.
fn choices() -> String {
    let head = format!("| memory | {} |\n|---|{}\n", MODELS.join(" | "), "---|".repeat(MODELS.len()));
    let choice = |model: &str, memory: u64, side: usize| {
        let peak = |name: &&str| published_memory(model, format(name), side).unwrap();
        let held = FORMATS.iter().find(|name| peak(name).resident <= memory);
        let streams = FORMATS.iter().any(|name| peak(name).streamed <= memory);
        held.copied().unwrap_or(if streams { "streamed" } else { "nothing" })
    };
    let rows = MACHINES.map(|machine| {
        let cells =
            MODELS.map(|model| [1024, 2048].map(|side| choice(model, machine * 1_000_000_000, side)).join(", "));
        format!("| {machine} GB | {} |\n", cells.join(" | "))
    });
    head + &rows.concat()
}

#[test]
fn the_page_says_what_is_forecast() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = std::fs::read_to_string(root.join(PAGE)).unwrap();
    for table in [choices(), peaks()] {
        assert!(page.contains(&table), "{PAGE} should have this table:\n\n{table}");
    }
}
