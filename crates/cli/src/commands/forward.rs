//! `clearform forward`: the transformer once, on given tensors. It is how anyone checks us against diffusers.

use crate::args::Forward;
use crate::opening::{device, plan, reading};
use crate::output::{Outcome, Output};
use anyhow::Context as _;
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_runtime::{Components, Transformer};
use clearform_weights::{Checkpoint, Resident, TensorSource as _};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

pub fn run(args: &Forward, output: &Output) -> anyhow::Result<Outcome> {
    let dtype = args.running.dtype.map_or(DType::F32, crate::args::Dtype::computed);
    let device = device(args.running.device)?;
    let path = Components::new(&args.model, None).transformer();
    let transformer = Transformer::open(&path, &reading(&args.reading)?)?;
    let plan = match &args.running.attention {
        Some(text) => plan(text)?,
        None => clearform_convert::recorded_plan(&args.model)?.unwrap_or_else(AttentionPlan::full),
    };
    let input = transformer.family().input(inputs(args, dtype, &device)?)?;
    let sample = transformer.build(&plan, Some(dtype), &device)?.forward(&input)?;
    let sample = sample.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    let shape = sample.dims().to_vec();
    let result = Resident::from_iter([("sample".to_owned(), sample)]);
    clearform_weights::save(&args.output, &result, &BTreeMap::new())?;
    output.result(&Done { output: args.output.clone(), attention: plan.to_string(), shape })?;
    Ok(Outcome::Whole)
}

/// Every input; floating-point ones but the ids and times in the number format the model runs in.
fn inputs(args: &Forward, dtype: DType, device: &Device) -> anyhow::Result<BTreeMap<String, Tensor>> {
    let file = Checkpoint::open(&args.inputs).with_context(|| "--inputs")?;
    let convert = |name: String| {
        let tensor = file.tensor(&name)?.to_device(device)?;
        let exact = ["img_ids", "txt_ids", "timestep", "guidance"].contains(&name.as_str());
        Ok((name, if exact || tensor.dtype().is_int() { tensor } else { tensor.to_dtype(dtype)? }))
    };
    file.tensors().into_iter().map(|info| convert(info.name)).collect()
}

#[derive(Debug, Serialize)]
struct Done {
    output: PathBuf,
    attention: String,
    shape: Vec<usize>,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: sample {:?}, attention {}", self.output.display(), self.shape, self.attention)
    }
}
