//! [`Output`]: results go to stdout; messages and progress go to stderr.

use crate::args::SeedArg;
use serde::Serialize;
use std::fmt::Display;
use std::io::{ErrorKind, Write as _};

/// How a command ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandOutcome {
    /// Everything was done.
    Complete,
    /// Done, with something missing, unmatched or unchecked.
    Partial,
}

impl CommandOutcome {
    /// [`Self::Complete`] if `complete` holds, otherwise [`Self::Partial`].
    pub fn complete_if(complete: bool) -> Self {
        if complete { Self::Complete } else { Self::Partial }
    }
}

/// Prints a message on stderr, with control characters escaped. If its reader is gone, as `tee` after an interrupt, the
/// work goes on without it.
pub fn print_message(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "{}", escaped(&message.to_string(), text_escape));
}

/// What a result is printed as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Text for a person.
    Text,
    /// One JSON object, and nothing else on stdout.
    Json,
}

/// Where a command writes.
#[derive(Debug)]
pub struct Output {
    format: Format,
}

impl Output {
    /// Prints results in `format`.
    pub fn new(format: Format) -> Self {
        Self { format }
    }

    /// Prints the command's result on stdout.
    ///
    /// # Errors
    /// If stdout cannot be written, except when its reader has closed it, as `head` does.
    pub fn result(&self, result: &(impl Serialize + Display)) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Json => escaped(&serde_json::to_string_pretty(result)?, json_escape),
            Format::Text => escaped(&result.to_string(), text_escape),
        };
        match writeln!(std::io::stdout(), "{text}") {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }

    /// Says which seed was drawn, if one was.
    pub fn note_seed(&self, seed: SeedArg) {
        if seed.is_drawn {
            self.note(format_args!("seed {seed}"));
        }
    }

    /// Prints a message for the user on stderr.
    pub fn note(&self, message: impl Display) {
        print_message(message);
    }
}

/// `text` with `escape` applied to every character that controls a terminal or changes the order in which text is
/// displayed. File names and the text in files are untrusted; most messages quote them, and this covers those that do
/// not.
fn escaped(text: &str, escape: fn(char) -> String) -> String {
    text.chars().map(|letter| if is_control(letter) { escape(letter) } else { letter.to_string() }).collect()
}

/// Control characters except the line feed, and Unicode's direction marks, line separators and invisible characters;
/// not the joiners, which scripts and emoji need.
fn is_control(character: char) -> bool {
    match character {
        '\n' | '\u{200c}' | '\u{200d}' => false,
        '\u{61c}' | '\u{180e}' | '\u{feff}' => true,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' => true,
        other => other.is_control(),
    }
}

fn text_escape(character: char) -> String {
    character.escape_default().to_string()
}

fn json_escape(character: char) -> String {
    character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        for (text, expected) in [
            (
                "a \u{e9} \u{6587}\n\u{1f468}\u{200d}\u{1f469} \"b\"\\",
                "a \u{e9} \u{6587}\n\u{1f468}\u{200d}\u{1f469} \"b\"\\",
            ),
            ("\u{1b}[2J\t\r", "\\u{1b}[2J\\t\\r"),
            ("\u{9b}1m\u{7f}\0", "\\u{9b}1m\\u{7f}\\u{0}"),
            ("\u{202e}gpj\u{2066}\u{feff}\u{e0041}", "\\u{202e}gpj\\u{2066}\\u{feff}\\u{e0041}"),
        ] {
            assert_eq!(escaped(text, text_escape), expected);
        }
    }

    #[test]
    fn escaped_json_parses_to_the_same_value() {
        let value = serde_json::json!({"\u{202e}\u{7f}": "\u{1b}[2J\u{9b}\u{e0041}"});
        let text = escaped(&value.to_string(), json_escape);
        assert_eq!(text, r#"{"\u202e\u007f":"\u001b[2J\u009b\udb40\udc41"}"#);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
