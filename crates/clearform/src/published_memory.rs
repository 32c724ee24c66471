//! [`published_memory`]: what a transformer in the shapes of a published model takes, without its file.

use crate::Result;
use crate::bench::{RandomWeights, WeightFormat};
use candle_core::DType;
use clearform_layout::{Hints, Manifests, Sidecar, detect_source};
use clearform_runtime::{EvaluationSize, MemoryOptions, MemoryPlan, OffloadMode};
use serde::Serialize;
use std::collections::BTreeMap;

/// Peak memory of generating an image with a transformer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PublishedMemory {
    /// With all weights in memory.
    pub resident: u64,
    /// With its blocks streamed from the file.
    pub streamed: u64,
}

/// What generating a square image of `side` pixels takes with a transformer in the shapes of the published model `name`,
/// such as `flux-dev`, whose weights are stored in `format` and computed with in bf16: the forecast that `generate` prints.
///
/// # Errors
/// No manifest has the sizes of such a model.
pub fn published_memory(name: &str, format: WeightFormat, side: usize) -> Result<PublishedMemory> {
    let manifests = Manifests::embedded()?;
    let published = manifests.published_model(name)?;
    let weights = RandomWeights::new(manifests.expected(&published.family, &published.config)?, format)?;
    let sidecar = Sidecar { config: Some(&published.config), metadata: &BTreeMap::new() };
    let hints = Hints { family: Some(published.family), variant: Some(published.variant), ..Hints::default() };
    let identified = detect_source(&weights, sidecar, &manifests, &hints)?;
    let image_tokens = (side / identified.pixels_per_token()).pow(2);
    let size = EvaluationSize {
        tokens: image_tokens + identified.variant.defaults.text_tokens,
        width: identified.size("width").unwrap_or(0),
        dtype: DType::BF16,
    };
    let peak = |offload| -> Result<u64> {
        let options = MemoryOptions { limit: Some(u64::MAX), offload };
        Ok(MemoryPlan::of_transformer(&weights, size, options)?.peak())
    };
    Ok(PublishedMemory { resident: peak(OffloadMode::Never)?, streamed: peak(OffloadMode::Always)? })
}
