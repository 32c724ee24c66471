//! Extracts distilled attention to a patch, and applies patches to checkpoints. For `patch` and `transfer`.

use crate::args::SourceArgs;
use crate::sources::{open_original_transformer, open_transformer, open_transformer_with, read_options};
use clearform_convert::{AttentionPatch, ConversionPlan, ConversionReport, PatchMode, SourceHashes};
use clearform_portable_model::{CopyMode, Overwrite, PortableModel, StagingDir};
use clearform_runtime::{Components, TransformerCheckpoint};
use clearform_weights::TensorSource;
use std::path::Path;

/// Writes the distilled attention of `model`, made from `base`, to `path`. Returns the number of tensors.
///
/// # Errors
/// If a model cannot be read, or nothing was distilled.
pub fn extract(model: &Path, base: &Path, path: &Path) -> anyhow::Result<usize> {
    let record = PortableModel::open(model)?.record().clone();
    let student = open_transformer(model)?;
    let base = open_original_transformer(base, model)?;
    Ok(AttentionPatch::extract(&student.source(), &base.source(), &record.family, &record.plan()?, path)?)
}

/// A patch to be applied to a checkpoint.
pub struct PatchApplication<'a> {
    /// The patch.
    pub patch: &'a AttentionPatch,
    /// The checkpoint.
    pub checkpoint: &'a Path,
    /// The portable model to write.
    pub output: &'a Path,
    /// How the patch is applied.
    pub mode: PatchMode,
    /// The teacher of the patch, for [`PatchMode::Shift`].
    pub base: Option<&'a Path>,
    /// Whether an existing output is replaced.
    pub overwrite: Overwrite,
}

impl PatchApplication<'_> {
    /// Writes the patched model.
    ///
    /// # Errors
    /// If the patch does not fit the checkpoint, a model cannot be read, or the output cannot be written.
    pub fn write(&self) -> anyhow::Result<ConversionReport> {
        let Self { patch, checkpoint, output, mode, base, overwrite } = *self;
        let base = base.map(open_transformer).transpose()?;
        let base = base.as_ref().map(TransformerCheckpoint::source);
        let base = base.as_ref().map(|base| base as &dyn TensorSource);
        let reading = SourceArgs { family: patch.family().map(str::to_owned), ..SourceArgs::default() };
        let options = read_options(&reading)?;
        let transformer = open_transformer_with(checkpoint, &options)?;
        let source = transformer.source();
        let patched = patch.apply_to(&source, mode, base)?;
        let components = Components::new(checkpoint, None).with_embedded(&transformer, &options)?;
        let folders = checkpoint.is_dir().then(|| checkpoint.to_owned()).into_iter().collect();
        let conversion = ConversionPlan::new(transformer.identified(), patch.plan().clone())
            .with_components(folders, CopyMode::Copy)
            .with_component_data(components.open_embedded()?);
        let hashes = SourceHashes::start(transformer.checkpoint());
        let mut staging = StagingDir::begin(output, overwrite)?;
        let report = conversion.apply(&patched, transformer.load_report(), &mut staging, &mut |_, _| ())?;
        staging.finish(conversion.record(hashes.wait()?)?)?;
        Ok(report)
    }
}
