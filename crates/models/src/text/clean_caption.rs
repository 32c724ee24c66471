//! [`CaptionCleaner`]: captions as PixArt's pipelines clean them before they are encoded (`clean_caption`, which is on
//! by default there).
//!
//! The rules are those of diffusers' `PixArtAlphaPipeline._clean_caption`. What it asks other libraries for is done
//! here as far as prompts have it: BeautifulSoup's part in `html_text`, ftfy's in `fix_text` and `mojibake`.

use super::fix_text::TextRepair;
use super::html_text::{unescaped, without_tags};
use super::mojibake::bad_rule;
use crate::Result;
use fancy_regex::Regex;

/// A pattern, and what replaces it.
type Rule = (&'static str, &'static str);

/// Before tags are removed: addresses.
const ADDRESSES: &[Rule] = &[
    ("<person>", "person"),
    (r"\b((?:https?:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))", ""),
    (r"\b((?:www:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))", ""),
];

/// Nicknames, ideographs, dashes and quotes, numbers that are not counts, file names, punctuation.
const CLUTTER: &[Rule] = &[
    (r"@[\w\d]+\b", ""),
    (r"[\x{31c0}-\x{31ff}\x{3200}-\x{4dff}\x{4e00}-\x{9fff}]+", ""),
    (
        concat!(
            r"[\x{002D}\x{058A}\x{05BE}\x{1400}\x{1806}\x{2010}-\x{2015}\x{2E17}\x{2E1A}\x{2E3A}\x{2E3B}",
            r"\x{2E40}\x{301C}\x{3030}\x{30A0}\x{FE31}\x{FE32}\x{FE58}\x{FE63}\x{FF0D}]+"
        ),
        "-",
    ),
    ("[`´«»“”¨]", "\""),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r#"["']{2,}"#, "\""),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
];

/// Codes, advertisements, sizes and spaces.
const NOISE: &[Rule] = &[
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,\./])\b", "${1} "),
    (r"\s+", " "),
    (r#"^["']([\w\W]+)["']$"#, "${1}"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
];

/// Names are split at these where there are more than three: this-is-my-cute-cat.
const JOINERS: [char; 2] = ['-', '_'];
const MOST_JOINERS: usize = 3;

/// The rules of `clean_caption`, ready to be applied.
pub struct CaptionCleaner {
    addresses: Vec<(Regex, &'static str)>,
    clutter: Vec<(Regex, &'static str)>,
    repair: TextRepair,
    noise: Vec<(Regex, &'static str)>,
}

impl CaptionCleaner {
    /// Compiles the rules.
    ///
    /// # Errors
    /// A rule is not a regular expression.
    pub fn new() -> Result<Self> {
        Ok(Self {
            addresses: compiled(ADDRESSES)?,
            clutter: compiled(CLUTTER)?,
            repair: TextRepair::new()?,
            noise: compiled(NOISE)?,
        })
    }

    /// The caption in lower case, without what is no description of an image. The pipelines clean a caption twice.
    ///
    /// # Errors
    /// A rule cannot be applied.
    pub fn clean(&self, caption: &str) -> Result<String> {
        self.clean_once(&self.clean_once(caption)?)
    }

    fn clean_once(&self, caption: &str) -> Result<String> {
        let caption = unquoted(caption).trim().to_lowercase();
        let caption = without_tags(&replaced(caption, &self.addresses)?);
        let mut caption = replaced(caption, &self.clutter)?;
        if caption.matches(JOINERS).count() > MOST_JOINERS {
            caption = caption.replace(JOINERS, " ");
        }
        let caption = unescaped(&unescaped(&self.repair.repaired(&caption)?));
        Ok(replaced(caption, &self.noise)?.trim().to_owned())
    }
}

fn compiled(rules: &[Rule]) -> Result<Vec<(Regex, &'static str)>> {
    let compile = |rule: &Rule| Ok((Regex::new(rule.0).map_err(bad_rule)?, rule.1));
    rules.iter().map(compile).collect()
}

fn replaced(caption: String, rules: &[(Regex, &'static str)]) -> Result<String> {
    rules.iter().try_fold(caption, |caption, (pattern, replacement)| {
        Ok(pattern.try_replacen(&caption, 0, *replacement).map_err(bad_rule)?.into_owned())
    })
}

/// The text that a URL quotes: `+` is a space, %41 is A.
fn unquoted(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let quoted = (*first == b'%').then(|| after.get(..2)).flatten();
        let quoted = quoted.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(quoted.unwrap_or(if *first == b'+' { b' ' } else { *first }));
        rest = if quoted.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// tests/fixtures/pixart/captions.py wrote them.
    #[test]
    fn captions_are_those_of_diffusers() {
        let text = include_str!("../../../../tests/fixtures/pixart/captions.json");
        let cases: Vec<(String, String)> = serde_json::from_str(text).unwrap();
        assert!(cases.len() > 50);
        let cleaner = CaptionCleaner::new().unwrap();
        for (caption, expected) in cases {
            assert_eq!(cleaner.clean(&caption).unwrap(), expected, "{caption:?}");
        }
    }

    #[test]
    fn what_is_not_quoted_stays_text() {
        assert_eq!(unquoted("100% %zz %e9 a+b"), "100% %zz \u{fffd} a b");
    }
}
