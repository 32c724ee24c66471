//! [`Output`]: where results, messages and progress go. Results go to stdout, all else to stderr.

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt::Display;
use std::io::{ErrorKind, Write as _};

/// How a command ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandOutcome {
    /// Everything was done.
    Whole,
    /// Done, with something missing, unmatched or unchecked.
    Partial,
}

impl CommandOutcome {
    /// [`Self::RowRange`] if `whole` holds.
    pub fn whole_if(whole: bool) -> Self {
        if whole { Self::Whole } else { Self::Partial }
    }
}

/// A message on stderr. Whatever stands in it, the terminal is not steered by it.
pub fn complain(message: impl Display) {
    eprintln!("{}", escaped(&message.to_string(), in_text));
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
        let text = match self.json {
            true => escaped(&serde_json::to_string_pretty(result)?, in_json),
            false => escaped(&result.to_string(), in_text),
        };
        match writeln!(std::io::stdout(), "{text}") {
            // Whoever reads has seen enough, as `head` does.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }

    /// A message to the person, on stderr.
    pub fn note(&self, message: impl Display) {
        complain(message);
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

/// `text` with `escape` of every character that steers a terminal or the order in which text is read. Names of files and
/// texts in them are others' words; most messages quote them, and this is for those that do not.
fn escaped(text: &str, escape: fn(char) -> String) -> String {
    text.chars().map(|one| if steers(one) { escape(one) } else { one.to_string() }).collect()
}

/// Control characters but the end of a line, and what Unicode has for directions, for lines and to be invisible; not the
/// joiners, which scripts and emoji need.
fn steers(character: char) -> bool {
    match character {
        '\n' | '\u{200c}' | '\u{200d}' => false,
        '\u{61c}' | '\u{180e}' | '\u{feff}' => true,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' => true,
        other => other.is_control(),
    }
}

fn in_text(character: char) -> String {
    character.escape_default().to_string()
}

fn in_json(character: char) -> String {
    character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_printed_steers_a_terminal() {
        for (text, expected) in [
            (
                "a \u{e9} \u{6587}\n\u{1f468}\u{200d}\u{1f469} \"b\"\\",
                "a \u{e9} \u{6587}\n\u{1f468}\u{200d}\u{1f469} \"b\"\\",
            ),
            ("\u{1b}[2J\t\r", "\\u{1b}[2J\\t\\r"),
            ("\u{9b}1m\u{7f}\0", "\\u{9b}1m\\u{7f}\\u{0}"),
            ("\u{202e}gpj\u{2066}\u{feff}\u{e0041}", "\\u{202e}gpj\\u{2066}\\u{feff}\\u{e0041}"),
        ] {
            assert_eq!(escaped(text, in_text), expected);
        }
    }

    #[test]
    fn escaped_json_is_the_same_json() {
        let value = serde_json::json!({"\u{202e}\u{7f}": "\u{1b}[2J\u{9b}\u{e0041}"});
        let text = escaped(&value.to_string(), in_json);
        assert_eq!(text, r#"{"\u202e\u007f":"\u001b[2J\u009b\udb40\udc41"}"#);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
