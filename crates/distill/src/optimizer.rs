//! [`OptimizerState`]: AdamW and plain gradient descent over f32 masters, and [`clip`]. candle's own optimizers keep their
//! moments private; these are public, so that a checkpoint can save them.

use crate::parallel::map_each;
use crate::{Gradients, Optimizer, Result};
use candle_core::{D, DType, Tensor, Var};
use clearform_ops::{AdamState, AdamStep, adam_step};
use std::collections::BTreeMap;

/// What an optimizer remembers between steps.
#[derive(Debug, Clone, Default)]
pub struct OptimizerState {
    /// Steps done.
    pub steps: usize,
    /// First moments: running means of the gradients.
    pub first: BTreeMap<String, Tensor>,
    /// Second moments: running means of their squares.
    pub second: BTreeMap<String, Tensor>,
}

impl OptimizerState {
    /// One step with learning rate `rate` for every master that has a gradient.
    ///
    /// # Errors
    /// A gradient has another shape than its master.
    pub fn step(
        &mut self,
        optimizer: Optimizer,
        rate: f64,
        masters: &BTreeMap<String, Var>,
        gradients: &Gradients,
    ) -> Result<()> {
        self.steps += 1;
        let trained: Vec<_> =
            gradients.iter().filter_map(|(name, gradient)| Some((name, masters.get(name)?, gradient))).collect();
        let in_parallel = are_on_cpu(gradients);
        let Optimizer::AdamW { beta1, beta2, epsilon, weight_decay } = optimizer else {
            let descend = |(_, master, gradient): (&String, &Var, &Tensor)| {
                Ok(master.set(&(master.as_tensor() - (gradient * rate)?)?.detach())?)
            };
            return map_each(trained, in_parallel, descend).map(drop);
        };
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let step = AdamStep {
            kept: 1.0 - rate * weight_decay,
            rate: rate / correction(beta1),
            beta1,
            beta2,
            correction: correction(beta2).sqrt(),
            epsilon,
        };
        let adam = |(name, master, gradient): (&String, &Var, &Tensor)| {
            let stepped = adam_step(&self.state_of(name, master, gradient)?, gradient, step)?;
            master.set(&stepped.parameter)?;
            Ok((name.clone(), stepped))
        };
        for (name, stepped) in map_each(trained, in_parallel, adam)? {
            self.first.insert(name.clone(), stepped.first);
            self.second.insert(name, stepped.second);
        }
        Ok(())
    }

    /// A master with its moments, which are 0 before the first step.
    fn state_of(&self, name: &str, master: &Var, gradient: &Tensor) -> Result<AdamState> {
        let moment =
            |moments: &BTreeMap<String, Tensor>| moments.get(name).cloned().map_or_else(|| gradient.zeros_like(), Ok);
        Ok(AdamState {
            parameter: master.as_detached_tensor(),
            first: moment(&self.first)?,
            second: moment(&self.second)?,
        })
    }
}

/// Scales all gradients so that their common norm is at most `bound`, as `torch.nn.utils.clip_grad_norm_` does; returns
/// the norm before scaling.
///
/// # Errors
/// candle rejects a computation.
pub fn clip_gradients(gradients: &mut Gradients, bound: Option<f64>) -> Result<f64> {
    // Row by row, because candle reduces to a single value in one thread block; and one read of the result at the end,
    // because each read waits for the GPU.
    let squares =
        |gradient: &Tensor| Ok(gradient.sqr()?.unsqueeze(0)?.sum(D::Minus1)?.to_dtype(DType::F64)?.sum_all()?);
    let in_parallel = are_on_cpu(gradients);
    let squares = map_each(gradients.values().collect(), in_parallel, squares)?;
    let norm = match squares[..] {
        [] => 0.0,
        _ => Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f64>()?.sqrt(),
    };
    let scale = bound.map_or(1.0, |bound| bound / (norm + 1e-6));
    if scale < 1.0 {
        let rescale = |gradient: &mut Tensor| {
            *gradient = (&*gradient * scale)?;
            Ok(())
        };
        map_each(gradients.values_mut().collect(), in_parallel, rescale)?;
    }
    Ok(norm)
}

fn are_on_cpu(gradients: &Gradients) -> bool {
    gradients.values().all(|gradient| gradient.device().is_cpu())
}
