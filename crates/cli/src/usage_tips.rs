//! What is said of flags that other programs have. clap proposes any flag whose letters are a little alike.

use clap::error::{ContextKind, ContextValue, ErrorKind};

const PROMPT: &str = "the prompt follows the model: clearform generate MODEL \"PROMPT\"";

const LORA: &str = "a LoRA's strength follows its file: --lora FILE:0.8";

/// Flags of diffusers, stable-diffusion.cpp and the web UIs, and what does the same here.
const ELSEWHERE: [(&str, &str); 19] = [
    ("--sampler", "the model's own scheduler is used; --steps sets its number of steps"),
    ("--sampling-method", "the model's own scheduler is used; --steps sets its number of steps"),
    ("--scheduler", "the model's own scheduler is used; --steps sets its number of steps"),
    ("--cfg-scale", "--guidance, or --true-cfg-scale for FLUX with a negative prompt"),
    ("--strength", "images are made from noise only; a LoRA's strength follows its file: --lora FILE:0.8"),
    ("--init-img", "images are made from noise only"),
    ("--lora-scale", LORA),
    ("--lora-strength", LORA),
    ("--prompt", PROMPT),
    ("--lora-model-dir", "--lora FILE"),
    ("-p", PROMPT),
    ("-n", "--negative-prompt PROMPT"),
    ("-m", "the model follows the command: clearform generate MODEL \"PROMPT\""),
    ("-W", "--width N"),
    ("-H", "--height N"),
    ("-s", "--seed N, or --seed random"),
    ("-b", "--batch N"),
    ("-t", "--threads N"),
    ("-i", "images are made from noise only"),
];

/// A proposal must have at least this likeness (Jaro's) to what was written.
const LIKENESS: f64 = 0.85;

/// The error without proposals that are only a little like what was written, and with what is known of other programs'
/// flags.
pub fn corrected(error: clap::Error) -> clap::Error {
    match error.kind() {
        ErrorKind::UnknownArgument => without_wrong_tips(error),
        ErrorKind::ValueValidation => with_sign(error),
        _ => error,
    }
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<String> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    }
}

/// What a number without a sign says of a negative one is that a digit is invalid.
fn with_sign(mut error: clap::Error) -> clap::Error {
    let is_negative = text(&error, ContextKind::InvalidValue)
        .is_some_and(|value| value.strip_prefix('-').is_some_and(|rest| rest.parse::<f64>().is_ok()));
    if is_negative && std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("digit")) {
        tip(&mut error, "it takes a number of 0 or more");
    }
    error
}

fn tip(error: &mut clap::Error, text: &'static str) {
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![text.into()]));
}

fn without_wrong_tips(mut error: clap::Error) -> clap::Error {
    let Some(written) = text(&error, ContextKind::InvalidArg) else { return error };
    let known = ELSEWHERE.iter().find(|(flag, _)| *flag == written);
    let proposed = text(&error, ContextKind::SuggestedArg);
    let is_alike = proposed.is_some_and(|proposed| strsim::jaro(&written, &proposed) >= LIKENESS);
    if known.is_some() || !is_alike {
        error.remove(ContextKind::SuggestedArg);
    }
    if let Some((_, instead)) = known {
        tip(&mut error, instead);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;

    fn said(arguments: &[&str]) -> String {
        let arguments = ["clearform"].iter().chain(arguments).map(Into::into);
        corrected(Cli::parse_from_arguments(arguments).unwrap_err()).to_string()
    }

    fn message(flag: &str) -> String {
        said(&["generate", "model", "a cat", flag])
    }

    #[test]
    fn flags_of_other_programs_are_explained() {
        for (flag, instead) in ELSEWHERE {
            let message = message(flag);
            assert!(message.contains(instead) && !message.contains("similar"), "{message}");
            assert!(!message.contains("as a value"), "{message}");
        }
    }

    #[test]
    fn negative_numbers_are_values() {
        let generate = ["generate", "model", "a cat", "--seed"];
        let random = said(&[&generate[..], &["-1"]].concat());
        assert!(random.contains("0 or more, or random to draw one") && !random.contains("-- -1"), "{random}");
        for arguments in [&["convert", "a", "-o", "b", "--seed", "-1"][..], &["generate", "a", "b", "--width", "-64"]] {
            let message = said(arguments);
            assert!(message.contains("a number of 0 or more") && !message.contains("-- -"), "{message}");
        }
        let guided = ["clearform", "generate", "model", "a cat", "--guidance", "-1.5"].map(Into::into);
        assert!(Cli::parse_from_arguments(guided).is_ok());
        let threads = said(&["generate", "a", "b", "--threads", "0"]);
        assert!(threads.contains("pass 1 or more, or leave it out for one per core"), "{threads}");
    }

    #[test]
    fn only_near_names_are_proposed() {
        assert!(message("--stepz").contains("'--steps'"), "{}", message("--stepz"));
        assert!(!message("--xformers").contains("similar"), "{}", message("--xformers"));
    }
}
