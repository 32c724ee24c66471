//! [`tokenizer_json`]: converts T5's sentencepiece model (`spiece.model`) to a tokenizer.json, as transformers'
//! `T5Converter` does.

use super::tokenizer_config::{TokenizerConfig, added_token, bad};
use crate::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

const FILE: &str = "spiece.model";
/// Sentencepiece's replacement for a space.
const SPACE: &str = "▁";
/// Default of `T5Tokenizer` for extra_ids, the number of sentinel tokens "<extra_id_n>" after the pieces.
const EXTRA_IDS: u64 = 100;
/// Limit on extra_ids, so that a damaged tokenizer_config.json does not allocate all memory.
const MAX_EXTRA_IDS: u64 = 1 << 16;

/// The fields of `ModelProto` (sentencepiece_model.proto) that are used.
#[derive(Default)]
struct UnigramModel {
    pieces: Vec<UnigramPiece>,
    /// `normalizer_spec.precompiled_charsmap`.
    charsmap: Vec<u8>,
    /// `normalizer_spec.add_dummy_prefix`.
    add_prefix: bool,
}

struct UnigramPiece {
    text: String,
    score: f32,
    kind: u64,
}

/// `SentencePiece.Type` of special pieces.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;

/// The tokenizer.json of the model `bytes`: normalizer, unigram model and a post-processor that appends the end token.
pub(super) fn tokenizer_json(bytes: &[u8], settings: &TokenizerConfig) -> Result<Value> {
    let model = UnigramModel::read(bytes)?;
    let unknown = model.pieces.iter().position(|piece| piece.kind == UNKNOWN);
    let unknown = unknown.ok_or_else(|| bad(FILE, "has no piece for unknown text"))?;
    let end_token = settings.token("eos_token", "</s>");
    let end = model.pieces.iter().position(|piece| piece.text == end_token);
    let end = end.ok_or_else(|| bad(FILE, format!("has no end token {end_token:?}")))?;
    let extra_ids = settings.count("extra_ids").unwrap_or(EXTRA_IDS).min(MAX_EXTRA_IDS);
    // As in T5: the first id after the pieces is that of the sentinel with the highest number.
    let extra: Vec<String> = (0..extra_ids).rev().map(|number| format!("<extra_id_{number}>")).collect();
    let controls = model.pieces.iter().enumerate().filter(|(_, piece)| [UNKNOWN, CONTROL].contains(&piece.kind));
    let controls = controls.map(|(id, piece)| special_token(id, &piece.text));
    let sentinels = extra.iter().enumerate().map(|(index, text)| special_token(model.pieces.len() + index, text));
    let vocab = model.pieces.iter().map(|piece| json!([piece.text, piece.score]));
    let adds_prefix = settings.flag_or("add_prefix_space", model.add_prefix);
    let scheme = match settings.flag("legacy") {
        _ if !adds_prefix => "never",
        Some(false) => "first",
        _ => "always",
    };
    Ok(json!({
        "version": "1.0",
        "added_tokens": controls.chain(sentinels).collect::<Vec<_>>(),
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

fn special_token(id: usize, text: &str) -> Value {
    added_token(id as u64, json!({"content": text, "normalized": false, "special": true}))
}

impl UnigramModel {
    fn read(bytes: &[u8]) -> Result<Self> {
        let mut model = Self { add_prefix: true, ..Self::default() };
        for field in Fields(bytes) {
            match field? {
                (1, Payload::Bytes(piece)) => model.pieces.push(UnigramPiece::read(piece)?),
                (3, Payload::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        match model.pieces.is_empty() {
            true => Err(bad(FILE, "expected a sentencepiece model, found one without pieces; download it again")),
            false => Ok(model),
        }
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<()> {
        for field in Fields(bytes) {
            match field? {
                (2, Payload::Bytes(charsmap)) => self.charsmap = charsmap.to_vec(),
                (3, Payload::Varint(flag)) => self.add_prefix = flag != 0,
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
                (2, Payload::Float(score)) => piece.score = score,
                (3, Payload::Varint(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// Iterates over the fields of a protocol buffers message: field number and payload.
struct Fields<'a>(&'a [u8]);

enum Payload<'a> {
    Varint(u64),
    Float(f32),
    /// Skipped: no field that is used has this type.
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
        Some(field.ok_or_else(|| bad(FILE, "expected a sentencepiece model, found other data; download it again")))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Payload<'a>)> {
        let key = self.varint()?;
        let payload = match key & 7 {
            0 => Payload::Varint(self.varint()?),
            1 => self.take(8).map(|_| Payload::Double)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Payload::Bytes(self.take(length)?)
            }
            5 => Payload::Float(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, payload))
    }

    /// Seven bits per byte, lowest first. The highest bit of a byte means that more follow.
    fn varint(&mut self) -> Option<u64> {
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
    fn tokens_match_sentencepiece() {
        let tokenizer = T5Tokenizer::from_sentencepiece(MODEL, None).unwrap();
        let expected: BTreeMap<String, Vec<u32>> = serde_json::from_str(TOKENS).unwrap();
        assert_eq!(expected.len(), 17);
        for (prompt, ids) in expected {
            let padded = [&ids[..], &vec![0; 64 - ids.len()]].concat();
            assert_eq!(tokenizer.encode(&prompt, 64).unwrap(), padded, "{prompt:?}");
        }
    }

    /// As transformers 4.57.6 does with each config, where a space before the prompt gives another first token.
    #[test]
    fn a_space_is_added_before_the_prompt_as_the_config_says() {
        let first = |config: Option<&[u8]>, prompt: &str| {
            T5Tokenizer::from_sentencepiece(MODEL, config).unwrap().encode(prompt, 8).unwrap()
        };
        let prompt = "the the";
        let [with, without] = [None, Some(&br#"{"add_prefix_space": false}"#[..])].map(|config| first(config, prompt));
        assert_ne!(with, without);
        let cases: [(&[u8], &Vec<u32>); 5] = [
            (b"{}", &with),
            (br#"{"add_prefix_space": true}"#, &with),
            (br#"{"add_prefix_space": null}"#, &without),
            (br#"{"add_prefix_space": null, "legacy": false}"#, &without),
            (br#"{"legacy": null}"#, &with),
        ];
        for (config, expected) in cases {
            assert_eq!(&first(Some(config), prompt), expected, "{}", String::from_utf8_lossy(config));
        }
    }

    #[test]
    fn special_tokens_in_a_prompt_are_recognised() {
        let config = br#"{"extra_ids": 3}"#;
        let tokenizer = T5Tokenizer::from_sentencepiece(MODEL, Some(config)).unwrap();
        let first = 58; // number of pieces in the model
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
