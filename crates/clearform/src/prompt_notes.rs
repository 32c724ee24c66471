//! What a user may not expect of prompts: ends that text encoders cut, and syntax of other programs that is read as
//! text.

use crate::observer::{Observer, note};
use clearform_models::Prompt;
use clearform_models::text::TruncatedPrompt;
use std::collections::{BTreeMap, BTreeSet};

/// So many prompts that an encoder cuts are named; more are counted.
const NAMED: usize = 3;

/// Says which of `total` prompts the text encoders cut, or for each encoder how many if they are more than a few.
pub fn note_truncated(truncated: &[TruncatedPrompt], total: usize, observer: &mut dyn Observer) {
    let mut by_encoder = BTreeMap::<[&str; 2], Vec<&TruncatedPrompt>>::new();
    for prompt in truncated {
        by_encoder.entry(prompt.encoder).or_default().push(prompt);
    }
    for ([component, class], prompts) in by_encoder {
        if prompts.len() <= NAMED {
            prompts.iter().for_each(|prompt| note(observer, prompt));
            continue;
        }
        let most = prompts.iter().map(|prompt| prompt.tokens - prompt.limit).max().unwrap_or(0);
        note(
            observer,
            format_args!(
                "{component} ({class}): {} of {total} prompts are longer than the {} tokens that it takes; their ends \
                 are cut (most: {most} tokens)",
                prompts.len(),
                prompts[0].limit
            ),
        );
    }
}

/// Something that other programs take from a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum ForeignSyntax {
    /// `<lora:name:0.8>` or `<lyco:name:0.8>`.
    Lora,
    /// `<hypernet:name:0.8>`.
    Hypernetwork,
    /// `(word:1.2)`.
    WordWeight,
}

/// How tags begin, after `<`.
const TAGS: [(&str, ForeignSyntax); 3] =
    [("lora:", ForeignSyntax::Lora), ("lyco:", ForeignSyntax::Lora), ("hypernet:", ForeignSyntax::Hypernetwork)];

/// What is said of `prompts` with syntax of AUTOMATIC1111's web UI and programs like it, a line for each kind.
pub fn foreign_syntax_notes(prompts: &[&str]) -> Vec<String> {
    let mut found = BTreeMap::<ForeignSyntax, (BTreeSet<usize>, Vec<&str>)>::new();
    for (index, prompt) in prompts.iter().enumerate() {
        for (syntax, text) in tags(prompt).into_iter().chain(weighted_words(prompt)) {
            let (indices, texts) = found.entry(syntax).or_default();
            indices.insert(index);
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
    }
    let line = |(syntax, (indices, texts)): (ForeignSyntax, (BTreeSet<usize>, Vec<&str>))| {
        let has = match (prompts.len(), indices.len()) {
            (1, _) => "the prompt has".to_owned(),
            (total, 1) => format!("1 of {total} prompts has"),
            (total, count) => format!("{count} of {total} prompts have"),
        };
        format!("{has} {}, read as text: {}", quoted(&texts), syntax.advice(texts[0]))
    };
    found.into_iter().map(line).collect()
}

/// The texts among `prompts`.
pub fn texts(prompts: &[Prompt]) -> Vec<&str> {
    prompts.iter().filter_map(text).collect()
}

fn text(prompt: &Prompt) -> Option<&str> {
    match prompt {
        Prompt::Text(text) => Some(text),
        Prompt::Class(_) => None,
    }
}

/// The first few of `texts`, in quotation marks.
fn quoted(texts: &[&str]) -> String {
    /// How many of them.
    const QUOTED: usize = 3;
    let first: Vec<String> = texts.iter().take(QUOTED).map(|text| format!("{text:?}")).collect();
    let more = if texts.len() > QUOTED { " and more" } else { "" };
    first.join(", ") + more
}

impl ForeignSyntax {
    /// What to do instead of writing `text`.
    fn advice(self, text: &str) -> String {
        match self {
            Self::Lora => {
                let strength = text.trim_end_matches('>').split(':').nth(2).filter(|number| is_number(number));
                let strength = strength.map(|number| format!(":{number}")).unwrap_or_default();
                format!("LoRAs are given with --lora FILE{strength} (generate, transfer, convert)")
            }
            Self::Hypernetwork => "hypernetworks are not supported".to_owned(),
            Self::WordWeight => "weights of words are not supported".to_owned(),
        }
    }
}

/// Tags such as `<lora:name:0.8>` in `prompt`.
fn tags(prompt: &str) -> Vec<(ForeignSyntax, &str)> {
    let tag = |(start, _)| {
        let rest: &str = &prompt[start..];
        let text = &rest[..=rest.find('>')?];
        let lower = text[1..].to_lowercase();
        TAGS.iter().find(|(begin, _)| lower.starts_with(begin)).map(|(_, syntax)| (*syntax, text))
    };
    prompt.match_indices('<').filter_map(tag).collect()
}

/// Words with a weight such as `(word:1.2)` in `prompt`. A verse or a time, `(John 3:16)`, is none.
fn weighted_words(prompt: &str) -> Vec<(ForeignSyntax, &str)> {
    let weighted = |(end, _)| {
        let start = prompt[..end].rfind('(')?;
        let (words, weight) = prompt[start + 1..end].rsplit_once(':').filter(|(words, _)| !words.contains(')'))?;
        let is_weighted = words.trim_end().ends_with(|last: char| !last.is_ascii_digit()) && is_number(weight.trim());
        is_weighted.then(|| (ForeignSyntax::WordWeight, &prompt[start..=end]))
    };
    prompt.match_indices(')').filter_map(weighted).collect()
}

/// Whether `text` is a number as strengths are written.
fn is_number(text: &str) -> bool {
    text.chars().all(|character| character.is_ascii_digit() || ".-".contains(character)) && text.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_of_other_programs_is_noted_with_what_to_do() {
        let noted = |prompt: &str| foreign_syntax_notes(&[prompt]);
        let lora = "LoRAs are given with --lora FILE";
        for (prompt, wanted) in [
            ("a cat <lora:style:0.8>", vec![format!("\"<lora:style:0.8>\", read as text: {lora}:0.8 (")]),
            ("<LYCO:a b>, dog", vec![format!("\"<LYCO:a b>\", read as text: {lora} (")]),
            ("<lora:a:1><lora:b:x>", vec![format!("\"<lora:a:1>\", \"<lora:b:x>\", read as text: {lora}:1 (")]),
            ("<hypernet:h:1>", vec!["hypernetworks are not supported".to_owned()]),
            ("a (red:1.2) ((cat:0.9))", vec!["\"(red:1.2)\", \"(cat:0.9)\", read as text: weights".to_owned()]),
            ("(ä cat: 1.3) <lora:ü:-.5>", vec!["FILE:-.5 (".to_owned(), "\"(ä cat: 1.3)\"".to_owned()]),
        ] {
            let found = noted(prompt);
            assert_eq!(found.len(), wanted.len(), "{prompt}: {found:?}");
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!(found.starts_with("the prompt has") && found.contains(wanted), "{prompt}: {found}");
            }
        }
        for plain in
            ["a cat", "a < b > c", "(John 3:16)", "at (10:30)", "(one: two)", "a (cat) :1.2)", "<b>:)", "<lora:", ")("]
        {
            assert_eq!(noted(plain), Vec::<String>::new(), "{plain}");
        }
    }

    #[test]
    fn of_many_prompts_those_with_such_syntax_are_counted() {
        let prompts = ["a (cat:1.2)", "a dog", "(bird:1.1), (fish:0.5)", "(cow:2)"];
        let text = "\"(cat:1.2)\", \"(bird:1.1)\", \"(fish:0.5)\" and more, read as text";
        assert!(foreign_syntax_notes(&prompts)[0].starts_with(&format!("3 of 4 prompts have {text}")));
        assert!(foreign_syntax_notes(&prompts[..2])[0].starts_with("1 of 2 prompts has \"(cat:1.2)\", read as text"));
    }

    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Observer for Notes {
        fn note(&mut self, message: &str) {
            self.0.push(message.to_owned());
        }
    }

    /// A few cut prompts are named, many are counted, each encoder by itself.
    #[test]
    fn many_cut_prompts_are_counted() {
        let cut = |component, tokens, limit| TruncatedPrompt {
            encoder: [component, "Model"],
            prompt: "a cat".to_owned(),
            tokens,
            limit,
        };
        let mut truncated: Vec<_> = (78..97).map(|tokens| cut("text_encoder", tokens, 77)).collect();
        truncated.push(cut("text_encoder_2", 600, 512));
        let mut notes = Notes::default();
        note_truncated(&truncated, 24, &mut notes);
        assert_eq!(
            notes.0,
            [
                "text_encoder (Model): 19 of 24 prompts are longer than the 77 tokens that it takes; their ends are \
                 cut (most: 19 tokens)",
                "text_encoder_2 (Model) takes 512 tokens; the prompt \"a cat\" has 600: the last 88 are cut",
            ]
        );
    }
}
