//! [`Prompt`]: what a picture shall be of, and [`GuidanceKind`]: how strongly. They know no family.

use crate::{ModelError, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// What a picture shall be of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// A class by its number.
    Class(u32),
    /// A prompt.
    Text(String),
}

/// How a family's guidance scale acts.
#[derive(Debug, Clone, PartialEq)]
pub enum GuidanceKind {
    /// It is an input of the transformer, if that takes one at all.
    Embedded,
    /// A second evaluation is left behind by the scale (classifier-free guidance; Ho and Salimans, arXiv 2207.12598).
    ClassifierFree {
        /// What the second evaluation is of, where nobody says what to stay away from.
        without: Prompt,
        /// Channels that are guided, from the first; all without it.
        channels: Option<usize>,
    },
}

impl GuidanceKind {
    /// Whether a guidance scale leads away from a second evaluation: above 1, as in diffusers' pipelines.
    pub fn guides(&self, scale: f64) -> bool {
        matches!(self, Self::ClassifierFree { .. }) && scale > 1.0
    }

    /// The same over the first `channels` alone, if any are said.
    #[must_use]
    pub fn over_channels(self, said: Option<usize>) -> Self {
        match self {
            Self::Embedded => Self::Embedded,
            Self::ClassifierFree { without, channels } => Self::ClassifierFree { without, channels: said.or(channels) },
        }
    }
}

impl std::fmt::Display for Prompt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Class(class) => write!(f, "class {class}"),
            Self::Text(prompt) => prompt.fmt(f),
        }
    }
}

/// The prompts of a family that draws prompts.
pub(crate) fn texts(prompts: &[Prompt]) -> Result<Vec<String>> {
    let prompt = |prompt: &Prompt| match prompt {
        Prompt::Text(prompt) => Ok(prompt.clone()),
        Prompt::Class(_) => Err(ModelError::bad_input("class", "this model draws prompts; give one in its place")),
    };
    prompts.iter().map(prompt).collect()
}

/// The labels of a family that draws `classes` classes; the number after the last stands for none of them.
///
/// # Shapes
/// The result is (subjects).
pub(crate) fn classes(prompts: &[Prompt], classes: usize, device: &Device) -> Result<Tensor> {
    let last = classes.saturating_sub(1);
    let label = |prompt: &Prompt| match prompt {
        Prompt::Class(class) if (*class as usize) <= classes => Ok(*class),
        Prompt::Class(class) => Err(ModelError::bad_input("class", format!("expected 0 to {last}, found {class}"))),
        Prompt::Text(prompt) => {
            let reason = format!("this model draws classes, not prompts such as {prompt:?}; give --class 0 to {last}");
            Err(ModelError::bad_input("prompt", reason))
        }
    };
    let labels = prompts.iter().map(label).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::new(labels, device)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_family_says_what_it_draws() {
        let (class, prompt) = (Prompt::Class(3), Prompt::Text("a cat".to_owned()));
        let labels = classes(&[class.clone(), Prompt::Class(10)], 10, &Device::Cpu).unwrap();
        assert_eq!(labels.to_vec1::<u32>().unwrap(), [3, 10]);
        assert_eq!(texts(std::slice::from_ref(&prompt)).unwrap(), ["a cat"]);
        let message = |error: ModelError| error.to_string();
        assert!(message(texts(&[class]).unwrap_err()).contains("this model draws prompts"));
        assert!(message(classes(&[prompt], 10, &Device::Cpu).unwrap_err()).contains("give --class 0 to 9"));
        let beyond = classes(&[Prompt::Class(11)], 10, &Device::Cpu).unwrap_err();
        assert!(message(beyond).contains("expected 0 to 9, found 11"));
    }

    #[test]
    fn subjects_are_written_as_numbers_and_texts() {
        let text = r#"[7,"a cat"]"#;
        let prompts: Vec<Prompt> = serde_json::from_str(text).unwrap();
        assert_eq!(prompts, [Prompt::Class(7), Prompt::Text("a cat".to_owned())]);
        assert_eq!(serde_json::to_string(&prompts).unwrap(), text);
    }
}
