//! What is said of flags that other programs have. clap proposes any flag whose letters are a little alike.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags of diffusers, stable-diffusion.cpp and the web UIs, and what does the same here.
const ELSEWHERE: [(&str, &str); 8] = [
    ("--sampler", "the model's own scheduler is used; --steps sets its number of steps"),
    ("--sampling-method", "the model's own scheduler is used; --steps sets its number of steps"),
    ("--scheduler", "the model's own scheduler is used; --steps sets its number of steps"),
    ("--cfg-scale", "--guidance, or --true-cfg-scale for FLUX with a negative prompt"),
    ("--strength", "images are made from noise only; a LoRA's strength follows its file: --lora FILE:0.8"),
    ("--init-img", "images are made from noise only"),
    ("--prompt", "the prompt follows the model: clearform generate MODEL \"PROMPT\""),
    ("--lora-model-dir", "--lora FILE"),
];

/// A proposal must have at least this likeness (Jaro's) to what was written.
const LIKENESS: f64 = 0.85;

/// The error without proposals that are only a little like what was written, and with what is known of other programs'
/// flags.
pub fn corrected(mut error: clap::Error) -> clap::Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let text = |error: &clap::Error, kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let Some(written) = text(&error, ContextKind::InvalidArg) else { return error };
    let known = ELSEWHERE.iter().find(|(flag, _)| *flag == written);
    let proposed = text(&error, ContextKind::SuggestedArg);
    let is_alike = proposed.is_some_and(|proposed| strsim::jaro(&written, &proposed) >= LIKENESS);
    if known.is_some() || !is_alike {
        error.remove(ContextKind::SuggestedArg);
    }
    if let Some((_, instead)) = known {
        let tip = ContextValue::StyledStrs(vec![(*instead).into()]);
        error.insert(ContextKind::Suggested, tip);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser as _;

    fn message(flag: &str) -> String {
        corrected(Cli::try_parse_from(["clearform", "generate", "model", "a cat", flag]).unwrap_err()).to_string()
    }

    #[test]
    fn flags_of_other_programs_are_explained() {
        for (flag, instead) in ELSEWHERE {
            let message = message(flag);
            assert!(message.contains(instead) && !message.contains("similar"), "{message}");
        }
    }

    #[test]
    fn only_near_names_are_proposed() {
        assert!(message("--stepz").contains("'--steps'"), "{}", message("--stepz"));
        assert!(!message("--xformers").contains("similar"), "{}", message("--xformers"));
    }
}
