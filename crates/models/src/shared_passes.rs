//! [`SharedPasses`]: a denoiser whose blocks are streamed, and which reads them once for several evaluations.

use crate::{Denoiser, DenoiserInput, HiddenState, Result};
use candle_core::Tensor;

/// A denoiser that takes the inputs of [`Denoiser::forward_each`], such as both evaluations of classifier-free guidance,
/// through one block after the other, so that each block is read once for all of them.
pub struct SharedPasses(pub Box<dyn Denoiser>);

impl Denoiser for SharedPasses {
    fn layer_names(&self) -> &[String] {
        self.0.layer_names()
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        self.0.embed(input)
    }

    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        self.0.block(index, state)
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        self.0.head(state)
    }

    fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
        self.0.forward(input)
    }

    fn forward_each(&self, inputs: &[DenoiserInput]) -> Result<Vec<Tensor>> {
        let mut states = inputs.iter().map(|input| self.0.embed(input)).collect::<Result<Vec<_>>>()?;
        for index in 0..self.0.block_count() {
            let advance = |state| self.0.block(index, HiddenState { attention: None, ..state });
            states = states.into_iter().map(advance).collect::<Result<_>>()?;
        }
        states.iter().map(|state| self.0.head(state)).collect()
    }
}
