//! How the arguments of a command become an opened, identified checkpoint and the settings it runs with.

use crate::args::{DeviceArg, DtypeArg, SourceArgs};
use crate::output::Output;
use anyhow::Context as _;
use candle_core::{DType, Device};
use clearform_attention::AttentionPlan;
use clearform_layout::{Dequantized, Hints, Identified, Manifests, detect};
use clearform_runtime::{Adapters, Components, Pipeline, PipelineOptions, Transformer};
use clearform_weights::Checkpoint;
use serde_json::Value;
use std::path::Path;

/// The built-in manifests and that of `--manifest`, and what the person said of the source.
pub fn reading(args: &SourceArgs) -> anyhow::Result<clearform_runtime::ReadOptions> {
    let embedded = Manifests::embedded()?;
    let manifests = match &args.manifest {
        Some(path) => embedded.with_file(path)?,
        None => embedded,
    };
    let config = args.config.as_deref().map(read_json).transpose()?;
    let hints = Hints { family: args.family.clone(), variant: args.variant.clone(), config };
    Ok(clearform_runtime::ReadOptions { manifests, hints, allow_unmatched: args.allow_unmatched })
}

/// How a pipeline is opened where nothing particular is asked for.
pub fn plainly(components: Option<&Path>, place: DeviceArg) -> anyhow::Result<PipelineOptions> {
    Ok(PipelineOptions {
        reading: clearform_runtime::ReadOptions::default_options()?,
        components: components.map(Path::to_owned),
        plan: None,
        dtype: None,
        device: device(place)?,
        guided_channels: None,
        adapters: Adapters::default(),
    })
}

/// Opens `model` where nothing particular is asked for.
pub fn open_plainly(model: &Path, components: Option<&Path>, place: DeviceArg) -> anyhow::Result<Pipeline> {
    Ok(Pipeline::open(model, plainly(components, place)?)?)
}

/// Opens the transformer of `model` where nothing particular is asked for.
pub fn transformer(model: &Path) -> anyhow::Result<Transformer> {
    open_as(model, &clearform_runtime::ReadOptions::default_options()?.recorded(model)?)
}

/// Opens the transformer of `original`, from which the portable model `model` was made.
pub fn original_transformer(original: &Path, model: &Path) -> anyhow::Result<Transformer> {
    open_as(original, &clearform_runtime::ReadOptions::default_options()?.of_original(original, model)?)
}

/// Opens `original`, from which the portable model `model` was made.
pub fn open_original(
    original: &Path,
    model: &Path,
    components: Option<&Path>,
    place: DeviceArg,
) -> anyhow::Result<Pipeline> {
    let reading = clearform_runtime::ReadOptions::default_options()?.of_original(original, model)?;
    Ok(Pipeline::open(original, PipelineOptions { reading, ..plainly(components, place)? })?)
}

/// Opens the transformer of `model` as `reading` says.
pub fn open_as(model: &Path, reading: &clearform_runtime::ReadOptions) -> anyhow::Result<Transformer> {
    let path = Components::new(model, None).transformer();
    Transformer::open(&path, reading).with_context(|| format!("{}", model.display()))
}

/// Opens the transformer of `source` and says what it is.
pub fn identify(source: &Path, reading: &SourceArgs) -> anyhow::Result<(Dequantized<Checkpoint>, Identified)> {
    let path = Components::new(source, None).transformer();
    let reading = self::reading(reading)?;
    let checkpoint = Dequantized::open(&path, &reading.manifests)?;
    let identified =
        detect(&checkpoint, &reading.manifests, &reading.hints).with_context(|| format!("{}", path.display()))?;
    Ok((checkpoint, identified))
}

/// Tells which of a file's states were taken and what else it holds.
pub fn tell(checkpoint: &Checkpoint, output: &Output) {
    let path = checkpoint.path().display();
    checkpoint.notes().iter().for_each(|note| output.note(format_args!("{path}: {note}")));
}

/// The plan of `--attention`: one policy in a word, or a TOML file with a plan per layer.
pub fn plan(text: &str) -> anyhow::Result<AttentionPlan> {
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "toml") {
        let content = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        return AttentionPlan::from_toml(&content).with_context(|| format!("{}", path.display()));
    }
    Ok(text.parse()?)
}

/// The device of `--device`.
pub fn device(place: DeviceArg) -> anyhow::Result<Device> {
    match place {
        DeviceArg::Cpu => Ok(Device::Cpu),
        DeviceArg::Cuda(number) => gpu(number).with_context(|| format!("--device cuda:{number}")),
    }
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> anyhow::Result<Device> {
    Ok(clearform_ops::cuda::device(number)?)
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: usize) -> anyhow::Result<Device> {
    anyhow::bail!("this build runs on the CPU alone; build it with --features cuda")
}

impl DtypeArg {
    /// The tensor library's name for it.
    pub fn computed(self) -> DType {
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
