//! [`ClipTokenizer`] and [`T5Tokenizer`]: prompts to token ids of one length, from the bytes of the files that
//! pipelines ship. They know no encoder.

use super::{sentencepiece, trusted};
use crate::{ModelError, Result};
use serde_json::{Map, Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::Tokenizer;

/// What separates words from punctuation and digits in CLIP (its own pattern).
const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// How many merges count: a vocabulary of 49152 less 256 bytes, and 2 special tokens, of CLIP's own.
const CLIP_MERGES: usize = 49152 - 256 - 2;
const CLIP_START: &str = "<|startoftext|>";
const CLIP_END: &str = "<|endoftext|>";
const T5_PAD: &str = "<pad>";

/// CLIP's byte-level BPE: start token, words, end token, padding.
#[derive(Debug)]
pub struct ClipTokenizer {
    padded: Padded,
    max_length: Option<usize>,
}

/// T5's unigram model: pieces, end token, padding.
#[derive(Debug)]
pub struct T5Tokenizer {
    padded: Padded,
}

/// A tokenizer whose sequences are cut or filled to a length.
#[derive(Debug)]
struct Padded {
    tokenizer: Tokenizer,
    pad: u32,
}

/// tokenizer_config.json, or nothing.
pub(super) struct TokenizerConfig(Value);

impl ClipTokenizer {
    /// From vocab.json and merges.txt, as FLUX.1 ships them, and tokenizer_config.json where there is one.
    ///
    /// # Errors
    /// A file that is not what its name says.
    pub fn from_vocabulary(vocab: &[u8], merges: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let settings = TokenizerConfig::parse(config)?;
        let vocab: Map<String, Value> = parse("vocab.json", vocab)?;
        let described = clip_description(vocab, read_merges(merges)?, &settings)?;
        Self::new(&serde_json::to_vec(&described).map_err(|error| bad("vocab.json", error))?, "vocab.json", &settings)
    }

    /// From tokenizer.json, as newer libraries write it, and tokenizer_config.json where there is one.
    ///
    /// # Errors
    /// A file that is not what its name says.
    pub fn from_json(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Self> {
        Self::new(tokenizer, "tokenizer.json", &TokenizerConfig::parse(config)?)
    }

    /// The ids of `prompt`, cut so that the end token stays, and padded to `max_length`.
    ///
    /// # Errors
    /// A `max_length` without room for the start and end tokens.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        self.padded.encode(prompt, max_length)
    }

    /// The length that tokenizer_config.json gives for the encoder beside it.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    fn new(json: &[u8], file: &str, settings: &TokenizerConfig) -> Result<Self> {
        let padded = Padded::new(json, file, &settings.token("pad_token", CLIP_END))?;
        Ok(Self { padded, max_length: settings.max_length() })
    }
}

impl T5Tokenizer {
    /// From tokenizer.json.
    ///
    /// # Errors
    /// A file that is not what its name says.
    pub fn from_json(tokenizer: &[u8]) -> Result<Self> {
        Ok(Self { padded: Padded::new(tokenizer, "tokenizer.json", T5_PAD)? })
    }

    /// From spiece.model, as older libraries ship it alone, and tokenizer_config.json where there is one.
    ///
    /// # Errors
    /// A file that is not what its name says.
    pub fn from_sentencepiece(model: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let described = sentencepiece::description(model, &TokenizerConfig::parse(config)?)?;
        let json = serde_json::to_vec(&described).map_err(|error| bad("spiece.model", error))?;
        Ok(Self { padded: Padded::new(&json, "spiece.model", T5_PAD)? })
    }

    /// The ids of `prompt`, cut so that the end token stays, and padded to `max_length`.
    ///
    /// # Errors
    /// A `max_length` without room for the end token.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        self.padded.encode(prompt, max_length)
    }
}

impl Padded {
    fn new(json: &[u8], file: &str, pad: &str) -> Result<Self> {
        trusted::check(&parse(file, json)?).map_err(|reason| bad(file, reason))?;
        let mut tokenizer = caught(|| Tokenizer::from_bytes(json)).map_err(|error| bad(file, error))?;
        // A file may hold the cut and the padding of its last user.
        tokenizer.with_padding(None).with_truncation(None).map_err(|error| bad(file, error))?;
        let pad = tokenizer.token_to_id(pad).ok_or_else(|| bad(file, format!("has no padding token {pad:?}")))?;
        Ok(Self { tokenizer, pad })
    }

    fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        let encoding = caught(|| self.tokenizer.encode_fast(prompt, true)).map_err(ModelError::Tokenizer)?;
        let mut ids = encoding.get_ids().to_vec();
        if max_length < 2 {
            return Err(ModelError::Tokenizer(format!("a length of {max_length} has no room for the end token")));
        }
        if ids.len() > max_length {
            let end = ids[ids.len() - 1];
            ids.truncate(max_length - 1);
            ids.push(end);
        }
        ids.resize(max_length, self.pad);
        Ok(ids)
    }
}

/// What the library does with a file that others made. It panics at some that it could refuse, such as one whose patterns
/// match nothing in a text.
fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer library cannot do what this file asks for: copy the file again".to_owned()),
    }
}

impl TokenizerConfig {
    fn parse(config: Option<&[u8]>) -> Result<Self> {
        Ok(Self(config.map_or(Ok(Value::Null), |bytes| parse("tokenizer_config.json", bytes))?))
    }

    /// A special token, which is written as its text or as an object that holds it.
    pub(super) fn token(&self, key: &str, default: &str) -> String {
        let value = &self.0[key];
        value.as_str().or_else(|| value["content"].as_str()).unwrap_or(default).to_owned()
    }

    /// Yes or no.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.0[key].as_bool()
    }

    /// A whole number.
    pub(super) fn count(&self, key: &str) -> Option<u64> {
        self.0[key].as_u64()
    }

    /// Libraries write 1e30 where a tokenizer has no length.
    fn max_length(&self) -> Option<usize> {
        self.0["model_max_length"].as_u64().map(|length| length as usize).filter(|length| *length < 1 << 20)
    }

    /// Tokens to find in a text before it is cut to words.
    fn added_tokens(&self, vocab: &Map<String, Value>) -> Vec<Value> {
        let Some(listed) = self.0["added_tokens_decoder"].as_object() else {
            let names = [self.token("bos_token", CLIP_START), self.token("eos_token", CLIP_END)];
            return names
                .iter()
                .filter_map(|name| Some(added_token(vocab.get(name)?.as_u64()?, json!({"content": name}))))
                .collect();
        };
        let mut tokens: Vec<(u64, &Value)> =
            listed.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
        tokens.sort_by_key(|(id, _)| *id);
        tokens.into_iter().map(|(id, token)| added_token(id, token.clone())).collect()
    }
}

/// The tokenizer.json that transformers makes of CLIP's vocab.json and merges.txt.
fn clip_description(vocab: Map<String, Value>, merges: Vec<[&str; 2]>, settings: &TokenizerConfig) -> Result<Value> {
    let edge = |key, default| {
        let token = settings.token(key, default);
        let id = vocab.get(&token).and_then(Value::as_u64);
        id.map(|id| json!([token, id])).ok_or_else(|| bad("vocab.json", format!("has no token {token:?}")))
    };
    let (start, end) = (edge("bos_token", CLIP_START)?, edge("eos_token", CLIP_END)?);
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let words = json!({"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": true});
    let spaces = json!({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "});
    Ok(json!({
        "version": "1.0",
        "added_tokens": settings.added_tokens(&vocab),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes]},
        "post_processor": {
            "type": "RobertaProcessing", "sep": end, "cls": start, "trim_offsets": false, "add_prefix_space": false,
        },
        "model": {
            "type": "BPE",
            "unk_token": settings.token("unk_token", CLIP_END),
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": false,
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

pub(super) fn added_token(id: u64, token: Value) -> Value {
    let flag = |key: &str, default| token[key].as_bool().unwrap_or(default);
    json!({
        "id": id,
        "content": token["content"],
        "single_word": flag("single_word", false),
        "lstrip": flag("lstrip", false),
        "rstrip": flag("rstrip", false),
        "normalized": flag("normalized", true),
        "special": flag("special", true),
    })
}

/// Pairs of merges.txt, whose first line is its version.
fn read_merges(merges: &[u8]) -> Result<Vec<[&str; 2]>> {
    let text = std::str::from_utf8(merges).map_err(|error| bad("merges.txt", error))?;
    text.trim()
        .lines()
        .enumerate()
        .skip(1)
        .take(CLIP_MERGES)
        .map(|(number, line)| read_merge(number + 1, line))
        .collect()
}

fn read_merge(number: usize, line: &str) -> Result<[&str; 2]> {
    let mut parts = line.split_whitespace();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(left), Some(right), None) => Ok([left, right]),
        _ => Err(bad("merges.txt", format!("line {number}: expected two parts, found {line:?}"))),
    }
}

fn parse<T: serde::de::DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| bad(file, error))
}

pub(super) fn bad(file: &str, reason: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer(format!("{file}: {reason}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const VOCAB: &[u8] =
        br#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}"#;
    const MERGES: &[u8] = b"#version: 0.2\na b</w>\n";

    #[test]
    fn a_prompt_is_framed_and_padded() {
        let tokenizer = ClipTokenizer::from_vocabulary(VOCAB, MERGES, None).unwrap();
        assert_eq!(tokenizer.encode("  AB\nb", 6).unwrap(), [5, 4, 3, 6, 6, 6]);
        assert_eq!(tokenizer.encode("", 3).unwrap(), [5, 6, 6]);
    }

    #[test]
    fn a_long_prompt_keeps_its_end_token() {
        let tokenizer = ClipTokenizer::from_vocabulary(VOCAB, MERGES, None).unwrap();
        assert_eq!(tokenizer.encode("a b a b a b", 4).unwrap(), [5, 2, 3, 6]);
        assert!(tokenizer.encode("a", 1).is_err());
    }

    #[test]
    fn settings_choose_the_padding_and_the_length() {
        let config = br#"{"pad_token": {"content": "b"}, "model_max_length": 5}"#;
        let tokenizer = ClipTokenizer::from_vocabulary(VOCAB, MERGES, Some(config)).unwrap();
        assert_eq!(tokenizer.max_length(), Some(5));
        assert_eq!(tokenizer.encode("a", 5).unwrap(), [5, 2, 6, 1, 1]);
        let endless = ClipTokenizer::from_vocabulary(VOCAB, MERGES, Some(br#"{"model_max_length": 1e30}"#)).unwrap();
        assert_eq!(endless.max_length(), None);
    }

    #[test]
    fn a_file_at_which_the_library_panics_is_an_error() {
        let filled = json!({"type": "Replace", "pattern": {"Regex": r"\s?"}, "content": "'d "});
        let file = json!({
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, filled, {"type": "Lowercase"}]},
            "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}, "merges": []},
        });
        let tokenizer = ClipTokenizer::from_json(file.to_string().as_bytes(), None).unwrap();
        let error = tokenizer.encode("fox", 16).unwrap_err().to_string();
        assert!(error.contains("the tokenizer library cannot do"), "{error}");
    }

    #[test]
    fn errors_name_the_file() {
        let check = |vocab: &[u8], merges: &[u8], expected: &str| {
            let error = ClipTokenizer::from_vocabulary(vocab, merges, None).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(b"[]", MERGES, "vocab.json");
        check(b"{}", MERGES, "vocab.json: has no token \"<|startoftext|>\"");
        check(VOCAB, b"#version: 0.2\na b c\n", "merges.txt: line 2: expected two parts, found \"a b c\"");
        assert!(T5Tokenizer::from_json(b"<html>").unwrap_err().to_string().contains("tokenizer.json"));
    }
}
