//! [`TextRepair`]: text whose characters were damaged on the way, repaired as `ftfy.fix_text` does by default.
//!
//! Repaired are UTF-8 that was read as Latin-1 or Windows-1252, characters of Windows-1252 that were read as Latin-1,
//! ligatures, wide and narrow forms, curly quotes, line breaks, control characters and names of HTML; the result is in
//! Unicode's form NFC.

use super::html_text::unescaped;
use super::mojibake::{Mojibake, in_windows_1252};
use crate::Result;
use tokenizers::NormalizedString;

/// Ligatures and digraphs of Latin letters, with their letters.
const LIGATURES: [(char, &str); 22] = [
    ('Ĳ', "IJ"),
    ('ĳ', "ij"),
    ('ŉ', "ʼn"),
    ('Ǆ', "DŽ"),
    ('ǅ', "Dž"),
    ('ǆ', "dž"),
    ('Ǉ', "LJ"),
    ('ǈ', "Lj"),
    ('ǉ', "lj"),
    ('Ǌ', "NJ"),
    ('ǋ', "Nj"),
    ('ǌ', "nj"),
    ('Ǳ', "DZ"),
    ('ǲ', "Dz"),
    ('ǳ', "dz"),
    ('\u{fb00}', "ff"),
    ('\u{fb01}', "fi"),
    ('\u{fb02}', "fl"),
    ('\u{fb03}', "ffi"),
    ('\u{fb04}', "ffl"),
    ('\u{fb05}', "ſt"),
    ('\u{fb06}', "st"),
];

/// The rules of the repair.
pub(super) struct TextRepair {
    mojibake: Mojibake,
}

impl TextRepair {
    /// Compiles the rules.
    pub fn new() -> Result<Self> {
        Ok(Self { mojibake: Mojibake::new()? })
    }

    /// The text with its characters repaired, line by line. A repair may bring forth what needs another one.
    pub fn repaired(&self, text: &str) -> Result<String> {
        // Names of characters may be meant from the first tag on.
        let mut has_tags = false;
        let mut repaired_line = |line: &str| {
            has_tags |= line.contains('<');
            self.repaired_line(line, !has_tags)
        };
        text.split_inclusive('\n').map(&mut repaired_line).collect()
    }

    fn repaired_line(&self, line: &str, has_names: bool) -> Result<String> {
        let mut line = line.to_owned();
        loop {
            let repaired = self.repaired_once(if has_names { unescaped(&line) } else { line.clone() })?;
            if repaired == line {
                return Ok(line);
            }
            line = repaired;
        }
    }

    fn repaired_once(&self, line: String) -> Result<String> {
        let decoded = self.mojibake.repaired(&line)?.replace("\r\n", "\n");
        let plain: String = decoded.chars().map(plain_character).collect();
        Ok(NormalizedString::from(plain).nfc().get().to_owned())
    }
}

fn plain_character(character: char) -> String {
    if let Some((_, letters)) = LIGATURES.iter().find(|(ligature, _)| *ligature == character) {
        return (*letters).to_owned();
    }
    let plain = match character {
        '\u{2028}' | '\u{2029}' | '\r' => '\n',
        '\u{80}'..='\u{9f}' => in_windows_1252(character),
        '\u{ff01}'..='\u{ffef}' => return NormalizedString::from(String::from(character)).nfkc().get().to_owned(),
        '\u{3000}' => ' ',
        'ʼ' | '‘'..='‛' => '\'',
        '“'..='‟' => '"',
        _ if is_removed(character) => return String::new(),
        _ => character,
    };
    plain.into()
}

/// Whether it is a control character without effect on what is shown.
fn is_removed(character: char) -> bool {
    matches!(character,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffc}')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// tests/fixtures/pixart/captions.py wrote them.
    #[test]
    fn texts_are_those_of_ftfy() {
        let text = include_str!("../../../../tests/fixtures/pixart/fixed.json");
        let cases: Vec<(String, String)> = serde_json::from_str(text).unwrap();
        assert!(cases.len() > 100);
        let repair = TextRepair::new().unwrap();
        for (text, expected) in cases {
            assert_eq!(repair.repaired(&text).unwrap(), expected, "{text:?}");
        }
    }
}
