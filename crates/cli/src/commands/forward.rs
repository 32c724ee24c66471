//! `clearform forward`: runs the transformer once on given tensors, for example to compare it with diffusers.

use crate::adapters::{open_all, print_reports};
use crate::args::{DtypeArg, ForwardArgs};
use crate::output::{CommandOutcome, Output};
use crate::sources::{open_device, open_transformer_with, parse_plan, read_options};
use anyhow::Context as _;
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::Denoiser as _;
use clearform_plugin_host::{AdapterReport, ControlNetInput, ControlledDenoiser};
use clearform_runtime::{ActiveControlNet, EditedTransformer};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource as _};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

/// Writes the prediction for `--inputs`.
pub fn run(args: &ForwardArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let dtype = args.dtype.map_or(DType::F32, DtypeArg::as_dtype);
    let device = open_device(args.running.device)?;
    let options = read_options(&args.reading)?.recorded(&args.model)?;
    let adapters = open_all(&args.adapters)?;
    let transformer = open_transformer_with(&args.model, &options)?;
    let EditedTransformer { transformer, reports, .. } = adapters.apply_to(transformer, None, &options.manifests)?;
    let controlnets = adapters.open_controlnets(&transformer)?;
    print_reports(&reports, &controlnets, output);
    let plan = match &args.attention {
        Some(text) => parse_plan(text)?,
        None => clearform_portable_model::recorded_plan(&args.model)?.unwrap_or_else(AttentionPlan::full),
    };
    let mut inputs = inputs(args, dtype, &device)?;
    let controls = take_controls(&controlnets, &mut inputs)?;
    let input = transformer.family().parse_input(inputs)?;
    let denoiser = transformer.build(&plan, Some(dtype), &device)?;
    let sample = ControlledDenoiser::new(denoiser.as_ref(), controls).forward(&input)?;
    let sample = sample.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    let shape = sample.dims().to_vec();
    let result = InMemoryTensors::from_iter([("sample".to_owned(), sample)]);
    clearform_weights::save(&args.output, &result, &BTreeMap::new())?;
    output.result(&ForwardSummary {
        output: args.output.clone(),
        attention: plan.to_string(),
        shape,
        adapters: reports,
    })?;
    Ok(CommandOutcome::Complete)
}

/// Inputs that stay in f32: ids, indices and sizes lose too much in 16 bits.
const EXACT: [&str; 8] =
    ["img_ids", "txt_ids", "timestep", "guidance", "class_labels", "resolution", "aspect_ratio", "controlnet_mode"];

/// Every input; floating-point inputs, except the [`EXACT`] ones, in the dtype that the model runs in.
fn inputs(args: &ForwardArgs, dtype: DType, device: &Device) -> anyhow::Result<BTreeMap<String, Tensor>> {
    let file = Checkpoint::open(&args.inputs).with_context(|| "--inputs")?;
    let convert = |name: String| {
        let tensor = file.tensor(&name)?;
        // candle's CUDA backend has no casts from I16 and I32.
        let short = matches!(tensor.dtype(), DType::I16 | DType::I32);
        let tensor = if short { tensor.to_dtype(DType::I64)? } else { tensor }.to_device(device)?;
        let exact = EXACT.contains(&name.as_str());
        Ok((name, if exact || tensor.dtype().is_int() { tensor } else { tensor.to_dtype(dtype)? }))
    };
    file.tensors().into_iter().map(|info| convert(info.name)).collect()
}

/// Removes the ControlNets' inputs from `inputs`: `controlnet_cond_0` is that of the first, `controlnet_cond` that of
/// every ControlNet without its own. A mode that no ControlNet takes is ignored, as in diffusers.
fn take_controls(
    controlnets: &[ActiveControlNet],
    inputs: &mut BTreeMap<String, Tensor>,
) -> anyhow::Result<Vec<ControlNetInput>> {
    let mut used = BTreeSet::new();
    let mut input_of = |name: &str, index: usize| {
        let numbered = format!("{name}_{index}");
        let name = if inputs.contains_key(&numbered) { numbered } else { name.to_owned() };
        let tensor = inputs.get(&name).cloned();
        used.insert(name);
        tensor
    };
    let mut controls = Vec::new();
    for (index, active) in controlnets.iter().enumerate() {
        let path = active.controlnet.path().display();
        let missing = || format!("--inputs: {path} takes the input {CONTROL:?}, which is missing");
        controls.push(ControlNetInput {
            controlnet: active.controlnet.clone(),
            control: input_of(CONTROL, index).with_context(missing)?,
            mode: input_of(MODE, index),
            guidance: None,
            scale: active.scale,
            interval: active.schedule.interval,
        });
    }
    inputs.retain(|name, _| !used.contains(name));
    Ok(controls)
}

/// Inputs of ControlNets, named as in forward() of the diffusers class.
const CONTROL: &str = "controlnet_cond";
const MODE: &str = "controlnet_mode";

#[derive(Debug, Serialize)]
struct ForwardSummary {
    output: PathBuf,
    attention: String,
    shape: Vec<usize>,
    /// How many tensors of each weight adapter were applied.
    adapters: Vec<AdapterReport>,
}

impl fmt::Display for ForwardSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: sample {:?}, attention {}", self.output.display(), self.shape, self.attention)
    }
}
