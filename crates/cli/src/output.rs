//! [`Output`]: where results, messages and progress go. Results go to stdout, all else to stderr.

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt::Display;
use std::io::{ErrorKind, Write as _};

/// How a command ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was done.
    Whole,
    /// Done, with something missing, unmatched or unchecked.
    Partial,
}

impl Outcome {
    /// [`Self::Whole`] if `whole` holds.
    pub fn whole_if(whole: bool) -> Self {
        if whole { Self::Whole } else { Self::Partial }
    }
}

/// Where a command writes.
#[derive(Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// With `json`, stdout holds one JSON object and nothing else.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// The command's result: as text, or as JSON where that was asked for.
    pub fn result(&self, result: &(impl Serialize + Display)) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(result)? } else { result.to_string() };
        match writeln!(std::io::stdout(), "{text}") {
            // Whoever reads has seen enough, as `head` does.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }

    /// A message to the person, on stderr.
    pub fn note(&self, message: impl Display) {
        eprintln!("{message}");
    }

    /// A progress bar on stderr; invisible when stderr is not a terminal.
    pub fn progress(&self, what: &'static str, length: usize) -> ProgressBar {
        let style = ProgressStyle::with_template("{prefix:>12} {bar:32} {pos}/{len} {eta:>5} {msg}");
        let bar = ProgressBar::new(length as u64).with_prefix(what);
        match style {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}
