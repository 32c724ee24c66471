//! [`ClipTokenizer`] and [`T5Tokenizer`]: prompts to token ids, truncated and padded, from the bytes of the files that
//! pipelines ship. They follow transformers' `CLIPTokenizer` and `T5Tokenizer`.

use super::tokenizer_config::{TokenizerConfig, added_token, bad, parse};
use super::{sentencepiece, validation};
use crate::{ModelError, Result};
use serde_json::{Map, Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::Tokenizer;

/// CLIP's pattern, which splits a text into words, digits and punctuation.
const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Lines of merges.txt that `CLIPTokenizer` reads: 49152 vocabulary entries less 256 bytes and 2 special tokens.
const CLIP_MERGES: usize = 49152 - 256 - 2;
const CLIP_START: &str = "<|startoftext|>";
const CLIP_END: &str = "<|endoftext|>";
const T5_PAD: &str = "<pad>";

/// CLIP's byte-level BPE tokenizer (transformers' `CLIPTokenizer`): start token, words, end token, padding.
#[derive(Debug)]
pub struct ClipTokenizer {
    padded: PaddedTokenizer,
    max_length: Option<usize>,
}

/// T5's unigram tokenizer (transformers' `T5Tokenizer`): pieces, end token, padding.
#[derive(Debug)]
pub struct T5Tokenizer {
    padded: PaddedTokenizer,
}

/// A tokenizer that truncates and pads to a length.
#[derive(Debug)]
struct PaddedTokenizer {
    tokenizer: Tokenizer,
    pad: u32,
}

impl ClipTokenizer {
    /// From vocab.json and merges.txt, as FLUX.1 ships them, and tokenizer_config.json if it exists.
    ///
    /// # Errors
    /// A malformed file.
    pub fn from_vocabulary(vocab: &[u8], merges: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let settings = TokenizerConfig::parse(config)?;
        let vocab: Map<String, Value> = parse("vocab.json", vocab)?;
        let tokenizer = clip_tokenizer_json(vocab, read_merges(merges)?, &settings)?;
        let json = serde_json::to_vec(&tokenizer).map_err(|error| bad("vocab.json", error))?;
        Self::new(&json, "vocab.json", &settings)
    }

    /// From tokenizer.json, as newer versions of transformers write it, and tokenizer_config.json if it exists.
    ///
    /// # Errors
    /// A malformed file.
    pub fn from_json(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Self> {
        Self::new(tokenizer, "tokenizer.json", &TokenizerConfig::parse(config)?)
    }

    /// The ids of `prompt`, truncated or padded to `max_length`. Truncation keeps the end token.
    ///
    /// # Errors
    /// A `max_length` below 2: there is no room for the start and end tokens.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        self.padded.encode(prompt, max_length)
    }

    /// The number of tokens of `prompt` with start and end, before it is truncated or padded.
    ///
    /// # Errors
    /// The tokenizer cannot process the text.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        Ok(self.padded.all_ids(prompt)?.len())
    }

    /// `model_max_length` of tokenizer_config.json, the length that the text encoder was trained with.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    fn new(json: &[u8], file: &str, settings: &TokenizerConfig) -> Result<Self> {
        let padded = PaddedTokenizer::new(json, file, &settings.token("pad_token", CLIP_END))?;
        Ok(Self { padded, max_length: settings.max_length() })
    }
}

impl T5Tokenizer {
    /// From tokenizer.json.
    ///
    /// # Errors
    /// A malformed file.
    pub fn from_json(tokenizer: &[u8]) -> Result<Self> {
        Ok(Self { padded: PaddedTokenizer::new(tokenizer, "tokenizer.json", T5_PAD)? })
    }

    /// From spiece.model, the only tokenizer file of older pipelines, and tokenizer_config.json if it exists.
    ///
    /// # Errors
    /// A malformed file.
    pub fn from_sentencepiece(model: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let tokenizer = sentencepiece::tokenizer_json(model, &TokenizerConfig::parse(config)?)?;
        let json = serde_json::to_vec(&tokenizer).map_err(|error| bad("spiece.model", error))?;
        Ok(Self { padded: PaddedTokenizer::new(&json, "spiece.model", T5_PAD)? })
    }

    /// The ids of `prompt`, truncated or padded to `max_length`. Truncation keeps the end token.
    ///
    /// # Errors
    /// A `max_length` below 2.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        self.padded.encode(prompt, max_length)
    }

    /// The number of tokens of `prompt` with its end, before it is truncated or padded.
    ///
    /// # Errors
    /// The tokenizer cannot process the text.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        Ok(self.padded.all_ids(prompt)?.len())
    }
}

impl PaddedTokenizer {
    fn new(json: &[u8], file: &str, pad: &str) -> Result<Self> {
        validation::check(&parse(file, json)?).map_err(|reason| bad(file, reason))?;
        let mut tokenizer = catch_panics(|| Tokenizer::from_bytes(json)).map_err(|error| bad(file, error))?;
        // A file keeps the truncation and padding settings it was saved with.
        tokenizer.with_padding(None).with_truncation(None).map_err(|error| bad(file, error))?;
        let pad = tokenizer.token_to_id(pad).ok_or_else(|| bad(file, format!("has no padding token {pad:?}")))?;
        Ok(Self { tokenizer, pad })
    }

    fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<u32>> {
        let mut ids = self.all_ids(prompt)?;
        if max_length < 2 {
            return Err(ModelError::Tokenizer(format!("expected a length of at least 2, found {max_length}")));
        }
        if ids.len() > max_length {
            let end = ids[ids.len() - 1];
            ids.truncate(max_length - 1);
            ids.push(end);
        }
        ids.resize(max_length, self.pad);
        Ok(ids)
    }

    /// The ids of `prompt`, neither truncated nor padded.
    fn all_ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = catch_panics(|| self.tokenizer.encode_fast(prompt, true)).map_err(ModelError::Tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Runs the tokenizers library, which panics on some malformed files: for example, a pattern that matches the empty
/// string.
fn catch_panics<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library cannot process this file; download it again".to_owned()),
    }
}

/// The tokenizer.json to which transformers converts CLIP's vocab.json and merges.txt (`CLIPConverter`).
fn clip_tokenizer_json(vocab: Map<String, Value>, merges: Vec<[&str; 2]>, settings: &TokenizerConfig) -> Result<Value> {
    let token_and_id = |key, default| {
        let token = settings.token(key, default);
        let id = vocab.get(&token).and_then(Value::as_u64);
        id.map(|id| json!([token, id])).ok_or_else(|| bad("vocab.json", format!("has no token {token:?}")))
    };
    let start = token_and_id("bos_token", CLIP_START)?;
    let end = token_and_id("eos_token", CLIP_END)?;
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let words = json!({"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": true});
    let spaces = json!({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "});
    Ok(json!({
        "version": "1.0",
        "added_tokens": settings.added_tokens().unwrap_or_else(|| clip_added_tokens(&vocab, settings)),
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

/// The start and end tokens, for pipelines whose tokenizer_config.json lists no added tokens.
fn clip_added_tokens(vocab: &Map<String, Value>, settings: &TokenizerConfig) -> Vec<Value> {
    let names = [settings.token("bos_token", CLIP_START), settings.token("eos_token", CLIP_END)];
    names.iter().filter_map(|name| Some(added_token(vocab.get(name)?.as_u64()?, json!({"content": name})))).collect()
}

/// The pairs of merges.txt. Its first line is a version.
fn read_merges(merges: &[u8]) -> Result<Vec<[&str; 2]>> {
    let text = std::str::from_utf8(merges).map_err(|error| bad("merges.txt", error))?;
    let lines = text.trim().lines().enumerate().skip(1).take(CLIP_MERGES);
    let merges = lines.map(|(number, line)| read_merge(number + 1, line)).collect::<Result<Vec<_>>>()?;
    if merges.is_empty() {
        return Err(bad("merges.txt", "expected a line for each merge, found none"));
    }
    Ok(merges)
}

fn read_merge(number: usize, line: &str) -> Result<[&str; 2]> {
    let mut parts = line.split_whitespace();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(left), Some(right), None) => Ok([left, right]),
        _ => Err(bad("merges.txt", format!("line {number}: expected two tokens, found {line:?}"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const VOCAB: &[u8] =
        br#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}"#;
    const MERGES: &[u8] = b"#version: 0.2\na b</w>\n";

    #[test]
    fn a_prompt_gets_start_end_and_padding() {
        let tokenizer = ClipTokenizer::from_vocabulary(VOCAB, MERGES, None).unwrap();
        assert_eq!(tokenizer.encode("  AB\nb", 6).unwrap(), [5, 4, 3, 6, 6, 6]);
        assert_eq!(tokenizer.encode("", 3).unwrap(), [5, 6, 6]);
    }

    #[test]
    fn a_long_prompt_keeps_its_end_token() {
        let tokenizer = ClipTokenizer::from_vocabulary(VOCAB, MERGES, None).unwrap();
        assert_eq!(tokenizer.encode("a b a b a b", 4).unwrap(), [5, 2, 3, 6]);
        assert_eq!(tokenizer.count("a b a b a b").unwrap(), 8);
        let error = tokenizer.encode("a", 1).unwrap_err().to_string();
        assert!(error.contains("expected a length of at least 2, found 1"), "{error}");
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
    fn a_panic_of_the_library_is_an_error() {
        let filled = json!({"type": "Replace", "pattern": {"Regex": r"\s?"}, "content": "'d "});
        let file = json!({
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, filled, {"type": "Lowercase"}]},
            "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}, "merges": []},
        });
        let tokenizer = ClipTokenizer::from_json(file.to_string().as_bytes(), None).unwrap();
        let error = tokenizer.encode("fox", 16).unwrap_err().to_string();
        assert!(error.contains("the tokenizers library cannot process this file"), "{error}");
    }

    #[test]
    fn errors_name_the_file() {
        let check = |vocab: &[u8], merges: &[u8], expected: &str| {
            let error = ClipTokenizer::from_vocabulary(vocab, merges, None).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(b"[]", MERGES, "vocab.json");
        check(b"{}", MERGES, "vocab.json: has no token \"<|startoftext|>\"");
        check(VOCAB, b"#version: 0.2\na b c\n", "merges.txt: line 2: expected two tokens, found \"a b c\"");
        assert!(T5Tokenizer::from_json(b"<html>").unwrap_err().to_string().contains("tokenizer.json"));
    }
}
