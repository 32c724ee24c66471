//! [`inspect`]: identifies a checkpoint from its headers alone.

use crate::error::WithContext as _;
use crate::observer::Observer;
use crate::sources::{note_checkpoint, read_options};
use crate::{Result, SourceOptions};
use clearform_layout::{Dequantized, Identified, Inspection, PipelineScale, detect};
use clearform_models::vae::autoencoder;
use clearform_runtime::Components;
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
    let options = read_options(reading)?;
    let checkpoint = Dequantized::open(&path, &options.manifests)?;
    let identified = detect(&checkpoint, &options.manifests, &options.hints).context(path.display())?;
    note_checkpoint(checkpoint.source(), observer);
    let sizes = identified
        .all_components()
        .filter_map(|name| Some((name.clone(), weight_bytes(&components.folder(name).ok()?))));
    let sizes = sizes.filter(|(_, bytes)| *bytes > 0).collect();
    let inspection = Inspection::of(&identified, &checkpoint)
        .in_pipeline(&identified, pipeline_scale(&components, &identified), sizes)
        .with_unusable(components.unusable(&identified, checkpoint.source()));
    Ok(inspection)
}

/// Bytes of the files of weights in `folder`. Where there are several forms of one file, the largest counts.
fn weight_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().filter_map(|file| file.ok());
    let mut bytes = BTreeMap::<String, u64>::new();
    for file in files {
        let path = file.path();
        let form = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if ["safetensors", "bin", "pt", "gguf"].contains(&form.as_str()) {
            let size = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
            *bytes.entry(form).or_default() += size;
        }
    }
    bytes.into_values().max().unwrap_or(0)
}

/// How much the VAE reduces an image, and the side in pixels of the images that it was trained on, if there is one
/// whose config can be read.
pub(crate) fn pipeline_scale(components: &Components, identified: &Identified) -> PipelineScale {
    /// By how much the VAE of a family's published models reduces an image.
    const USUAL_DOWNSCALE: usize = 8;
    let usual = PipelineScale::usual(identified);
    let vae = components.json("vae", "config.json").ok().and_then(|config| autoencoder(&config).ok());
    vae.map_or(usual, |vae| PipelineScale {
        native_side: vae.sample_size(),
        pixels_per_token: (usual.pixels_per_token * vae.downscale() / USUAL_DOWNSCALE).max(1),
    })
}
