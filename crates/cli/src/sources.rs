//! Opens what the arguments name: checkpoints, pipelines, attention plans and devices.

use crate::args::{DeviceArg, DtypeArg, SourceArgs};
use crate::output::Output;
use anyhow::Context as _;
use candle_core::{DType, Device};
use clearform_attention::AttentionPlan;
use clearform_layout::{Dequantized, Hints, Identified, Manifests, detect};
use clearform_runtime::{Adapters, Components, Pipeline, PipelineOptions, ReadOptions, TransformerCheckpoint};
use clearform_weights::Checkpoint;
use serde_json::Value;
use std::path::Path;

/// The built-in manifests with that of `--manifest`, and the hints that the arguments give.
pub fn read_options(args: &SourceArgs) -> anyhow::Result<ReadOptions> {
    let embedded = Manifests::embedded()?;
    let manifests = match &args.manifest {
        Some(path) => embedded.with_file(path)?,
        None => embedded,
    };
    let config = args.config.as_deref().map(read_json).transpose()?;
    let hints = Hints { family: args.family.clone(), variant: args.variant.clone(), config };
    Ok(ReadOptions { manifests, hints, allow_unmatched: args.allow_unmatched })
}

/// Options to open a pipeline with its own attention plan and dtype, and without adapters.
pub fn default_options(components: Option<&Path>, device: DeviceArg) -> anyhow::Result<PipelineOptions> {
    Ok(PipelineOptions {
        reading: ReadOptions::default_options()?,
        components: components.map(Path::to_owned),
        plan: None,
        dtype: None,
        device: open_device(device)?,
        guided_channels: None,
        adapters: Adapters::default(),
    })
}

/// Opens `model` with [`default_options`].
pub fn open_pipeline(model: &Path, components: Option<&Path>, device: DeviceArg) -> anyhow::Result<Pipeline> {
    Ok(Pipeline::open(model, default_options(components, device)?)?)
}

/// Opens `original`, from which the portable model `model` was made, with [`default_options`].
pub fn open_original_pipeline(
    original: &Path,
    model: &Path,
    components: Option<&Path>,
    device: DeviceArg,
) -> anyhow::Result<Pipeline> {
    let reading = ReadOptions::default_options()?.of_original(original, model)?;
    Ok(Pipeline::open(original, PipelineOptions { reading, ..default_options(components, device)? })?)
}

/// Opens the transformer of `model`, read as its record states.
pub fn open_transformer(model: &Path) -> anyhow::Result<TransformerCheckpoint> {
    open_transformer_with(model, &ReadOptions::default_options()?.recorded(model)?)
}

/// Opens the transformer of `original`, from which the portable model `model` was made.
pub fn open_original_transformer(original: &Path, model: &Path) -> anyhow::Result<TransformerCheckpoint> {
    open_transformer_with(original, &ReadOptions::default_options()?.of_original(original, model)?)
}

/// Opens the transformer of `model` with `options`.
pub fn open_transformer_with(model: &Path, options: &ReadOptions) -> anyhow::Result<TransformerCheckpoint> {
    let path = Components::new(model, None).transformer_path();
    TransformerCheckpoint::open(&path, options).with_context(|| format!("{}", model.display()))
}

/// Opens the transformer of `source` and detects its family, variant and layout.
pub fn identify(source: &Path, args: &SourceArgs) -> anyhow::Result<(Dequantized<Checkpoint>, Identified)> {
    let path = Components::new(source, None).transformer_path();
    let options = read_options(args)?;
    let checkpoint = Dequantized::open(&path, &options.manifests)?;
    let identified =
        detect(&checkpoint, &options.manifests, &options.hints).with_context(|| format!("{}", path.display()))?;
    Ok((checkpoint, identified))
}

/// Prints what was noted while the checkpoint was opened, such as which of its state dicts was read.
pub fn print_notes(checkpoint: &Checkpoint, output: &Output) {
    let path = checkpoint.path().display();
    checkpoint.notes().iter().for_each(|note| output.note(format_args!("{path}: {note}")));
}

/// The plan of `--attention`: one policy for all layers, or a TOML file with a plan per layer.
pub fn parse_plan(text: &str) -> anyhow::Result<AttentionPlan> {
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "toml") {
        let content = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        return AttentionPlan::from_toml(&content).with_context(|| format!("{}", path.display()));
    }
    Ok(text.parse()?)
}

/// Opens the device of `--device`.
///
/// # Errors
/// If a GPU is asked for and the build has no CUDA, or the GPU does not exist.
pub fn open_device(device: DeviceArg) -> anyhow::Result<Device> {
    match device {
        DeviceArg::Cpu => Ok(Device::Cpu),
        DeviceArg::Cuda(index) => open_gpu(index).with_context(|| format!("--device cuda:{index}")),
    }
}

#[cfg(feature = "cuda")]
fn open_gpu(index: usize) -> anyhow::Result<Device> {
    Ok(clearform_ops::cuda::device(index)?)
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(_: usize) -> anyhow::Result<Device> {
    anyhow::bail!("this build has no CUDA support; rebuild with --features cuda")
}

impl DtypeArg {
    /// The same dtype in candle.
    pub fn as_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}: expected JSON", path.display()))
}
