//! [`Prompt`]: what to generate, and [`GuidanceKind`]: how a guidance scale acts on it.

use crate::{ModelError, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// What to generate: a text prompt or a class. Serialised as a string or a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// A class label, from 0.
    Class(u32),
    /// A text prompt.
    Text(String),
}

/// How the guidance scale of a family acts.
#[derive(Debug, Clone, PartialEq)]
pub enum GuidanceKind {
    /// The transformer embeds it (guidance distillation, FLUX.1-dev) or ignores it (FLUX.1-schnell).
    Embedded,
    /// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): extrapolates from an unconditional prediction.
    ClassifierFree {
        /// Prompt of the unconditional prediction, unless the user passes a negative prompt.
        unconditional: Prompt,
        /// Number of guided channels, counted from the first; `None` guides all.
        channels: Option<usize>,
    },
}

impl GuidanceKind {
    /// Whether `scale` needs an unconditional prediction: `do_classifier_free_guidance` of diffusers' pipelines, which
    /// is true above 1.
    pub fn guides(&self, scale: f64) -> bool {
        matches!(self, Self::ClassifierFree { .. }) && scale > 1.0
    }

    /// Replaces the number of guided channels, if `guided` is given. [`Self::Embedded`] has none.
    #[must_use]
    pub fn with_channels(self, guided: Option<usize>) -> Self {
        match self {
            Self::Embedded => Self::Embedded,
            Self::ClassifierFree { unconditional, channels } => {
                Self::ClassifierFree { unconditional, channels: guided.or(channels) }
            }
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

/// The texts of prompts for a text-to-image model.
pub(crate) fn texts(prompts: &[Prompt]) -> Result<Vec<String>> {
    let prompt = |prompt: &Prompt| match prompt {
        Prompt::Text(prompt) => Ok(prompt.clone()),
        Prompt::Class(_) => {
            Err(ModelError::bad_input("class", "this model is conditioned on text; pass a prompt instead"))
        }
    };
    prompts.iter().map(prompt).collect()
}

/// The labels of prompts for a class-conditional model of `classes` classes. Label `classes` means no class
/// (unconditional).
///
/// # Shapes
/// The result is (prompts) in u32.
pub(crate) fn classes(prompts: &[Prompt], classes: usize, device: &Device) -> Result<Tensor> {
    let last = classes.saturating_sub(1);
    let label = |prompt: &Prompt| match prompt {
        Prompt::Class(class) if (*class as usize) <= classes => Ok(*class),
        Prompt::Class(class) => Err(ModelError::bad_input("class", format!("expected 0 to {last}, found {class}"))),
        Prompt::Text(prompt) => {
            let reason = format!(
                "this model is class-conditional and takes no text such as {prompt:?}; pass --class 0 to {last}"
            );
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
    fn prompts_of_the_other_kind_are_refused() {
        let class = Prompt::Class(3);
        let prompt = Prompt::Text("a cat".to_owned());
        let labels = classes(&[class.clone(), Prompt::Class(10)], 10, &Device::Cpu).unwrap();
        assert_eq!(labels.to_vec1::<u32>().unwrap(), [3, 10]);
        assert_eq!(texts(std::slice::from_ref(&prompt)).unwrap(), ["a cat"]);
        let message = |error: ModelError| error.to_string();
        assert!(message(texts(&[class]).unwrap_err()).contains("this model is conditioned on text"));
        assert!(message(classes(&[prompt], 10, &Device::Cpu).unwrap_err()).contains("pass --class 0 to 9"));
        let beyond = classes(&[Prompt::Class(11)], 10, &Device::Cpu).unwrap_err();
        assert!(message(beyond).contains("expected 0 to 9, found 11"));
    }

    #[test]
    fn prompts_are_serialised_as_numbers_and_strings() {
        let text = r#"[7,"a cat"]"#;
        let prompts: Vec<Prompt> = serde_json::from_str(text).unwrap();
        assert_eq!(prompts, [Prompt::Class(7), Prompt::Text("a cat".to_owned())]);
        assert_eq!(serde_json::to_string(&prompts).unwrap(), text);
    }
}
