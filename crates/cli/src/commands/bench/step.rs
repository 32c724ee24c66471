//! `clearform bench step` and `bench model`: time one evaluation of a transformer on random inputs.

use super::{median_ms, parse_grid};
use crate::args::{ModelBenchArgs, StepBenchArgs, TimingArgs};
use crate::output::Output;
use crate::sources::{open_device, open_transformer_with, parse_plan, read_options};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::Manifests;
use clearform_models::families::flux::Flux;
use clearform_models::{Family, InputSizes, random_input};
use clearform_weights::{InMemoryTensors, TensorSource};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;

/// Times a FLUX transformer with random weights.
pub fn run(args: &StepBenchArgs, output: &Output) -> anyhow::Result<()> {
    let config = config(args)?;
    let timing = &args.timing;
    let device = open_device(timing.running.device)?;
    let weights = random_weights(&config, timing.dtype.as_dtype(), &device)?;
    let model = StepModel { family: &Flux, config: &config, weights: &weights, timing, device };
    let grids = std::slice::from_ref(&args.grid);
    output.result(&model.rows(&parse_plan(&args.attention)?, grids)?.remove(0))
}

/// Times a given model at every grid with every plan.
pub fn run_model(args: &ModelBenchArgs, output: &Output) -> anyhow::Result<()> {
    let timing = &args.timing;
    let transformer = open_transformer_with(&args.model, &read_options(&args.reading)?.recorded(&args.model)?)?;
    let device = open_device(timing.running.device)?;
    let weights = InMemoryTensors::load(&transformer.source(), Some(timing.dtype.as_dtype()), &device)?;
    let family = transformer.family();
    let model = StepModel { family, config: transformer.config(), weights: &weights, timing, device };
    let plans = args.attention.iter().map(|text| parse_plan(text)).collect::<anyhow::Result<Vec<_>>>()?;
    let rows = plans.iter().map(|plan| model.rows(plan, &args.grid)).collect::<anyhow::Result<Vec<_>>>()?;
    output.result(&StepTable { rows: rows.into_iter().flatten().collect() })
}

/// FLUX.1-dev's config.json with the width, depth and head size of the arguments.
fn config(args: &StepBenchArgs) -> anyhow::Result<Value> {
    let StepBenchArgs { width, head_dim, .. } = args;
    let divides = width.checked_rem(*head_dim) == Some(0) && *width > 0;
    anyhow::ensure!(divides, "--width {width}: expected a positive multiple of --head-dim {head_dim}");
    // FLUX.1-dev's axes are 16, 56 and 56 of 128 channels: 7/16 for each image axis, rounded down to an even number.
    let axis = head_dim * 7 / 16 / 2 * 2;
    Ok(json!({
        "in_channels": 64, "out_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "num_layers": args.double, "num_single_layers": args.single, "guidance_embeds": true,
        "attention_head_dim": head_dim, "num_attention_heads": width / head_dim,
        "width": width, "axes_dims_rope": [head_dim - 2 * axis, axis, axis],
    }))
}

fn random_weights(config: &Value, dtype: DType, device: &Device) -> anyhow::Result<InMemoryTensors> {
    let expected = Manifests::embedded()?.expected(Flux.name(), config)?;
    let random = |shape: Vec<usize>| Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(dtype);
    let tensors = expected.into_iter().filter(|tensor| !tensor.optional);
    let shapes =
        tensors.filter_map(|tensor| Some((tensor.name, tensor.shape.into_iter().collect::<Option<Vec<_>>>()?)));
    let weights = shapes.map(|(name, shape)| Ok((name, random(shape)?)));
    Ok(InMemoryTensors::from_iter(weights.collect::<anyhow::Result<Vec<_>>>()?))
}

/// A transformer, and how it is timed.
struct StepModel<'a> {
    family: &'a dyn Family,
    config: &'a Value,
    weights: &'a dyn TensorSource,
    timing: &'a TimingArgs,
    device: Device,
}

impl StepModel<'_> {
    /// One row per grid.
    fn rows(&self, plan: &AttentionPlan, grids: &[String]) -> anyhow::Result<Vec<StepRow>> {
        let denoiser = self.family.build(self.config, self.weights, plan)?;
        let row = |text: &String| {
            let sizes = InputSizes {
                grid: parse_grid("--grid", text)?,
                text: self.timing.text,
                dtype: self.timing.dtype.as_dtype(),
                device: self.device.clone(),
            };
            let input = random_input(self.family, self.config, &sizes)?;
            let evaluate = || Ok(denoiser.forward(&input).map(|_| ())?);
            let median_ms = median_ms(self.timing.repeat, &self.device, evaluate)?;
            Ok(StepRow { grid: text.clone(), attention: plan.to_string(), median_ms })
        };
        grids.iter().map(row).collect()
    }
}

#[derive(Debug, Serialize)]
struct StepRow {
    grid: String,
    attention: String,
    median_ms: f64,
}

impl fmt::Display for StepRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10}  {:<12}  median {:>10.1} ms", self.grid, self.attention, self.median_ms)
    }
}

/// The result of `bench model`.
#[derive(Debug, Serialize)]
struct StepTable {
    rows: Vec<StepRow>,
}

impl fmt::Display for StepTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}
