//! [`ControlConcat`]: a transformer that looks at a control through more channels of its own tokens, as FLUX's canny and depth
//! models do.

use candle_core::Tensor;
use clearform_models::{Denoiser, DenoiserInput, HiddenState};

/// A transformer whose tokens hold a control's latents beside their own.
pub(crate) struct ControlConcat<'a> {
    pub base: &'a dyn Denoiser,
    /// As the transformer takes its latents; none for a transformer that looks at none.
    pub control: Option<Tensor>,
}

/// Where the channels of latents stand: last where they are packed, (batch, image tokens, channels), and else first,
/// (batch, channels, height, width).
pub(crate) fn channel_axis(latents: &Tensor) -> usize {
    if latents.rank() == 3 { 2 } else { 1 }
}

impl Denoiser for ControlConcat<'_> {
    fn layers(&self) -> &[String] {
        self.base.layers()
    }

    fn embed(&self, input: &DenoiserInput) -> clearform_models::Result<HiddenState> {
        let Some(control) = &self.control else { return self.base.embed(input) };
        let control = control.to_dtype(input.latents.dtype())?;
        let latents = Tensor::cat(&[&input.latents, &control], channel_axis(&control))?;
        self.base.embed(&DenoiserInput { latents, ..input.clone() })
    }

    fn block(&self, index: usize, state: HiddenState) -> clearform_models::Result<HiddenState> {
        self.base.block(index, state)
    }

    fn head(&self, state: &HiddenState) -> clearform_models::Result<Tensor> {
        self.base.head(state)
    }
}
