//! [`ControlConcat`]: a transformer that takes a control image as further channels of its tokens, as FLUX.1's Canny and
//! Depth models do (diffusers' `FluxControlPipeline`).

use candle_core::Tensor;
use clearform_models::{Denoiser, DenoiserInput, HiddenState};

/// A transformer with the control's latents concatenated to its own.
pub(crate) struct ControlConcat<'a> {
    pub base: &'a dyn Denoiser,
    /// The control's latents in the form that the transformer takes; `None` for a transformer without control.
    pub control: Option<Tensor>,
}

/// `latents` with the latents of a control image as further channels.
///
/// # Shapes
/// (batch, image tokens, channels) or (batch, channels, height, width), both alike -> the same with all channels.
///
/// # Errors
/// Shapes that do not match.
pub fn with_control(latents: &Tensor, control: &Tensor) -> candle_core::Result<Tensor> {
    Tensor::cat(&[latents, &control.to_dtype(latents.dtype())?], channel_axis(control))
}

/// The dimension of channels: 2 in packed latents (batch, image tokens, channels), 1 in (batch, channels, height, width).
pub(crate) fn channel_axis(latents: &Tensor) -> usize {
    if latents.rank() == 3 { 2 } else { 1 }
}

impl ControlConcat<'_> {
    fn with_control(&self, input: &DenoiserInput) -> candle_core::Result<DenoiserInput> {
        let Some(control) = &self.control else { return Ok(input.clone()) };
        Ok(DenoiserInput { latents: with_control(&input.latents, control)?, ..input.clone() })
    }
}

impl Denoiser for ControlConcat<'_> {
    fn layer_names(&self) -> &[String] {
        self.base.layer_names()
    }

    fn embed(&self, input: &DenoiserInput) -> clearform_models::Result<HiddenState> {
        self.base.embed(&self.with_control(input)?)
    }

    fn forward(&self, input: &DenoiserInput) -> clearform_models::Result<Tensor> {
        self.base.forward(&self.with_control(input)?)
    }

    fn block(&self, index: usize, state: HiddenState) -> clearform_models::Result<HiddenState> {
        self.base.block(index, state)
    }

    fn head(&self, state: &HiddenState) -> clearform_models::Result<Tensor> {
        self.base.head(state)
    }
}
