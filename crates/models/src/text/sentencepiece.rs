//! [`description`]: a sentencepiece model (`spiece.model`), as the tokenizer.json that transformers makes of it. It knows
//! T5's special tokens and no other tokenizer's.

use super::tokenizers::{TokenizerConfig, added_token, bad};
use crate::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

const FILE: &str = "spiece.model";
/// What stands for a space.
const SPACE: &str = "▁";
/// Tokens that T5 has beyond its pieces where tokenizer_config.json does not say how many.
const EXTRA_TOKENS: u64 = 100;
/// More than any vocabulary has; a file that claims more is not believed.
const MOST_EXTRA_TOKENS: u64 = 1 << 16;

/// What is used of a model file (sentencepiece_model.proto).
#[derive(Default)]
struct UnigramModel {
    pieces: Vec<UnigramPiece>,
    charsmap: Vec<u8>,
    prefixed: bool,
}

struct UnigramPiece {
    text: String,
    score: f32,
    kind: u64,
}

/// Kinds of pieces that are no text.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;

/// The tokenizer.json of the model `bytes`: a unigram model behind its normalisation, and the end token.
pub(super) fn description(bytes: &[u8], settings: &TokenizerConfig) -> Result<Value> {
    let model = UnigramModel::read(bytes)?;
    let unknown = model.pieces.iter().position(|piece| piece.kind == UNKNOWN);
    let unknown = unknown.ok_or_else(|| bad(FILE, "has no piece for the unknown"))?;
    let end_token = settings.token("eos_token", "</s>");
    let end = model.pieces.iter().position(|piece| piece.text == end_token);
    let end = end.ok_or_else(|| bad(FILE, format!("has no end token {end_token:?}")))?;
    let extra = settings.count("extra_ids").unwrap_or(EXTRA_TOKENS).min(MOST_EXTRA_TOKENS);
    let extra: Vec<String> = (0..extra).rev().map(|number| format!("<extra_id_{number}>")).collect();
    let special = |(id, text): (usize, &String)| {
        added_token(id as u64, json!({"content": text, "normalized": false, "special": true}))
    };
    let controls = model.pieces.iter().enumerate().filter(|(_, piece)| [UNKNOWN, CONTROL].contains(&piece.kind));
    let controls = controls.map(|(id, piece)| special((id, &piece.text)));
    let extras = extra.iter().enumerate().map(|(place, text)| special((model.pieces.len() + place, text)));
    let vocab = model.pieces.iter().map(|piece| json!([piece.text, piece.score]));
    let scheme = if settings.flag("add_prefix_space").unwrap_or(model.prefixed) { "always" } else { "never" };
    Ok(json!({
        "version": "1.0",
        "added_tokens": controls.chain(extras).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": model.normalizers()},
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end_token, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {end_token.as_str(): {"id": end_token, "ids": [end], "tokens": [end_token]}},
        },
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": vocab.chain(extra.iter().map(|text| json!([text, 0.0]))).collect::<Vec<_>>(),
            "byte_fallback": false,
        },
    }))
}

impl UnigramModel {
    fn read(bytes: &[u8]) -> Result<Self> {
        let mut model = Self { prefixed: true, ..Self::default() };
        for field in Fields(bytes) {
            match field? {
                (1, Payload::Bytes(piece)) => model.pieces.push(UnigramPiece::read(piece)?),
                (3, Payload::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        match model.pieces.is_empty() {
            true => Err(bad(FILE, "expected a sentencepiece model, found no pieces in it; copy the file again")),
            false => Ok(model),
        }
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<()> {
        for field in Fields(bytes) {
            match field? {
                (2, Payload::Bytes(charsmap)) => self.charsmap = charsmap.to_vec(),
                (3, Payload::Number(flag)) => self.prefixed = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizers(&self) -> Vec<Value> {
        let mapped = json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&self.charsmap)});
        let stripped = json!({"type": "Strip", "strip_left": false, "strip_right": true});
        let joined = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE});
        let mapped = (!self.charsmap.is_empty()).then_some(mapped);
        mapped.into_iter().chain([stripped, joined]).collect()
    }
}

impl UnigramPiece {
    fn read(bytes: &[u8]) -> Result<Self> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: 1 };
        for field in Fields(bytes) {
            match field? {
                (1, Payload::Bytes(text)) => {
                    piece.text = String::from_utf8(text.to_vec()).map_err(|error| bad(FILE, error))?;
                }
                (2, Payload::Single(score)) => piece.score = score,
                (3, Payload::Number(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// The fields of a message of protocol buffers, by number.
struct Fields<'a>(&'a [u8]);

enum Payload<'a> {
    Number(u64),
    Single(f32),
    Double,
    Bytes(&'a [u8]),
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Payload<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| bad(FILE, "expected a sentencepiece model, found other bytes; copy the file again")))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Payload<'a>)> {
        let key = self.number()?;
        let payload = match key & 7 {
            0 => Payload::Number(self.number()?),
            1 => self.take(8).map(|_| Payload::Double)?,
            2 => {
                let length = usize::try_from(self.number()?).ok()?;
                Payload::Bytes(self.take(length)?)
            }
            5 => Payload::Single(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, payload))
    }

    /// Seven bits a byte, the lowest first; the highest bit says that more follow.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::text::T5Tokenizer;
    use std::collections::BTreeMap;

    const MODEL: &[u8] = include_bytes!("../../fixtures/sentencepiece/spiece.model");
    const TOKENS: &str = include_str!("../../fixtures/sentencepiece/tokens.json");

    #[test]
    fn tokens_are_those_of_sentencepiece() {
        let tokenizer = T5Tokenizer::from_sentencepiece(MODEL, None).unwrap();
        let expected: BTreeMap<String, Vec<u32>> = serde_json::from_str(TOKENS).unwrap();
        assert!(expected.len() > 15);
        for (prompt, ids) in expected {
            let padded = [&ids[..], &vec![0; 64 - ids.len()]].concat();
            assert_eq!(tokenizer.encode(&prompt, 64).unwrap(), padded, "{prompt:?}");
        }
    }

    #[test]
    fn special_tokens_in_a_prompt_are_themselves() {
        let config = br#"{"extra_ids": 3}"#;
        let tokenizer = T5Tokenizer::from_sentencepiece(MODEL, Some(config)).unwrap();
        let first = 58; // pieces of the model
        assert_eq!(tokenizer.encode("<extra_id_2></s><extra_id_0>", 4).unwrap(), [first, 1, first + 2, 1]);
    }

    #[test]
    fn other_files_are_refused() {
        for bytes in [&b""[..], b"<html>", &MODEL[..100], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f]] {
            let error = T5Tokenizer::from_sentencepiece(bytes, None).unwrap_err().to_string();
            assert!(error.contains("spiece.model"), "{error}");
        }
    }
}
