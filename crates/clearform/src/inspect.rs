//! [`inspect`]: identifies a checkpoint from its headers alone.

use crate::error::WithContext as _;
use crate::forecast::{TrainingBatch, training_memory};
use crate::observer::Observer;
use crate::recipe::{ModelSize, Recipe};
use crate::sources::{linear_plan, note_checkpoint, read_options};
use crate::{Result, SourceOptions};
use clearform_layout::{
    Dequantized, DistillationEstimate, Identified, Inspection, PipelineScale, UnusableComponent, detect,
};
use clearform_models::GuidanceKind;
use clearform_models::vae::autoencoder;
use clearform_runtime::{Components, ReadOptions};
use clearform_weights::{TensorInfo, TensorSource as _};
use std::collections::BTreeMap;
use std::path::Path;

/// Identifies the transformer of `source`, a diffusers folder, single file or portable model, and says what became of
/// each tensor and what the model costs to run, and which of its components cannot be used. Reads headers only.
///
/// # Errors
/// A file is damaged, or of no known family.
///
/// # Example
/// ```no_run
/// use clearform::{SourceOptions, inspect};
///
/// let inspection = inspect("flux1-dev.safetensors".as_ref(), &SourceOptions::default(), &mut ())?;
/// println!("{inspection}");
/// assert!(inspection.is_complete(), "{:?}", inspection.problems());
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn inspect(source: &Path, reading: &SourceOptions, observer: &mut dyn Observer) -> Result<Inspection> {
    let components = Components::new(source, None);
    let path = components.transformer_path();
    let options = read_options(reading)?.recorded(source)?;
    let checkpoint = Dequantized::open(&path, &options.manifests)?;
    let mut identified = detect(&checkpoint, &options.manifests, &options.hints).context(path.display())?;
    identified.notes.extend(options.notes.iter().cloned());
    note_checkpoint(checkpoint.source(), observer);
    let mut sizes = BTreeMap::new();
    let mut unusable = Vec::new();
    for (name, bytes) in components.weight_bytes(&identified, checkpoint.source()) {
        match bytes {
            Ok(bytes) => drop(sizes.insert(name, bytes)),
            Err(reason) => unusable.push(UnusableComponent { name, reason }),
        }
    }
    unusable.extend(refused_config(&identified, &options));
    for (name, problem) in components.problems(&identified) {
        if unusable.iter().all(|known: &UnusableComponent| known.name != name) {
            unusable.push(UnusableComponent { name, reason: problem.to_string() });
        }
    }
    let inspection = Inspection::of(&identified, &checkpoint)
        .in_pipeline(&identified, pipeline_scale(&components, &identified), sizes)
        .with_unusable(unusable);
    Ok(Inspection {
        takes_guidance: takes_guidance(&identified, &options),
        attention: linear_plan(source)?.map(|plan| plan.to_string()),
        distillation: distillation(&inspection, &identified, &identified.canonical(&checkpoint).tensors()),
        ..inspection
    })
}

/// The transformer, if its family takes no model of these sizes.
fn refused_config(identified: &Identified, options: &ReadOptions) -> Option<UnusableComponent> {
    let refused = options.families.get(&identified.family)?.parse(&identified.config).err()?;
    Some(UnusableComponent { name: "transformer".to_owned(), reason: refused.to_string() })
}

/// Whether a guidance scale acts on the model; so it is taken to be for one that cannot be run.
fn takes_guidance(identified: &Identified, options: &ReadOptions) -> bool {
    let family = options.families.get(&identified.family);
    let Some(Ok(architecture)) = family.map(|family| family.parse(&identified.config)) else { return true };
    let spec = architecture.pipeline_spec();
    spec.guidance_kind() != GuidanceKind::Embedded || spec.embeds_guidance().unwrap_or(true)
}

/// What a distillation of the model takes as `convert` does it by default, on samples of the size of its training.
fn distillation(
    inspection: &Inspection,
    identified: &Identified,
    tensors: &[TensorInfo],
) -> Option<DistillationEstimate> {
    let native = inspection.estimates.first()?;
    let model =
        ModelSize { text_tokens: native.text_tokens, ..ModelSize::new(identified, inspection.parameters as usize) };
    let batch = Recipe::for_model(model).batch;
    let keeps_activations = model.is_small();
    let memory = TrainingBatch { model, samples: batch, image_tokens: native.image_tokens, keeps_activations };
    let memory_bytes = training_memory(identified, tensors, memory) as u64;
    Some(DistillationEstimate { memory_bytes, batch, side_pixels: native.side_pixels })
}

/// By how much the VAE reduces an image, the side in pixels of the images that it was trained on, and the length of the
/// longest prompt, as far as the configs of VAE and tokenizers say so.
pub(crate) fn pipeline_scale(components: &Components, identified: &Identified) -> PipelineScale {
    /// By how much the VAE of a family's published models reduces an image.
    const USUAL_DOWNSCALE: usize = 8;
    let usual = PipelineScale::usual(identified);
    let text_tokens = usual.text_tokens.min(longest_prompt(components, identified).unwrap_or(usize::MAX));
    let has_vae = identified.all_components().any(|name| name == "vae");
    let config = has_vae.then(|| components.json("vae", "config.json").ok()).flatten();
    let vae = config.and_then(|config| autoencoder(&config).ok());
    let with_vae = vae.map_or(usual, |vae| PipelineScale {
        native_side: vae.sample_size(),
        pixels_per_token: (usual.pixels_per_token * vae.downscale() / USUAL_DOWNSCALE).max(1),
        ..usual
    });
    PipelineScale { text_tokens, ..with_vae }
}

/// The most tokens that any tokenizer of the pipeline allows; `None` if one of them does not say.
fn longest_prompt(components: &Components, identified: &Identified) -> Option<usize> {
    let tokenizers = identified.all_components().filter(|name| name.starts_with("tokenizer"));
    let length = |name: &String| components.json(name, "tokenizer_config.json").ok()?["model_max_length"].as_u64();
    let lengths = tokenizers.map(length).collect::<Option<Vec<_>>>()?;
    lengths.into_iter().max().map(|tokens| tokens as usize)
}
