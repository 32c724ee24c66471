//! [`Beside`]: a transformer that looks at a control through more channels of its own tokens, as FLUX's canny and depth
//! models do.

use candle_core::Tensor;
use clearform_models::{Denoiser, DenoiserInput, State};

/// A transformer whose tokens hold a control's latents beside their own.
pub(crate) struct Beside<'a> {
    pub base: &'a dyn Denoiser,
    /// As the transformer takes its latents; none for a transformer that looks at none.
    pub control: Option<Tensor>,
}

/// Where the channels of latents stand: last where they are packed, (batch, image tokens, channels), and else first,
/// (batch, channels, height, width).
pub(crate) fn channel_axis(latents: &Tensor) -> usize {
    if latents.rank() == 3 { 2 } else { 1 }
}

impl Denoiser for Beside<'_> {
    fn layers(&self) -> &[String] {
        self.base.layers()
    }

    fn embed(&self, input: &DenoiserInput) -> clearform_models::Result<State> {
        let Some(control) = &self.control else { return self.base.embed(input) };
        let control = control.to_dtype(input.latents.dtype())?;
        let latents = Tensor::cat(&[&input.latents, &control], channel_axis(&control))?;
        self.base.embed(&DenoiserInput { latents, ..input.clone() })
    }

    fn block(&self, index: usize, state: State) -> clearform_models::Result<State> {
        self.base.block(index, state)
    }

    fn head(&self, state: &State) -> clearform_models::Result<Tensor> {
        self.base.head(state)
    }
}
