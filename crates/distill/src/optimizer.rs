//! [`OptimizerState`]: AdamW and plain gradient descent over f32 masters, with all state in the open so that it can be
//! saved; and [`clip`].

use crate::{Gradients, Optimizer, Result};
use candle_core::{D, DType, Tensor, Var};
use std::collections::BTreeMap;

/// What an optimizer remembers between steps.
#[derive(Debug, Clone, Default)]
pub struct OptimizerState {
    /// Steps done.
    pub steps: usize,
    /// Means of the gradients.
    pub first: BTreeMap<String, Tensor>,
    /// Means of their squares.
    pub second: BTreeMap<String, Tensor>,
}

impl OptimizerState {
    /// Steps every master that has a gradient.
    ///
    /// # Errors
    /// A gradient of another shape than its master.
    pub fn step(
        &mut self,
        optimizer: Optimizer,
        rate: f64,
        masters: &BTreeMap<String, Var>,
        gradients: &Gradients,
    ) -> Result<()> {
        self.steps += 1;
        for (name, gradient) in gradients {
            let Some(master) = masters.get(name) else { continue };
            let stepped = match optimizer {
                Optimizer::Sgd => (master.as_tensor() - (gradient * rate)?)?,
                Optimizer::AdamW { weight_decay, .. } => {
                    let kept = (master.as_tensor() * (1.0 - rate * weight_decay))?;
                    (kept - self.adam(optimizer, rate, name, gradient)?)?
                }
            };
            master.set(&stepped.detach())?;
        }
        Ok(())
    }

    /// Adam's step (Kingma and Ba, arXiv 1412.6980, algorithm 1), in the order of torch's operations:
    /// rate / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε).
    fn adam(&mut self, optimizer: Optimizer, rate: f64, name: &str, gradient: &Tensor) -> Result<Tensor> {
        let Optimizer::AdamW { beta1, beta2, epsilon, .. } = optimizer else { return Ok(gradient.zeros_like()?) };
        let first = moment(self.first.get(name), beta1, gradient)?;
        let second = moment(self.second.get(name), beta2, &gradient.sqr()?)?;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let denominator = ((second.sqrt()? / correction(beta2).sqrt())? + epsilon)?;
        let step = ((&first / denominator)? * (rate / correction(beta1)))?;
        self.first.insert(name.to_owned(), first);
        self.second.insert(name.to_owned(), second);
        Ok(step)
    }
}

fn moment(before: Option<&Tensor>, beta: f64, value: &Tensor) -> candle_core::Result<Tensor> {
    let share = (value * (1.0 - beta))?;
    let moment = match before {
        Some(before) => ((before * beta)? + share)?,
        None => share,
    };
    Ok(moment.detach())
}

/// Scales all gradients so that their norm together is at most `bound`, as `torch.nn.utils.clip_grad_norm_`; gives the
/// norm before.
///
/// # Errors
/// The tensor library refused.
pub fn clip(gradients: &mut Gradients, bound: Option<f64>) -> Result<f64> {
    // Row by row, and read once: a GPU adds what goes into one number on one of its many processors.
    let squares = |gradient: &Tensor| gradient.sqr()?.unsqueeze(0)?.sum(D::Minus1)?.to_dtype(DType::F64)?.sum_all();
    let squares = gradients.values().map(squares).collect::<candle_core::Result<Vec<_>>>()?;
    let norm = match squares[..] {
        [] => 0.0,
        _ => Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f64>()?.sqrt(),
    };
    let scale = bound.map_or(1.0, |bound| bound / (norm + 1e-6));
    if scale < 1.0 {
        for gradient in gradients.values_mut() {
            *gradient = (&*gradient * scale)?;
        }
    }
    Ok(norm)
}
