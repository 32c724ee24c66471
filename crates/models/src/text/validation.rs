//! [`check`]: validates what the tokenizers library does not validate itself in a tokenizer.json.
//!
//! These are the tokens that a template names, and `precompiled_charsmap`: with a damaged one the library reads out of
//! bounds or allocates as much memory as its length claims. The map is sentencepiece's: the length of a trie in bytes,
//! the trie as a double array of 32-bit units (darts-clone), and the texts that its values point into.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

const MAP: &str = "precompiled_charsmap";
/// The label of a transition is a byte, so it changes only the position within a block of this size.
const BLOCK: usize = 256;
/// Bytes of a unit.
const UNIT: usize = 4;
/// The highest bit of a unit: it is a value.
const VALUE: u32 = 1 << 31;
/// The first child of the unit is a value.
const HAS_VALUE: u32 = 1 << 8;

/// Checks every character map in the normalizer of `tokenizer`, and every template in its post-processor.
///
/// # Errors
/// A description of the first fault.
pub(super) fn check(tokenizer: &Value) -> Result<(), String> {
    check_within(&tokenizer["normalizer"])?;
    check_within(&tokenizer["post_processor"])
}

fn check_within(value: &Value) -> Result<(), String> {
    match value {
        Value::Object(map) => {
            if let Some(text) = map.get(MAP).and_then(Value::as_str) {
                check_charsmap(text).ok_or_else(|| format!("{MAP:?} is damaged; download it again"))?;
            }
            check_template(map)?;
            map.values().try_for_each(check_within)
        }
        Value::Array(list) => list.iter().try_for_each(check_within),
        _ => Ok(()),
    }
}

/// A template may only name tokens that special_tokens defines, and only "pair" may name a second sequence.
fn check_template(map: &Map<String, Value>) -> Result<(), String> {
    let tokens = map.get("special_tokens").unwrap_or(&Value::Null);
    for template in ["single", "pair"] {
        for piece in map.get(template).and_then(Value::as_array).into_iter().flatten() {
            let token = piece["SpecialToken"]["id"].as_str();
            if let Some(token) = token.filter(|token| tokens.get(token).is_none()) {
                return Err(format!(
                    "its template {template:?} names the token {token:?}, which special_tokens does not define"
                ));
            }
            if template == "single" && piece["Sequence"]["id"] == "B" {
                return Err(format!("its template {template:?} names a second sequence"));
            }
        }
    }
    Ok(())
}

/// Checks that every transition in the trie stays within it, and that every value is the start of a character in the
/// texts.
fn check_charsmap(text: &str) -> Option<()> {
    let bytes = STANDARD.decode(text).ok()?;
    let (length, rest) = bytes.split_first_chunk::<UNIT>()?;
    let (trie, texts) = rest.split_at_checked(u32::from_le_bytes(*length) as usize / UNIT * UNIT)?;
    let texts = std::str::from_utf8(texts).ok()?;
    let units: Vec<u32> = trie.as_chunks().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    let whole_blocks = !units.is_empty() && units.len().is_multiple_of(BLOCK);
    let has_valid_child = |(position, unit): (usize, &u32)| {
        let child = units.get(position ^ offset(*unit));
        child.is_some_and(|child| unit & HAS_VALUE == 0 || texts.is_char_boundary((child & !VALUE) as usize))
    };
    (whole_blocks && units.iter().enumerate().filter(|(_, unit)| *unit & VALUE == 0).all(has_valid_child)).then_some(())
}

/// The offset of a unit's children (darts-clone's `DoubleArrayUnit::offset`).
fn offset(unit: u32) -> usize {
    (unit as usize >> 10) << ((unit & 1 << 9) >> 6)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokenizer(bytes: &[u8]) -> Value {
        json!({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled", MAP: STANDARD.encode(bytes)}]}})
    }

    /// A trie of one block that maps "a" to the text at `value`.
    fn map(value: u32, texts: &[u8]) -> Vec<u8> {
        let mut units = [0u32; BLOCK];
        units[0] = 1 << 10; // its children start at 1
        units[1 ^ usize::from(b'a')] = u32::from(b'a') | HAS_VALUE | 2 << 10;
        units[1 ^ usize::from(b'a') ^ 2] = VALUE | value;
        let units: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        [&(units.len() as u32).to_le_bytes(), &units[..], texts].concat()
    }

    #[test]
    fn damaged_maps_are_refused() {
        let whole = map(0, "\u{e9}\0".as_bytes());
        check(&tokenizer(&whole)).unwrap();
        check(&json!({"normalizer": null})).unwrap();
        let far = [&whole[..4], &(1u32 << 20).to_le_bytes(), &whole[8..]].concat();
        for (what, bytes) in [
            ("nothing", vec![]),
            ("no trie", vec![0; 4]),
            ("a length past the end", [&u32::MAX.to_le_bytes(), &whole[4..]].concat()),
            ("half a block", [&512u32.to_le_bytes(), &whole[4..516]].concat()),
            ("children outside", far),
            ("a text outside", map(9, b"e\0")),
            ("half a character", map(1, "\u{e9}\0".as_bytes())),
            ("no text", map(0, b"\xff\0")),
        ] {
            assert!(check(&tokenizer(&bytes)).is_err_and(|reason| reason.contains("damaged")), "{what}");
        }
    }

    #[test]
    fn templates_with_undefined_tokens_are_refused() {
        let template = |single: Value| {
            check(&json!({"post_processor": {"processors": [{"special_tokens": {"</s>": {}}, "single": single}]}}))
        };
        template(json!([{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}])).unwrap();
        let unknown = template(json!([{"SpecialToken": {"id": "<s>"}}])).unwrap_err();
        assert_eq!(unknown, "its template \"single\" names the token \"<s>\", which special_tokens does not define");
        assert!(template(json!([{"Sequence": {"id": "B"}}])).unwrap_err().contains("second sequence"));
    }
}
