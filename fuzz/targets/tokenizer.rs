//! Tokenizer files: the first byte selects the kind, and what opens encodes a prompt.
#![no_main]

use clearform_fuzz::halves;
use clearform_models::text::{ClipTokenizer, T5Tokenizer};
use libfuzzer_sys::fuzz_target;

const PROMPT: &str = "A red fox, 3 of them: \u{1f98a}\u{e9}\u{3000}x<|endoftext|></s>";
const LENGTH: usize = 16;

// The reader catches panics of the tokenizers library; any other panic still ends the run.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let [first, second] = halves(bytes);
    let config = (!second.is_empty()).then_some(second);
    match kind {
        b'v' => clip(ClipTokenizer::from_vocabulary(first, second, None)),
        b'c' => clip(ClipTokenizer::from_vocabulary(VOCABULARY, MERGES, Some(first))),
        b'j' => clip(ClipTokenizer::from_json(first, config)),
        b't' => t5(T5Tokenizer::from_json(bytes)),
        _ => t5(T5Tokenizer::from_sentencepiece(first, config)),
    }
});

const VOCABULARY: &[u8] = br#"{"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}"#;
const MERGES: &[u8] = b"#version: 0.2\n";

fn clip<E>(opened: Result<ClipTokenizer, E>) {
    if let Ok(tokenizer) = opened {
        let _ = tokenizer.encode(PROMPT, LENGTH);
    }
}

fn t5<E>(opened: Result<T5Tokenizer, E>) {
    if let Ok(tokenizer) = opened {
        let _ = tokenizer.encode(PROMPT, LENGTH);
    }
}
