//! [`inspect`]: identifies a checkpoint from its headers alone.

use crate::error::WithContext as _;
use crate::observer::Observer;
use crate::sources::{note_checkpoint, read_options};
use crate::{Result, SourceOptions};
use clearform_layout::{Dequantized, Inspection, detect};
use clearform_runtime::Components;
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
    let components = components.unusable(&identified, checkpoint.source());
    Ok(Inspection::of(&identified, &checkpoint).with_unusable(components))
}
