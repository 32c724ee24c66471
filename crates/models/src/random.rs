//! [`random_input`]: an evaluation of random numbers, for whoever times a transformer. It knows no family.

use crate::{BatchSpec, Conditions, DenoiserInput, Family, ImageSize, NoiseProcess, Result, StepIndex};
use candle_core::{DType, Device, Tensor};
use clearform_attention::TokenGrid;
use serde_json::Value;

/// Channels of the tensors that a transformer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputChannels {
    /// Of the latents, before they are packed.
    pub latents: usize,
    /// Of a text token; a model without text draws classes.
    pub text: Option<usize>,
    /// Of the pooled text.
    pub pooled: Option<usize>,
}

impl InputChannels {
    /// Those of a model that draws classes on latents of `latents` channels.
    pub(crate) fn of_class_model(latents: usize) -> Self {
        Self { latents, text: None, pooled: None }
    }
}

/// Extents of a random input, and how it is held.
#[derive(Debug, Clone)]
pub struct InputSizes {
    /// Image tokens.
    pub grid: TokenGrid,
    /// Text tokens, where the family has text.
    pub text: usize,
    /// Number format of latents and text.
    pub dtype: DType,
    /// Where it lies.
    pub device: Device,
}

/// One sample of random latents and text, or of the first class, half way between noise and picture.
///
/// # Errors
/// A bad config key, or the device refuses.
pub fn random_input(family: &dyn Family, config: &Value, sizes: &InputSizes) -> Result<DenoiserInput> {
    let (channels, patch) = (family.channels(config)?, family.patch(config)?);
    let (grid, text, device) = (sizes.grid, sizes.text, &sizes.device);
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(sizes.dtype);
    let size = [grid.height * patch, grid.width * patch];
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
        timestep: Tensor::new(&[half_way(family.noise_process())], device)?,
        step_index: StepIndex::default(),
        conditions: family.add_size_conditions(config, conditions, batch_spec, device)?,
    })
}

/// The middle of the way, in the unit of the model.
fn half_way(process: NoiseProcess) -> f32 {
    match process {
        NoiseProcess::FlowMatching { time_scale } => (0.5 * time_scale) as f32,
        NoiseProcess::ReversedFlow => 0.5,
        NoiseProcess::Ddpm => 500.0,
    }
}
