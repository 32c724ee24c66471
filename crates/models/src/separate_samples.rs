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
        if batch == 1 {
            return self.0.forward(input);
        }
        Ok(self.forward_each(std::slice::from_ref(input))?.remove(0))
    }

    fn forward_each(&self, inputs: &[DenoiserInput]) -> Result<Vec<Tensor>> {
        let batches = inputs.iter().map(DenoiserInput::batch).collect::<Result<Vec<_>>>()?;
        let samples =
            inputs.iter().zip(&batches).flat_map(|(input, batch)| (0..*batch).map(|index| input.samples(index, 1)));
        let samples = samples.collect::<Result<Vec<_>>>()?;
        let mut predictions =
            samples.par_iter().map(|sample| self.0.forward(sample)).collect::<Result<Vec<_>>>()?.into_iter();
        let of_input = |batch| Ok(Tensor::cat(&predictions.by_ref().take(batch).collect::<Vec<_>>(), 0)?);
        batches.into_iter().map(of_input).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Conditions, ModelError, StepIndex};

    /// Adds the class to the latents of a single sample.
    struct OneByOne;

    impl Denoiser for OneByOne {
        fn layer_names(&self) -> &[String] {
            &[]
        }
        fn embed(&self, _: &DenoiserInput) -> Result<HiddenState> {
            Err(ModelError::BadInput { name: "latents".to_owned(), reason: "not embedded here".to_owned() })
        }
        fn block(&self, _: usize, state: HiddenState) -> Result<HiddenState> {
            Ok(state)
        }
        fn head(&self, state: &HiddenState) -> Result<Tensor> {
            Ok(state.image.clone())
        }
        fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
            assert_eq!(input.batch()?, 1);
            Ok(input.latents.broadcast_add(&input.conditions.classes.clone().unwrap())?)
        }
    }

    #[test]
    fn predictions_come_back_by_input_and_in_order() {
        let input = |classes: &[f32]| {
            let classes = Tensor::new(classes, &Device::Cpu).unwrap();
            DenoiserInput {
                latents: (classes.reshape(((), 1, 1)).unwrap() * 10.0).unwrap(),
                timestep: classes.clone(),
                step_index: StepIndex::default(),
                conditions: Conditions { classes: Some(classes), ..Conditions::default() },
            }
        };
        let small = SeparateSamples::if_small(Box::new(OneByOne), 1, &Device::Cpu);
        let values = |tensor: &Tensor| tensor.flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&small.forward(&input(&[4.0])).unwrap()), [[44.0]]);
        let found = small.forward_each(&[input(&[1.0, 2.0]), input(&[3.0])]).unwrap();
        assert_eq!(found.iter().map(values).collect::<Vec<_>>(), [vec![vec![11.0], vec![22.0]], vec![vec![33.0]]]);
        assert_eq!(values(&small.forward(&input(&[1.0, 2.0])).unwrap()), [[11.0], [22.0]]);
    }
}
