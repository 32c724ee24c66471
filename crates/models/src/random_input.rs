//! [`random_input`]: random arguments for one forward, for benchmarks. They are the same in every run.

use crate::{Architecture, BatchSpec, Conditions, DenoiserInput, ImageSize, NoiseProcess, Result, StepIndex};
use candle_core::{DType, Device, Tensor};
use clearform_attention::TokenGrid;
use clearform_ops::TorchGenerator;

/// Sizes, dtype and device of a random input.
#[derive(Debug, Clone)]
pub struct InputSizes {
    /// Grid of image tokens.
    pub grid: TokenGrid,
    /// Number of text tokens, in families with text.
    pub text: usize,
    /// Dtype of latents and text.
    pub dtype: DType,
    /// Device of all tensors.
    pub device: Device,
}

/// Arguments for a batch of one: random latents with random text or class 0, at the middle timestep.
///
/// # Errors
/// Not enough memory on the device.
pub fn random_input(architecture: &dyn Architecture, sizes: &InputSizes) -> Result<DenoiserInput> {
    let channels = architecture.input_channels();
    let pipeline = architecture.pipeline_spec();
    let patch_size = pipeline.patch_size();
    let grid = sizes.grid;
    let text = sizes.text;
    let device = &sizes.device;
    let mut generator = TorchGenerator::new(0);
    let mut random = |shape: &[usize]| generator.randn(shape)?.to_device(device)?.to_dtype(sizes.dtype);
    let size = [grid.height * patch_size, grid.width * patch_size];
    let (latents, image_ids) = pipeline.pack(&random(&[1, channels.latents, size[0], size[1]])?)?;
    let class = || Tensor::zeros(1, DType::U32, device);
    let conditions = Conditions {
        text: channels.text.map(|channels| random(&[1, text, channels])).transpose()?,
        pooled: channels.pooled.map(|channels| random(&[1, channels])).transpose()?,
        classes: channels.text.is_none().then(class).transpose()?,
        text_ids: image_ids.is_some().then(|| Tensor::zeros((text, 3), DType::F32, device)).transpose()?,
        image_ids,
        ..Conditions::default()
    };
    let [height, width] = size;
    let batch_spec = BatchSpec { batch: 1, size: ImageSize { height, width }, guidance: 3.5 };
    Ok(DenoiserInput {
        latents,
        timestep: Tensor::new(&[middle_timestep(pipeline.noise_process())], device)?,
        step_index: StepIndex::default(),
        conditions: pipeline.add_size_conditions(conditions, batch_spec, device)?,
    })
}

/// The timestep halfway between image and noise, in the model's range.
fn middle_timestep(process: NoiseProcess) -> f32 {
    match process {
        NoiseProcess::FlowMatching { time_scale } => (0.5 * time_scale) as f32,
        NoiseProcess::ReversedFlow => 0.5,
        NoiseProcess::Ddpm => 500.0,
    }
}
