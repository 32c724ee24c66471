//! `clearform bench step` and `bench model`: one evaluation of a whole transformer on random inputs.

use super::{median_ms, parse_grid};
use crate::args::{Evaluation, ModelBench, StepBench};
use crate::opening::{device, plan, reading};
use crate::output::Output;
use candle_core::{DType, Device, Tensor};
use clearform_attention::{AttentionPlan, TokenGrid};
use clearform_layout::Manifests;
use clearform_models::Family;
use clearform_models::families::flux::Flux;
use clearform_runtime::{Components, Transformer};
use clearform_weights::{Resident, TensorSource};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;

pub fn run(args: &StepBench, output: &Output) -> anyhow::Result<()> {
    let config = config(args);
    let device = device(args.evaluation.device)?;
    let weights = random_weights(&config, args.evaluation.dtype.computed(), &device)?;
    let evaluation = &args.evaluation;
    let subject = Subject { family: &Flux, config: &config, weights: &weights, evaluation, device };
    let grids = std::slice::from_ref(&args.grid);
    output.result(&subject.rows(&plan(&args.attention)?, grids)?.remove(0))
}

pub fn run_model(args: &ModelBench, output: &Output) -> anyhow::Result<()> {
    let path = Components::new(&args.model, None).transformer();
    let transformer = Transformer::open(&path, &reading(&args.reading)?)?;
    let device = device(args.evaluation.device)?;
    let weights = Resident::load(&transformer.source(), Some(args.evaluation.dtype.computed()), &device)?;
    let (family, config) = (transformer.family(), transformer.config());
    let subject = Subject { family, config, weights: &weights, evaluation: &args.evaluation, device };
    let plans = args.attention.iter().map(|text| plan(text)).collect::<anyhow::Result<Vec<_>>>()?;
    let rows = plans.iter().map(|plan| subject.rows(plan, &args.grid)).collect::<anyhow::Result<Vec<_>>>()?;
    output.result(&Table { rows: rows.into_iter().flatten().collect() })
}

/// FLUX.1-dev's config.json, of other width and depth.
fn config(args: &StepBench) -> Value {
    let axis = args.head_dim * 7 / 16 / 2 * 2;
    json!({
        "in_channels": 64, "out_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "num_layers": args.double, "num_single_layers": args.single, "guidance_embeds": true,
        "attention_head_dim": args.head_dim, "num_attention_heads": args.width / args.head_dim,
        "width": args.width, "axes_dims_rope": [args.head_dim - 2 * axis, axis, axis],
    })
}

fn random_weights(config: &Value, dtype: DType, device: &Device) -> anyhow::Result<Resident> {
    let expected = Manifests::embedded()?.expected(Flux.name(), config)?;
    let random = |shape: Vec<usize>| Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(dtype);
    let tensors = expected.into_iter().filter(|tensor| !tensor.optional);
    let known = tensors.filter_map(|tensor| Some((tensor.name, tensor.shape.into_iter().collect::<Option<Vec<_>>>()?)));
    let read = known.map(|(name, shape)| Ok((name, random(shape)?)));
    Ok(Resident::from_iter(read.collect::<anyhow::Result<Vec<_>>>()?))
}

/// A transformer, and how it is evaluated.
struct Subject<'a> {
    family: &'a dyn Family,
    config: &'a Value,
    weights: &'a dyn TensorSource,
    evaluation: &'a Evaluation,
    device: Device,
}

impl Subject<'_> {
    /// One row for each grid.
    fn rows(&self, plan: &AttentionPlan, grids: &[String]) -> anyhow::Result<Vec<Row>> {
        let denoiser = self.family.build(self.config, self.weights, plan)?;
        let row = |text: &String| {
            let input = self.family.input(self.inputs(parse_grid(text)?)?)?;
            let median_ms =
                median_ms(self.evaluation.repeat, &self.device, || Ok(denoiser.forward(&input).map(|_| ())?))?;
            Ok(Row { grid: text.clone(), attention: plan.to_string(), median_ms })
        };
        grids.iter().map(row).collect()
    }

    /// Random inputs of FLUX's transformer, by name.
    fn inputs(&self, grid: TokenGrid) -> anyhow::Result<BTreeMap<String, Tensor>> {
        let (dtype, device) = (self.evaluation.dtype.computed(), &self.device);
        let size = |key: &str| self.config[key].as_u64().unwrap_or(0) as usize;
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype);
        let ids = (0..grid.tokens()).flat_map(|token| [0, token / grid.width, token % grid.width]);
        let ids: Vec<f32> = ids.map(|id| id as f32).collect();
        let mut inputs = vec![
            ("hidden_states", random(&[1, grid.tokens(), size("in_channels")])?),
            ("encoder_hidden_states", random(&[1, self.evaluation.text, size("joint_attention_dim")])?),
            ("pooled_projections", random(&[1, size("pooled_projection_dim")])?),
            ("timestep", Tensor::new(&[0.5f32], device)?),
            ("img_ids", Tensor::from_vec(ids, (grid.tokens(), 3), device)?),
            ("txt_ids", Tensor::zeros((self.evaluation.text, 3), DType::F32, device)?),
        ];
        if self.config["guidance_embeds"] == true {
            inputs.push(("guidance", Tensor::new(&[3.5f32], device)?));
        }
        Ok(inputs.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect())
    }
}

#[derive(Debug, Serialize)]
struct Row {
    grid: String,
    attention: String,
    median_ms: f64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10}  {:<12}  median {:>10.1} ms", self.grid, self.attention, self.median_ms)
    }
}

/// What was found.
#[derive(Debug, Serialize)]
struct Table {
    rows: Vec<Row>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}
