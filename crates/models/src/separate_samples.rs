//! [`SeparateSamples`]: a small denoiser that computes the samples of a batch in parallel.

use crate::{Denoiser, DenoiserInput, HiddenState, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// A denoiser whose forward runs each sample of a batch on a thread of its own. The operations of a small model are too
/// short to be shared by threads; those of a large one share better, and reading its weights once for each sample would
/// cost more than it gains. The result is the same for any number of threads.
pub struct SeparateSamples(Box<dyn Denoiser>);

/// Parameters of a small model, at most. mini-flux has 4 million; DiT-S has 33.
const SMALL: usize = 16 << 20;

impl SeparateSamples {
    /// `denoiser`, with its samples separate if it is a model of few `parameters` on a CPU.
    pub fn if_small(denoiser: Box<dyn Denoiser>, parameters: usize, device: &Device) -> Box<dyn Denoiser> {
        if Self::are_worth_it(parameters) && device.is_cpu() { Box::new(Self(denoiser)) } else { denoiser }
    }

    /// Whether a model of so many `parameters` is small.
    pub fn are_worth_it(parameters: usize) -> bool {
        parameters <= SMALL
    }
}

impl Denoiser for SeparateSamples {
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
        let batch = input.batch()?;
        if batch < 2 {
            return self.0.forward(input);
        }
        let sample = |index| self.0.forward(&input.samples(index, 1)?);
        let predictions = (0..batch).into_par_iter().map(sample).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&predictions, 0)?)
    }
}
