//! [`forward`]: runs the transformer once on given tensors, for example to compare it with diffusers.

use crate::adapters::{AdapterOptions, ControlNetReport, note_reports};
use crate::error::WithContext as _;
use crate::observer::{Observer, note};
use crate::sources::{open_transformer_with, read_options};
use crate::{
    ClearformError, ComputeDevice, Existing, FloatDtype, Result, SourceOptions, check_is_no_input, prepare_tensor_file,
};
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::Denoiser as _;
use clearform_plugin_host::{AdapterReport, ControlNetInput, ControlledDenoiser};
use clearform_runtime::{ActiveControlNet, EditedTransformer, check_dtype, default_dtype};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource as _, is_finite};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// What [`forward`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardOptions {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// Safetensors file with the inputs, named and shaped as for forward() of the diffusers class.
    pub inputs: PathBuf,
    /// Safetensors file to write; it holds one tensor, `sample`, in f32.
    pub output: PathBuf,
    /// How the model is read.
    #[serde(default)]
    pub reading: SourceOptions,
    /// Attention plan; `None` is the model's own.
    #[serde(default)]
    pub attention: Option<AttentionPlan>,
    /// Adapters applied to the model.
    #[serde(default)]
    pub adapters: AdapterOptions,
    /// Where the model runs.
    #[serde(default)]
    pub device: ComputeDevice,
    /// Dtype to compute in; `None` is f32 on a CPU and bf16 on a GPU.
    #[serde(default)]
    pub dtype: Option<FloatDtype>,
    /// Whether an existing file is replaced.
    #[serde(default)]
    pub replace: bool,
}

impl ForwardOptions {
    /// Runs `model` on `inputs` and writes the sample to `output`.
    pub fn new(model: impl Into<PathBuf>, inputs: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            inputs: inputs.into(),
            output: output.into(),
            reading: SourceOptions::default(),
            attention: None,
            adapters: AdapterOptions::default(),
            device: ComputeDevice::default(),
            dtype: None,
            replace: false,
        }
    }
}

/// Runs the transformer once, and writes its prediction.
///
/// # Errors
/// The model or an adapter cannot be opened, or an input is missing, unknown or misshapen.
///
/// # Example
/// ```no_run
/// use clearform::{ForwardOptions, forward};
///
/// let options = ForwardOptions::new("FLUX.1-dev", "inputs.safetensors", "sample.safetensors");
/// println!("{}", forward(&options, &mut ())?);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn forward(options: &ForwardOptions, observer: &mut dyn Observer) -> Result<ForwardReport> {
    check_is_no_input(&options.output, &[&options.model, &options.inputs])?;
    let file = prepare_tensor_file(&options.output, Existing::replaced_if(options.replace))?;
    let device = options.device.open()?;
    let dtype = options.dtype.map_or(default_dtype(&device), Into::into);
    check_dtype(&device, dtype)?;
    let reading = read_options(&options.reading)?.recorded(&options.model)?;
    check_intervals(&options.adapters)?;
    let adapters = options.adapters.open()?;
    let transformer = open_transformer_with(&options.model, &reading)?;
    let EditedTransformer { transformer, reports, .. } = adapters.apply_to(transformer, None, &reading.manifests)?;
    let controlnets = adapters.open_controlnets(&transformer)?;
    note_reports(&reports, &controlnets, observer);
    options.adapters.without_effect().iter().for_each(|text| observer.note(text));
    let plan = match &options.attention {
        Some(plan) => plan.clone(),
        None => clearform_portable_model::recorded_plan(&options.model)?.unwrap_or_else(AttentionPlan::full),
    };
    let mut inputs = inputs(&options.inputs, dtype, &device)?;
    let controls = take_controls(&controlnets, &mut inputs)?;
    let input = transformer.architecture().parse_input(inputs)?;
    let denoiser = transformer.build(&plan, Some(dtype), &device)?;
    let sample = ControlledDenoiser::new(denoiser.as_ref(), controls).forward(&input)?;
    let sample = sample.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    if !is_finite(&sample)? {
        note(observer, "warning: the sample contains NaN or infinity");
    }
    let shape = sample.dims().to_vec();
    let result = InMemoryTensors::from_iter([("sample".to_owned(), sample)]);
    file.write(|path| clearform_weights::save(path, &result, &BTreeMap::new()))?;
    let (output, attention) = (options.output.clone(), plan.to_string());
    let controlnets = controlnets.iter().map(ControlNetReport::from).collect();
    Ok(ForwardReport { output, attention, shape, adapters: reports, controlnets })
}

/// Refuses ControlNets that act in some steps only.
fn check_intervals(adapters: &AdapterOptions) -> Result<()> {
    match adapters.adapters.iter().find(|adapter| adapter.interval != [0.0, 1.0]) {
        None => Ok(()),
        Some(adapter) => Err(ClearformError::bad_option(format!(
            "{adapter}: a single evaluation has no steps: leave start and end out"
        ))),
    }
}

/// Inputs that stay in f32: ids, indices and sizes lose too much in 16 bits.
const EXACT: [&str; 8] =
    ["img_ids", "txt_ids", "timestep", "guidance", "class_labels", "resolution", "aspect_ratio", "controlnet_mode"];

/// Every input; floating-point inputs, except the [`EXACT`] ones, in the dtype that the model runs in.
fn inputs(path: &Path, dtype: DType, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let file = Checkpoint::open(path).context("--inputs")?;
    let convert = |name: String| {
        let tensor = file.tensor(&name)?;
        let exact = EXACT.contains(&name.as_str());
        let is_integer = tensor.dtype().is_int() && !exact && !name.starts_with("controlnet_mode");
        let expected = match (tensor.elem_count(), is_integer) {
            (0, _) => Some("at least one value"),
            (_, true) => Some("floating-point values"),
            _ => None,
        };
        if let Some(expected) = expected {
            return Err(ClearformError::bad_option(format!(
                "--inputs {}, tensor {name:?}: expected {expected}, found shape {:?} in {:?}",
                path.display(),
                tensor.dims(),
                tensor.dtype()
            )));
        }
        // candle's CUDA backend has no casts from I16 and I32.
        let short = matches!(tensor.dtype(), DType::I16 | DType::I32);
        let tensor = if short { tensor.to_dtype(DType::I64)? } else { tensor }.to_device(device)?;
        Ok((name, if exact || tensor.dtype().is_int() { tensor } else { tensor.to_dtype(dtype)? }))
    };
    file.tensors().into_iter().map(|info| convert(info.name)).collect()
}

/// Removes the ControlNets' inputs from `inputs`: `controlnet_cond_0` is that of the first, `controlnet_cond` that of
/// every ControlNet without its own; `controlnet_mode` likewise. A mode that no ControlNet takes is ignored, as in
/// diffusers.
fn take_controls(
    controlnets: &[ActiveControlNet],
    inputs: &mut BTreeMap<String, Tensor>,
) -> Result<Vec<ControlNetInput>> {
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
        let control = input_of(CONTROL, index).ok_or_else(|| ClearformError::BadOption(missing()))?;
        let mode = input_of(MODE, index);
        controls.push(ControlNetInput {
            controlnet: active.controlnet.clone(),
            mode: mode_of(active, mode, &control)?,
            control,
            guidance: None,
            scale: active.scale,
            interval: active.schedule.interval,
        });
    }
    inputs.retain(|name, _| !used.contains(name));
    Ok(controls)
}

/// The mode of each sample of `control`, for a union ControlNet: that of its setting `mode=N`, or `input`.
fn mode_of(active: &ActiveControlNet, input: Option<Tensor>, control: &Tensor) -> Result<Option<Tensor>> {
    if active.controlnet.input().modes == 0 {
        return Ok(None);
    }
    let path = active.controlnet.path().display();
    match (active.schedule.mode, input) {
        (None, None) => {
            let reason = format!("{path}: a union ControlNet takes a mode: pass ,mode=N or the input {MODE:?}");
            Err(ClearformError::BadOption(reason))
        }
        (None, Some(input)) => Ok(Some(input)),
        (Some(mode), None) => Ok(Some(Tensor::full(mode as i64, (control.dim(0)?, 1), control.device())?)),
        (Some(mode), Some(input)) => {
            let found: Vec<f64> = input.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
            if found.iter().all(|found| *found == mode as f64) {
                return Ok(Some(input));
            }
            let reason = format!("{path}: mode={mode}, but the input {MODE:?} is {found:?}; state one of them");
            Err(ClearformError::BadOption(reason))
        }
    }
}

/// Inputs of ControlNets, named as in forward() of the diffusers class.
const CONTROL: &str = "controlnet_cond";
const MODE: &str = "controlnet_mode";

/// A prediction that was written.
#[derive(Debug, Clone, Serialize)]
pub struct ForwardReport {
    /// Its file.
    pub output: PathBuf,
    /// The attention plan.
    pub attention: String,
    /// Shape of the sample.
    pub shape: Vec<usize>,
    /// How many tensors of each weight adapter were applied.
    pub adapters: Vec<AdapterReport>,
    /// The ControlNets.
    pub controlnets: Vec<ControlNetReport>,
}

impl fmt::Display for ForwardReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: sample {:?}, attention {}", self.output.display(), self.shape, self.attention)
    }
}
