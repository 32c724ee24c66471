//! [`bench_step`] and [`bench_model`]: time one evaluation of a transformer on random inputs.

use super::random_weights::{RandomWeights, WeightFormat};
use super::{median_ms, parse_grid};
use crate::sources::{open_transformer_with, read_options};
use crate::{ClearformError, ComputeDevice, FloatDtype, Result, SourceOptions};
use candle_core::Device;
use clearform_attention::AttentionPlan;
use clearform_layout::Manifests;
use clearform_models::families::flux::Flux;
use clearform_models::{Architecture, InputSizes, ModelFamily as _, random_input};
use clearform_runtime::{Residency, check_dtype};
use clearform_weights::{ConvertedSource, InMemoryTensors, StreamedSource, TensorSource};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// How one evaluation on random inputs is timed.
#[derive(Debug, Clone)]
pub struct StepTiming {
    /// Text tokens, if the model takes text.
    pub text: usize,
    /// Timed runs, after one warm-up run.
    pub repeat: usize,
    /// Where it runs.
    pub device: ComputeDevice,
    /// Dtype to compute in.
    pub dtype: FloatDtype,
    /// Where the weights of its blocks are while it runs.
    pub residency: Residency,
}

/// A FLUX transformer of given sizes.
#[derive(Debug, Clone)]
pub struct StepBench {
    /// Hidden size of the transformer.
    pub width: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Double-stream blocks.
    pub double: usize,
    /// Single-stream blocks.
    pub single: usize,
    /// Image tokens, HEIGHTxWIDTH.
    pub grid: String,
    /// Attention plan.
    pub attention: AttentionPlan,
    /// How the weights are stored; `None` is in the dtype to compute in.
    pub format: Option<WeightFormat>,
    /// How it is timed.
    pub timing: StepTiming,
}

/// A model at several sizes and with several plans.
#[derive(Debug, Clone)]
pub struct ModelBench {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// How the model is read.
    pub reading: SourceOptions,
    /// Grids of image tokens, HEIGHTxWIDTH.
    pub grids: Vec<String>,
    /// Attention plans.
    pub plans: Vec<AttentionPlan>,
    /// How it is timed.
    pub timing: StepTiming,
}

/// Times a FLUX transformer with random weights.
///
/// # Errors
/// Sizes that contradict each other, or a device that does not exist.
pub fn bench_step(bench: &StepBench) -> Result<StepRow> {
    let config = config(bench)?;
    let timing = &bench.timing;
    let device = timing.device.open()?;
    check_dtype(&device, timing.dtype.into())?;
    let format = bench.format.unwrap_or(WeightFormat::Dense(timing.dtype.into()));
    let random = RandomWeights::new(Manifests::embedded()?.expected(Flux.name(), &config)?, format)?;
    let weights = held(Arc::new(random), timing, &device)?;
    let architecture = Flux.parse(&config)?;
    let model = StepModel { architecture: architecture.as_ref(), weights: weights.as_ref(), timing, device };
    let grids = std::slice::from_ref(&bench.grid);
    Ok(model.rows(&bench.attention, grids)?.remove(0))
}

/// Times a given model at every grid with every plan.
///
/// # Errors
/// The model cannot be read, or a grid or plan does not fit it.
pub fn bench_model(bench: &ModelBench) -> Result<StepTable> {
    let timing = &bench.timing;
    let reading = read_options(&bench.reading)?.recorded(&bench.model)?;
    let transformer = open_transformer_with(&bench.model, &reading)?;
    let device = timing.device.open()?;
    check_dtype(&device, timing.dtype.into())?;
    let weights = held(Arc::new(transformer.source()), timing, &device)?;
    let model = StepModel { architecture: transformer.architecture(), weights: weights.as_ref(), timing, device };
    let rows = bench.plans.iter().map(|plan| model.rows(plan, &bench.grids)).collect::<Result<Vec<_>>>()?;
    Ok(StepTable { rows: rows.into_iter().flatten().collect() })
}

/// The weights of `source` as a model holds them that is timed so. On a CPU quantised ones stay as they are.
fn held(source: Arc<dyn TensorSource>, timing: &StepTiming, device: &Device) -> Result<Box<dyn TensorSource>> {
    let dtype = Some(timing.dtype.into());
    if !device.is_cpu() {
        return Ok(Box::new(InMemoryTensors::load(source.as_ref(), dtype, device)?));
    }
    let converted = ConvertedSource::new(source, dtype);
    Ok(match timing.residency {
        Residency::InMemory => Box::new(converted),
        Residency::Streamed => Box::new(StreamedSource(Arc::new(converted))),
    })
}

/// FLUX.1-dev's config.json with the width, depth and head size of the options.
fn config(bench: &StepBench) -> Result<Value> {
    let StepBench { width, head_dim, .. } = bench;
    if width.checked_rem(*head_dim) != Some(0) || *width == 0 {
        let reason = format!("--width {width}: expected a positive multiple of --head-dim {head_dim}");
        return Err(ClearformError::BadOption(reason));
    }
    // FLUX.1-dev's axes are 16, 56 and 56 of 128 channels: 7/16 for each image axis, rounded down to an even number.
    let axis = head_dim * 7 / 16 / 2 * 2;
    Ok(json!({
        "in_channels": 64, "out_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "num_layers": bench.double, "num_single_layers": bench.single, "guidance_embeds": true,
        "attention_head_dim": head_dim, "num_attention_heads": width / head_dim,
        "width": width, "axes_dims_rope": [head_dim - 2 * axis, axis, axis],
    }))
}

/// A transformer, and how it is timed.
struct StepModel<'a> {
    architecture: &'a dyn Architecture,
    weights: &'a dyn TensorSource,
    timing: &'a StepTiming,
    device: Device,
}

impl StepModel<'_> {
    /// One row per grid.
    fn rows(&self, plan: &AttentionPlan, grids: &[String]) -> Result<Vec<StepRow>> {
        let denoiser = self.architecture.build(self.weights, plan)?;
        let row = |text: &String| {
            let sizes = InputSizes {
                grid: parse_grid("--grid", text)?,
                text: self.timing.text,
                dtype: self.timing.dtype.into(),
                device: self.device.clone(),
            };
            let input = random_input(self.architecture, &sizes)?;
            let evaluate = || Ok(denoiser.forward(&input).map(|_| ())?);
            let median_ms = median_ms(self.timing.repeat, &self.device, evaluate)?;
            Ok(StepRow { grid: text.clone(), attention: plan.to_string(), median_ms })
        };
        grids.iter().map(row).collect()
    }
}

/// One evaluation.
#[derive(Debug, Serialize)]
pub struct StepRow {
    /// Image tokens.
    pub grid: String,
    /// Attention plan.
    pub attention: String,
    /// Median, in milliseconds.
    pub median_ms: f64,
}

impl fmt::Display for StepRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10}  {:<12}  median {:>10.1} ms", self.grid, self.attention, self.median_ms)
    }
}

/// The result of [`bench_model`].
#[derive(Debug, Serialize)]
pub struct StepTable {
    /// One row per grid and plan.
    pub rows: Vec<StepRow>,
}

impl fmt::Display for StepTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}
