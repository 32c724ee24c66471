//! [`Mojibake`]: UTF-8 that was read as Latin-1 or Windows-1252, and its repair.
//!
//! The rules for what looks wrong enough are those of ftfy 6.3 (Robyn Speer, Apache-2.0; `badness.py`, `chardata.py`),
//! as far as they are about characters of these two encodings. ftfy also tries eight further code pages, and sequences
//! that have lost bytes; such text stays as it is here.

use crate::{ModelError, Result};
use fancy_regex::{Captures, Regex};

/// What the bytes 0x80 to 0x9f are in Windows-1252. Those that are nothing there stay what they are in Latin-1.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘', '’',
    '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// Kinds of characters, by the letters that stand for them in [`BAD`] and [`EMBEDDED`].
const KINDS: [(&str, &str); 12] = [
    ("{common}", r"\x{a0}\x{ad}´·–—’…"),
    ("{c1}", r"\x{80}-\x{9f}"),
    ("{bad}", "¤¦¨ª¬¯¸ºƒˆ˜†‡‰"),
    ("{law}", "§¶"),
    ("{currency}", "¢£¥€"),
    ("{start}", "¡©«¿‘‚“„•‹"),
    ("{end}", "®»”›™"),
    ("{numeric}", "±-³µ¹¼-¾×÷"),
    ("{upper}", "À-ÑØÜÝŒŠŸŽ"),
    ("{lower}", "ß-ñüœšž"),
    ("{further}", " –—‘-‚“-„-•…"),
    ("{strict}", r"\x{80}-¿ÆØæøŒœŠšŸŽžƒˆ˜†‡‰‹›€™"),
];

/// Sequences of characters that are hardly ever meant.
const BAD: &[&str] = &[
    "[{c1}]",
    "[{lower}{upper}{bad}{start}{end}{currency}{numeric}{law}][{bad}]",
    "[a-zA-Z]Þ[{bad}]",
    "[{bad}][{lower}{upper}{start}{end}{currency}{numeric}{law}]",
    "[{lower}{end}{currency}{numeric}][{upper}]",
    "[{end}{currency}{numeric}][{lower}]",
    "[{lower}{end}][{currency}]",
    r"\s[{upper}][{currency}]",
    "[{upper}][{numeric}{law}]",
    "[{lower}{upper}{currency}{end}][{start}][{numeric}]",
    "[{lower}{upper}{currency}{numeric}{law}][{end}][{start}]",
    "[{currency}{numeric}][{start}]",
    "[a-z][{upper}][{start}{currency}]",
    r"[{lower}{upper}][{start}{end}]\w",
    "[Œœ][^A-Za-z]",
    "[{upper}]°",
    r"[ÂÃÎÐ][€œŠš¢£Ÿž\x{a0}\x{ad}®©°·»{start}{end}–—´]",
    "×[²³]",
    "(?:[ØÙ][{common}{currency}{bad}{numeric}{start}ŸŠ®°µ»]){2}",
    "à[²µ¹¼½¾]",
    "‚[âó][àä°ê]",
    r"Ã[\x{a0}¡]",
    r"[a-z]\s?[ÃÂ] ",
    "^[ÃÂ] ",
    "[a-z.,?!{end}]Â[ {start}{end}]",
];

/// Sequences of UTF-8 within other text.
const EMBEDDED: &str = concat!(
    "(?<![{strict}])(?:[Â-ßŠŽ][{strict}{further}]",
    "|[à-ï][{strict}{further}]{2}|[ðóš][{strict}{further}]{3})+"
);

/// In bytes, written as characters of Latin-1: spaces that were no-break spaces, which are bytes of UTF-8.
const LOST_SPACES: [&str; 2] = [
    "Ã (?! |quele|quela|quilo|s )",
    concat!(
        r"[\xc2\xc3\xc5\xce\xd0\xd9] |[\xe2\xe3] [\x80-\x84\x86-\x9f\xa1-\xbf]",
        r"|[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf] |\xf0 [\x80-\xbf][\x80-\xbf]",
        r"|\xf0[\x80-\xbf] [\x80-\xbf]|\xf0[\x80-\xbf][\x80-\xbf] "
    ),
];

/// The rules, ready to be applied.
pub(super) struct Mojibake {
    bad: Regex,
    embedded: Regex,
    a_grave: Regex,
    lost_spaces: Regex,
}

impl Mojibake {
    /// Compiles the rules.
    pub fn new() -> Result<Self> {
        let [a_grave, lost_spaces] = LOST_SPACES;
        Ok(Self {
            bad: compiled(&BAD.join("|"))?,
            embedded: compiled(EMBEDDED)?,
            a_grave: compiled(a_grave)?,
            lost_spaces: compiled(lost_spaces)?,
        })
    }

    /// The line `text`, decoded as often as it takes.
    pub fn repaired(&self, text: &str) -> Result<String> {
        let mut text = text.to_owned();
        loop {
            let decoded = self.decoded_once(&text)?;
            if decoded == text {
                return Ok(text);
            }
            text = decoded;
        }
    }

    fn decoded_once(&self, text: &str) -> Result<String> {
        if text.is_ascii() || !self.is_bad(text)? {
            return Ok(text.to_owned());
        }
        for byte in [latin_1, windows_1252] {
            let Some(bytes) = text.chars().map(byte).collect::<Option<Vec<u8>>>() else { continue };
            if let Ok(decoded) = String::from_utf8(self.with_lost_spaces(bytes)?) {
                return Ok(decoded);
            }
        }
        self.decoded_within(text)
    }

    /// The text with what looks wrong in it decoded.
    fn decoded_within(&self, text: &str) -> Result<String> {
        let mut decoded = String::with_capacity(text.len());
        let mut copied = 0;
        for found in self.embedded.find_iter(text) {
            let found = found.map_err(bad_rule)?;
            let sequence = found.as_str();
            if sequence.len() < text.len() && self.is_bad(sequence)? {
                decoded.push_str(&text[copied..found.start()]);
                decoded.push_str(&self.repaired(sequence)?);
                copied = found.end();
            }
        }
        Ok(decoded + &text[copied..])
    }

    fn is_bad(&self, text: &str) -> Result<bool> {
        self.bad.is_match(text).map_err(bad_rule)
    }

    fn with_lost_spaces(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let characters: String = bytes.into_iter().map(char::from).collect();
        let characters = self.a_grave.try_replacen(&characters, 0, "Ã\u{a0} ").map_err(bad_rule)?;
        let no_break = |found: &Captures| found[0].replace(' ', "\u{a0}");
        let characters = self.lost_spaces.try_replacen(&characters, 0, no_break).map_err(bad_rule)?;
        Ok(characters.chars().filter_map(latin_1).collect())
    }
}

/// The character that Windows-1252 has in place of a control character of Latin-1.
pub(super) fn in_windows_1252(character: char) -> char {
    let place = (character as usize).checked_sub(0x80);
    place.and_then(|place| WINDOWS_1252.get(place)).copied().unwrap_or(character)
}

fn latin_1(character: char) -> Option<u8> {
    u8::try_from(character).ok()
}

fn windows_1252(character: char) -> Option<u8> {
    match WINDOWS_1252.iter().position(|known| *known == character) {
        Some(place) => Some(0x80 + place as u8),
        None => latin_1(character).filter(|byte| !(0x80..0xa0).contains(byte)),
    }
}

/// The rule `pattern`, whose kinds of characters are written out.
fn compiled(pattern: &str) -> Result<Regex> {
    let pattern =
        KINDS.iter().fold(pattern.to_owned(), |pattern, (kind, characters)| pattern.replace(kind, characters));
    Regex::new(&pattern).map_err(bad_rule)
}

/// An error of a rule, about the prompt.
pub(super) fn bad_rule(error: fancy_regex::Error) -> ModelError {
    ModelError::bad_input("prompt", format!("it cannot be cleaned: {error}"))
}
