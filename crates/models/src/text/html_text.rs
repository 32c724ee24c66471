//! The text of captions that came from web pages: without tags, and with characters in place of their names.
//!
//! Named are the characters of Latin-1 and of typography, which prompts have; other names stay as they are.

/// Names of characters outside Latin-1.
const NAMED: [(&str, &str); 18] = [
    ("amp", "&"),
    ("lt", "<"),
    ("gt", ">"),
    ("quot", "\""),
    ("apos", "'"),
    ("trade", "™"),
    ("hellip", "…"),
    ("mdash", "—"),
    ("ndash", "–"),
    ("lsquo", "‘"),
    ("rsquo", "’"),
    ("ldquo", "“"),
    ("rdquo", "”"),
    ("bull", "•"),
    ("euro", "€"),
    ("oelig", "œ"),
    ("scaron", "š"),
    ("minus", "−"),
];

/// The names of U+00A0 to U+00FF, in order.
#[rustfmt::skip]
const LATIN_1: [&str; 96] = [
    "nbsp", "iexcl", "cent", "pound", "curren", "yen", "brvbar", "sect", "uml", "copy", "ordf", "laquo", "not",
    "shy", "reg", "macr", "deg", "plusmn", "sup2", "sup3", "acute", "micro", "para", "middot", "cedil", "sup1",
    "ordm", "raquo", "frac14", "frac12", "frac34", "iquest", "Agrave", "Aacute", "Acirc", "Atilde", "Auml", "Aring",
    "AElig", "Ccedil", "Egrave", "Eacute", "Ecirc", "Euml", "Igrave", "Iacute", "Icirc", "Iuml", "ETH", "Ntilde",
    "Ograve", "Oacute", "Ocirc", "Otilde", "Ouml", "times", "Oslash", "Ugrave", "Uacute", "Ucirc", "Uuml", "Yacute",
    "THORN", "szlig", "agrave", "aacute", "acirc", "atilde", "auml", "aring", "aelig", "ccedil", "egrave", "eacute",
    "ecirc", "euml", "igrave", "iacute", "icirc", "iuml", "eth", "ntilde", "ograve", "oacute", "ocirc", "otilde",
    "ouml", "divide", "oslash", "ugrave", "uacute", "ucirc", "uuml", "yacute", "thorn", "yuml",
];

/// The text of an HTML page: no tags and no comments, and its characters instead of their names.
pub(super) fn without_tags(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    let mut rest = page;
    while let Some(start) = rest.find('<') {
        let tag = &rest[start..];
        let is_tag = tag[1..].starts_with(|next: char| next.is_ascii_alphabetic() || "/!?".contains(next));
        let end = if tag.starts_with("<!--") { tag.find("-->").map(|end| end + 2) } else { tag.find('>') };
        let taken = match end.filter(|_| is_tag) {
            Some(end) => {
                text.push_str(&rest[..start]);
                start + end + 1
            }
            None => {
                text.push_str(&rest[..=start]);
                start + 1
            }
        };
        rest = &rest[taken..];
    }
    unescaped(&(text + rest))
}

/// The text with characters in place of their names and numbers in HTML, as `&eacute;` and `&#233;`.
pub(super) fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        plain.push_str(&rest[..start]);
        let (name, after) = rest[start + 1..].split_once(';').unwrap_or_default();
        match character(name) {
            Some(character) => {
                plain.push_str(&character);
                rest = after;
            }
            None => {
                plain.push('&');
                rest = &rest[start + 1..];
            }
        }
    }
    plain + rest
}

fn character(name: &str) -> Option<String> {
    if let Some((_, character)) = NAMED.iter().find(|named| named.0 == name) {
        return Some((*character).to_owned());
    }
    if let Some(place) = LATIN_1.iter().position(|known| *known == name) {
        return char::from_u32(0xa0 + place as u32).map(String::from);
    }
    let number = name.strip_prefix('#')?;
    let code = match number.strip_prefix('x') {
        Some(digits) => u32::from_str_radix(digits, 16).ok()?,
        None => number.parse().ok()?,
    };
    char::from_u32(code).map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_html_stays_text() {
        assert_eq!(without_tags("a <b"), "a <b");
        assert_eq!(without_tags("<!-- a > b -->c</p>d"), "cd");
        assert_eq!(unescaped("&#x41;&#65;&#99999999;&none;&"), "AA&#99999999;&none;&");
    }

    #[test]
    fn characters_of_latin_1_are_named_in_their_order() {
        assert_eq!(unescaped("&nbsp;&eacute;&szlig;&times;&yuml;&hellip;"), "\u{a0}éß×ÿ…");
    }
}
