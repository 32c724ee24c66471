//! `clearform bench step` and `bench model`: one evaluation of a whole transformer on random inputs.

use super::{median_ms, parse_extents};
use crate::args::{EvaluationArgs, ModelBenchArgs, StepBenchArgs};
use crate::output::Output;
use crate::sources::{device, open_as, plan, reading};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::Manifests;
use clearform_models::families::flux::Flux;
use clearform_models::{Family, InputSizes, random_input};
use clearform_weights::{InMemoryTensors, TensorSource};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;

pub fn run(args: &StepBenchArgs, output: &Output) -> anyhow::Result<()> {
    let config = config(args)?;
    let device = device(args.evaluation.device)?;
    let weights = random_weights(&config, args.evaluation.dtype.computed(), &device)?;
    let evaluation = &args.evaluation;
    let model = StepModel { family: &Flux, config: &config, weights: &weights, evaluation, device };
    let grids = std::slice::from_ref(&args.grid);
    output.result(&model.rows(&plan(&args.attention)?, grids)?.remove(0))
}

pub fn run_model(args: &ModelBenchArgs, output: &Output) -> anyhow::Result<()> {
    let transformer = open_as(&args.model, &reading(&args.reading)?.recorded(&args.model)?)?;
    let device = device(args.evaluation.device)?;
    let weights = InMemoryTensors::load(&transformer.source(), Some(args.evaluation.dtype.computed()), &device)?;
    let (family, config) = (transformer.family(), transformer.config());
    let model = StepModel { family, config, weights: &weights, evaluation: &args.evaluation, device };
    let plans = args.attention.iter().map(|text| plan(text)).collect::<anyhow::Result<Vec<_>>>()?;
    let rows = plans.iter().map(|plan| model.rows(plan, &args.grid)).collect::<anyhow::Result<Vec<_>>>()?;
    output.result(&StepTable { rows: rows.into_iter().flatten().collect() })
}

/// FLUX.1-dev's config.json, of other width and depth.
fn config(args: &StepBenchArgs) -> anyhow::Result<Value> {
    let (width, head_dim) = (args.width, args.head_dim);
    let divides = width.checked_rem(head_dim) == Some(0) && width > 0;
    anyhow::ensure!(divides, "--width {width}: expected heads of --head-dim {head_dim} channels, at least one");
    let axis = args.head_dim * 7 / 16 / 2 * 2;
    Ok(json!({
        "in_channels": 64, "out_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "num_layers": args.double, "num_single_layers": args.single, "guidance_embeds": true,
        "attention_head_dim": args.head_dim, "num_attention_heads": args.width / args.head_dim,
        "width": args.width, "axes_dims_rope": [args.head_dim - 2 * axis, axis, axis],
    }))
}

fn random_weights(config: &Value, dtype: DType, device: &Device) -> anyhow::Result<InMemoryTensors> {
    let expected = Manifests::embedded()?.expected(Flux.name(), config)?;
    let random = |shape: Vec<usize>| Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(dtype);
    let tensors = expected.into_iter().filter(|tensor| !tensor.optional);
    let known = tensors.filter_map(|tensor| Some((tensor.name, tensor.shape.into_iter().collect::<Option<Vec<_>>>()?)));
    let read = known.map(|(name, shape)| Ok((name, random(shape)?)));
    Ok(InMemoryTensors::from_iter(read.collect::<anyhow::Result<Vec<_>>>()?))
}

/// A transformer, and how it is evaluated.
struct StepModel<'a> {
    family: &'a dyn Family,
    config: &'a Value,
    weights: &'a dyn TensorSource,
    evaluation: &'a EvaluationArgs,
    device: Device,
}

impl StepModel<'_> {
    /// One row for each grid.
    fn rows(&self, plan: &AttentionPlan, grids: &[String]) -> anyhow::Result<Vec<StepRow>> {
        let denoiser = self.family.build(self.config, self.weights, plan)?;
        let row = |text: &String| {
            let sizes = InputSizes {
                grid: parse_extents("--grid", text)?,
                text: self.evaluation.text,
                dtype: self.evaluation.dtype.computed(),
                device: self.device.clone(),
            };
            let input = random_input(self.family, self.config, &sizes)?;
            let median_ms =
                median_ms(self.evaluation.repeat, &self.device, || Ok(denoiser.forward(&input).map(|_| ())?))?;
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

/// What was found.
#[derive(Debug, Serialize)]
struct StepTable {
    rows: Vec<StepRow>,
}

impl fmt::Display for StepTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}
