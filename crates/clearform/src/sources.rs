//! Opens what options name: checkpoints, pipelines and attention plans.

use crate::error::WithContext as _;
use crate::observer::{Observer, note};
use crate::{ClearformError, ComputeDevice, Result, SourceOptions};
use clearform_attention::AttentionPlan;
use clearform_layout::{Hints, Manifests};
use clearform_portable_model::recorded_plan;
use clearform_runtime::{
    ComponentFiles, Components, MemoryOptions, Pipeline, PipelineOptions, ReadOptions, TransformerCheckpoint,
};
use clearform_weights::{Checkpoint, read_file, read_json};
use serde_json::{Map, Value};
use std::path::Path;

/// The built-in manifests with that of the options, and the hints that they give.
pub(crate) fn read_options(options: &SourceOptions) -> Result<ReadOptions> {
    let embedded = Manifests::embedded()?;
    let manifests = match &options.manifest {
        Some(path) => embedded.with_file(path)?,
        None => embedded,
    };
    let config = options.config.as_deref().map(read_json::<Map<String, Value>>).transpose()?.map(Value::Object);
    let hints = Hints { family: options.family.clone(), variant: options.variant.clone(), config, ..Hints::default() };
    let SourceOptions { allow_unmatched, families, .. } = *options;
    Ok(ReadOptions { manifests, hints, allow_unmatched, families, notes: Vec::new() })
}

/// Where the components come from that a model lacks.
#[derive(Clone, Copy)]
pub(crate) struct ExtraComponents<'a> {
    /// A diffusers folder.
    pub folder: Option<&'a Path>,
    /// Files of one component each.
    pub files: &'a ComponentFiles,
}

impl ExtraComponents<'_> {
    /// The components of `model` with these.
    pub fn of(self, model: &Path) -> Components {
        Components::new(model, self.folder).with_files(self.files)
    }
}

/// What pipelines are opened with.
#[derive(Clone, Copy)]
pub(crate) struct Opening<'a> {
    /// Components that the model lacks.
    pub components: ExtraComponents<'a>,
    /// Where it runs.
    pub device: ComputeDevice,
    /// How much memory it may take.
    pub memory: MemoryOptions,
}

/// Options to open a pipeline with its own attention plan and dtype, and without adapters.
pub(crate) fn default_options(opening: Opening) -> Result<PipelineOptions> {
    Ok(PipelineOptions {
        components: opening.components.folder.map(Path::to_owned),
        component_files: opening.components.files.clone(),
        device: opening.device.open()?,
        memory: opening.memory,
        ..PipelineOptions::default_options()?
    })
}

/// Opens `model` with [`default_options`].
pub(crate) fn open_pipeline(model: &Path, opening: Opening) -> Result<Pipeline> {
    Ok(Pipeline::open(model, default_options(opening)?)?)
}

/// Opens `original`, from which the portable model `model` was made, with [`default_options`].
pub(crate) fn open_original_pipeline(original: &Path, model: &Path, opening: Opening) -> Result<Pipeline> {
    let reading = ReadOptions::default_options()?.of_original(original, model)?;
    Ok(Pipeline::open(original, PipelineOptions { reading, ..default_options(opening)? })?)
}

/// Opens the transformer of `model`, read as its record states.
pub(crate) fn open_transformer(model: &Path) -> Result<TransformerCheckpoint> {
    open_transformer_with(model, &ReadOptions::default_options()?.recorded(model)?)
}

/// Opens the transformer of `original`, from which the portable model `model` was made.
pub(crate) fn open_original_transformer(original: &Path, model: &Path) -> Result<TransformerCheckpoint> {
    open_transformer_with(original, &ReadOptions::default_options()?.of_original(original, model)?)
}

/// Opens the transformer of `model` with `options`.
pub(crate) fn open_transformer_with(model: &Path, options: &ReadOptions) -> Result<TransformerCheckpoint> {
    let path = Components::new(model, None).transformer_path();
    Ok(TransformerCheckpoint::open(&path, options)?)
}

/// The plan that the model at `path` records, if it is a linear model.
pub fn linear_plan(path: &Path) -> Result<Option<AttentionPlan>> {
    Ok(recorded_plan(path)?.filter(|plan| *plan != AttentionPlan::full()))
}

/// Passes on what was noted while the checkpoint was opened, such as which of its state dicts was read.
pub(crate) fn note_checkpoint(checkpoint: &Checkpoint, observer: &mut dyn Observer) {
    let path = checkpoint.path().display();
    checkpoint.notes().iter().for_each(|text| note(observer, format_args!("{path}: {text}")));
}

/// A plan as users write it: one policy for all layers, `full` or `clear:r=R[,d=D]`, or the path of a TOML file with a
/// plan per layer.
///
/// # Errors
/// The file cannot be read, or it or the text is no plan.
pub fn parse_plan(text: &str) -> Result<AttentionPlan> {
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "toml") {
        let content = read_text(path)?;
        return AttentionPlan::from_toml(&content).context(path.display());
    }
    Ok(text.parse()?)
}

/// The text of a file.
///
/// # Errors
/// It cannot be read, is no regular file, or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = read_file(path).context(path.display())?;
    String::from_utf8(bytes).map_err(|_| {
        ClearformError::bad_option(format!("{}: expected a text file in UTF-8; save it as such", path.display()))
    })
}
