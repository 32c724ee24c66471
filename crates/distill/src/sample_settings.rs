//! [`SampleSettings`]: what a sample set contains and how it is generated.

use clearform_models::Prompt;
use serde::{Deserialize, Serialize};

/// What a set contains and how it is generated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleSettings {
    /// The prompts; sample n has prompt n modulo their count.
    pub prompts: Vec<Prompt>,
    /// Samples in all.
    pub count: usize,
    /// Samples that are generated together and share a file.
    pub batch: usize,
    /// Width and height in pixels.
    pub size: [usize; 2],
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale, for models that have one.
    pub guidance: Option<f64>,
    /// Classifier-free guidance, for models that use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier_free: Option<ClassifierFree>,
    /// Seed of sample 0; sample n has `seed + n`.
    pub seed: u64,
}

/// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): two evaluations a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierFree {
    /// Guidance scale; 1 is the conditional prediction alone.
    pub scale: f64,
    /// The unconditional (negative) prompt.
    #[serde(rename = "without")]
    pub unconditional: Prompt,
    /// How many channels are guided, counted from the first; `None` guides all.
    pub channels: Option<usize>,
}
