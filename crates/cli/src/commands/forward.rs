//! `clearform forward`: the transformer once, on given tensors. It is how anyone checks us against diffusers.

use crate::adapters;
use crate::args::ForwardArgs;
use crate::output::{CommandOutcome, Output};
use crate::sources::{device, open_as, plan, reading};
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

pub fn run(args: &ForwardArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let dtype = args.running.dtype.map_or(DType::F32, crate::args::DtypeArg::computed);
    let device = device(args.running.device)?;
    let reading = reading(&args.reading)?.recorded(&args.model)?;
    let adapters = adapters::open_all(&args.adapters)?;
    let transformer = open_as(&args.model, &reading)?;
    let EditedTransformer { transformer, reports, .. } = adapters.apply_to(transformer, None, &reading.manifests)?;
    let controlnets = adapters.open_controlnets(&transformer)?;
    adapters::tell(&reports, &controlnets, output);
    let plan = match &args.running.attention {
        Some(text) => plan(text)?,
        None => clearform_portable_model::recorded_plan(&args.model)?.unwrap_or_else(AttentionPlan::full),
    };
    let mut inputs = inputs(args, dtype, &device)?;
    let controls = controls(&controlnets, &mut inputs)?;
    let input = transformer.family().input(inputs)?;
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
    Ok(CommandOutcome::Whole)
}

/// Inputs that number formats of few digits would spoil.
const EXACT: [&str; 8] =
    ["img_ids", "txt_ids", "timestep", "guidance", "class_labels", "resolution", "aspect_ratio", "controlnet_mode"];

/// Every input; floating-point ones but the [`EXACT`] in the number format the model runs in.
fn inputs(args: &ForwardArgs, dtype: DType, device: &Device) -> anyhow::Result<BTreeMap<String, Tensor>> {
    let file = Checkpoint::open(&args.inputs).with_context(|| "--inputs")?;
    let convert = |name: String| {
        let tensor = file.tensor(&name)?;
        // A GPU converts no other whole numbers.
        let short = matches!(tensor.dtype(), DType::I16 | DType::I32);
        let tensor = if short { tensor.to_dtype(DType::I64)? } else { tensor }.to_device(device)?;
        let exact = EXACT.contains(&name.as_str());
        Ok((name, if exact || tensor.dtype().is_int() { tensor } else { tensor.to_dtype(dtype)? }))
    };
    file.tensors().into_iter().map(|info| convert(info.name)).collect()
}

/// Takes out of `inputs` what the branches are controlled by: each its own, or all the same. A mode that no branch takes
/// is nothing to complain of, as in diffusers; any other input that is left over will be.
fn controls(
    controlnets: &[ActiveControlNet],
    inputs: &mut BTreeMap<String, Tensor>,
) -> anyhow::Result<Vec<ControlNetInput>> {
    let mut used = BTreeSet::new();
    let mut of = |name: &str, index: usize| {
        let own = format!("{name}_{index}");
        let name = if inputs.contains_key(&own) { own } else { name.to_owned() };
        let tensor = inputs.get(&name).cloned();
        used.insert(name);
        tensor
    };
    let mut controls = Vec::new();
    for (index, schedule) in controlnets.iter().enumerate() {
        let path = schedule.controlnet.path().display();
        let missing = || format!("--inputs: {path} takes the input {CONTROL:?}, which is missing");
        controls.push(ControlNetInput {
            controlnet: schedule.controlnet.clone(),
            control: of(CONTROL, index).with_context(missing)?,
            mode: of(MODE, index),
            guidance: None,
            scale: schedule.scale,
            interval: schedule.schedule.interval,
        });
    }
    inputs.retain(|name, _| !used.contains(name));
    Ok(controls)
}

/// Names of what branches take, as the forward of diffusers' class has them.
const CONTROL: &str = "controlnet_cond";
const MODE: &str = "controlnet_mode";

#[derive(Debug, Serialize)]
struct ForwardSummary {
    output: PathBuf,
    attention: String,
    shape: Vec<usize>,
    /// What became of each weight adapter's tensors.
    adapters: Vec<AdapterReport>,
}

impl fmt::Display for ForwardSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: sample {:?}, attention {}", self.output.display(), self.shape, self.attention)
    }
}
