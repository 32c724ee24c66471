//! [`random_input`]: random arguments for one forward, for benchmarks.

use crate::{BatchSpec, Conditions, DenoiserInput, Family, ImageSize, NoiseProcess, Result, StepIndex};
use candle_core::{DType, Device, Tensor};
use clearform_attention::TokenGrid;
use serde_json::Value;

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
/// A bad config key, or not enough memory on the device.
pub fn random_input(family: &dyn Family, config: &Value, sizes: &InputSizes) -> Result<DenoiserInput> {
    let channels = family.input_channels(config)?;
    let patch_size = family.patch_size(config)?;
    let grid = sizes.grid;
    let text = sizes.text;
    let device = &sizes.device;
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(sizes.dtype);
    let size = [grid.height * patch_size, grid.width * patch_size];
    let (latents, image_ids) = family.pack(&random(&[1, channels.latents, size[0], size[1]])?)?;
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
        timestep: Tensor::new(&[middle_timestep(family.noise_process())], device)?,
        step_index: StepIndex::default(),
        conditions: family.add_size_conditions(config, conditions, batch_spec, device)?,
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
