//! [`MemoryPlan`]: what of a pipeline is in memory at a time. It is decided and forecast before anything is loaded, so that
//! what does not fit is refused with figures instead of ending in the middle.

use crate::files::TRANSFORMER;
use crate::system_memory::available_memory;
use crate::weight_bytes::WeightBytes;
use crate::{Result, RuntimeError};
use candle_core::DType;
use clearform_layout::activation_bytes;
use clearform_weights::TensorSource;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where the weights of a model's blocks are while it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Residency {
    /// In memory.
    #[default]
    InMemory,
    /// In the file, from which each block is read when it is its turn.
    Streamed,
}

/// How much memory may be taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryOptions {
    /// Bytes, at most; `None` is what the system leaves.
    pub limit: Option<u64>,
    /// When blocks are streamed.
    pub offload: OffloadMode,
}

/// When the blocks of transformers and text encoders are read from the file again and again instead of being kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffloadMode {
    /// Never.
    Never,
    /// Where they would not fit into memory.
    #[default]
    Auto,
    /// Always.
    Always,
}

/// What a pipeline takes, stage by stage, each of which is released before the next.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// Its stages.
    pub stages: Vec<StageMemory>,
    /// Bytes that may be taken; `None` if nothing says so.
    pub limit: Option<u64>,
}

/// What a stage takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageMemory {
    /// The component that it runs.
    pub component: String,
    /// Where its weights are.
    pub residency: Residency,
    /// Bytes of weights that are in memory at a time.
    pub weights: u64,
    /// Bytes beside the weights.
    pub activations: u64,
    /// Whether its blocks can be streamed.
    pub can_stream: bool,
}

/// A component as the plan needs to know it.
pub(crate) struct PlannedComponent {
    pub name: String,
    pub weights: WeightBytes,
    pub activations: u64,
    pub streaming: Streaming,
}

/// An evaluation of a transformer, as far as its memory depends on it.
#[derive(Debug, Clone, Copy)]
pub struct EvaluationSize {
    /// Image and text tokens of all samples.
    pub tokens: usize,
    /// Channels of a token.
    pub width: usize,
    /// Dtype that is computed in.
    pub dtype: DType,
}

/// Whether the blocks of a component can be streamed, and what that costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streaming {
    Impossible,
    /// It reads all blocks again for every evaluation.
    Repeated,
    /// Every block is needed once in any case.
    Free,
}

/// Bytes of weights that are kept although they could be streamed for nothing.
const SMALL: u64 = 1 << 30;

/// The program, the images and what else stays, in bytes.
const PROGRAM: u64 = 100 << 20;

impl MemoryOptions {
    /// For each of two models that are in memory together. What the system leaves is asked for each anew.
    #[must_use]
    pub fn halved(self) -> Self {
        Self { limit: self.limit.map(|limit| limit / 2), ..self }
    }

    /// Refuses `work` that takes `bytes`, if that is more than may be taken; `advice` says what makes it less.
    ///
    /// # Errors
    /// [`RuntimeError::NotEnoughMemory`].
    pub fn check(self, work: &str, bytes: u64, advice: &str) -> Result<()> {
        let Some(limit) = self.limit.or_else(available_memory).filter(|limit| bytes > *limit) else { return Ok(()) };
        let (needed, limit, source) = (Bytes(bytes), Bytes(limit), self.source());
        Err(RuntimeError::NotEnoughMemory(format!(
            "{work} takes about {needed}, but {source} leaves {limit}; {advice}"
        )))
    }

    /// What limits memory.
    fn source(self) -> &'static str {
        if self.limit.is_some() { "--max-memory" } else { "the system" }
    }
}

impl MemoryPlan {
    /// The plan for `components` in this order.
    ///
    /// # Errors
    /// [`RuntimeError::NotEnoughMemory`] if one fits in no way.
    pub(crate) fn fit(components: Vec<PlannedComponent>, options: MemoryOptions) -> Result<Self> {
        let limit = options.limit.or_else(available_memory);
        let stages = components.into_iter().map(|component| component.stage(limit, options.offload)).collect();
        let plan = Self { stages, limit };
        match plan.stages.iter().find(|stage| limit.is_some_and(|limit| stage.bytes() > limit)) {
            None => Ok(plan),
            Some(stage) => Err(RuntimeError::NotEnoughMemory(plan.refusal(stage, options))),
        }
    }

    /// The plan for a transformer alone, whose weights are held as `source` has them.
    ///
    /// # Errors
    /// [`RuntimeError::NotEnoughMemory`] if it fits in no way.
    pub fn of_transformer(source: &dyn TensorSource, size: EvaluationSize, options: MemoryOptions) -> Result<Self> {
        Self::fit(vec![PlannedComponent::transformer(WeightBytes::of(source, None), size)], options)
    }

    /// Where the weights of `component` are.
    pub fn residency(&self, component: &str) -> Residency {
        let stage = self.stages.iter().find(|stage| stage.component == component);
        stage.map_or(Residency::InMemory, |stage| stage.residency)
    }

    /// The most bytes at a time.
    pub fn peak(&self) -> u64 {
        self.stages.iter().map(StageMemory::bytes).max().unwrap_or(PROGRAM)
    }

    fn refusal(&self, stage: &StageMemory, options: MemoryOptions) -> String {
        let StageMemory { component, weights, activations, .. } = stage;
        let [needed, program, weights, activations] = [stage.bytes(), PROGRAM, *weights, *activations].map(Bytes);
        let limit = Bytes(self.limit.unwrap_or_default());
        let source = options.source();
        let advice = stage.advice().join(", or ");
        format!(
            "{component} takes about {needed} ({weights} of weights, {activations} of activations, {program} of the \
             program), but {source} leaves {limit}; {advice}"
        )
    }
}

impl StageMemory {
    /// Bytes that the process takes in this stage.
    pub fn bytes(&self) -> u64 {
        PROGRAM + self.weights + self.activations
    }

    /// What makes it smaller.
    fn advice(&self) -> Vec<&'static str> {
        let mut advice = Vec::new();
        if self.weights + self.activations < PROGRAM {
            return vec!["allow more memory"];
        }
        if self.can_stream && self.residency == Residency::InMemory {
            advice.push("pass --offload always");
        }
        if !self.component.starts_with("text_encoder") {
            advice.push("pass a smaller --width and --height");
        }
        advice.push(match self.component.as_str() {
            "vae" => "decode with --tae FILE",
            _ => "take a file in a smaller format such as Q4_K",
        });
        advice.push("allow more memory");
        advice
    }
}

impl PlannedComponent {
    /// A transformer, which reads all of its blocks for every evaluation.
    pub fn transformer(weights: WeightBytes, size: EvaluationSize) -> Self {
        let activations = activation_bytes(size.tokens, size.width, size.dtype.size_in_bytes());
        Self { name: TRANSFORMER.to_owned(), weights, activations, streaming: Streaming::Repeated }
    }

    fn stage(self, limit: Option<u64>, offload: OffloadMode) -> StageMemory {
        let Self { name, weights, activations, streaming } = self;
        let fits = limit.is_none_or(|limit| PROGRAM + weights.total + activations <= limit);
        let streams = match (streaming, offload) {
            (Streaming::Impossible, _) | (_, OffloadMode::Never) => false,
            (Streaming::Repeated, OffloadMode::Auto) => !fits,
            (Streaming::Free, OffloadMode::Auto) => !fits || weights.total > SMALL,
            (_, OffloadMode::Always) => true,
        };
        let residency = if streams { Residency::Streamed } else { Residency::InMemory };
        let weights = if streams { weights.streamed() } else { weights.total };
        StageMemory { component: name, residency, weights, activations, can_stream: streaming != Streaming::Impossible }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages = self.stages.iter().map(|stage| {
            let streamed = if stage.residency == Residency::Streamed { ", its blocks streamed" } else { "" };
            format!("{} {}{streamed}", stage.component, Bytes(stage.bytes()))
        });
        write!(f, "about {} of memory at most: {}", Bytes(self.peak()), stages.collect::<Vec<_>>().join("; "))
    }
}

/// A number of bytes, in words.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 as f64 {
            bytes if bytes >= 1e9 => write!(f, "{:.1} GB", bytes / 1e9),
            bytes => write!(f, "{:.0} MB", bytes / 1e6),
        }
    }
}

impl FromStr for OffloadMode {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            _ => Err("expected never, auto or always".to_owned()),
        }
    }
}

impl fmt::Display for OffloadMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::Auto => "auto",
            Self::Always => "always",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(activations: u64) -> PlannedComponent {
        let weights = WeightBytes { total: 10 << 30, largest_block: 1 << 30, outside: 2 << 30 };
        PlannedComponent { name: "transformer".to_owned(), weights, activations, streaming: Streaming::Repeated }
    }

    fn plan(activations: u64, limit: u64, offload: OffloadMode) -> Result<MemoryPlan> {
        MemoryPlan::fit(vec![component(activations)], MemoryOptions { limit: Some(limit << 30), offload })
    }

    #[test]
    fn blocks_are_streamed_where_they_do_not_fit() {
        let residency = |limit, offload| plan(1 << 30, limit, offload).unwrap().residency("transformer");
        assert_eq!(residency(12, OffloadMode::Auto), Residency::InMemory);
        assert_eq!(residency(11, OffloadMode::Auto), Residency::Streamed);
        assert_eq!(residency(12, OffloadMode::Always), Residency::Streamed);
        assert_eq!(residency(12, OffloadMode::Never), Residency::InMemory);
        assert_eq!(plan(1 << 30, 12, OffloadMode::Always).unwrap().peak(), PROGRAM + (5 << 30));
        let free = |limit: u64, offload| {
            let encoder = PlannedComponent { streaming: Streaming::Free, ..component(0) };
            MemoryPlan::fit(vec![encoder], MemoryOptions { limit: Some(limit << 30), offload }).unwrap().stages[0]
                .residency
        };
        assert_eq!(free(50, OffloadMode::Auto), Residency::Streamed);
        assert_eq!(free(50, OffloadMode::Never), Residency::InMemory);
    }

    #[test]
    fn what_fits_in_no_way_is_refused_with_figures() {
        let message = |error: RuntimeError| error.to_string();
        let said = message(plan(8 << 30, 11, OffloadMode::Auto).unwrap_err());
        assert!(
            said.contains(
                "transformer takes about 13.0 GB (4.3 GB of weights, 8.6 GB of activations, 105 MB of the program)"
            ),
            "{said}"
        );
        assert!(said.contains("--max-memory leaves 11.8 GB") && !said.contains("--offload"), "{said}");
        let said = message(plan(1 << 30, 11, OffloadMode::Never).unwrap_err());
        assert!(said.contains("; pass --offload always, or pass a smaller"), "{said}");
    }
}
