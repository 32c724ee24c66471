//! [`OptimizerState`]: AdamW and plain gradient descent over f32 masters, and [`clip`]. candle's own optimizers keep their
//! moments private; these are public, so that a checkpoint can save them.

use crate::{Gradients, Optimizer, Result};
use candle_core::{D, DType, Tensor, Var};
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

    /// The step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), in the order of operations of torch:
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

/// beta · before + (1 − beta) · value; `before` is 0 at the first step.
fn moment(before: Option<&Tensor>, beta: f64, value: &Tensor) -> candle_core::Result<Tensor> {
    let added = (value * (1.0 - beta))?;
    let moment = match before {
        Some(before) => ((before * beta)? + added)?,
        None => added,
    };
    Ok(moment.detach())
}

/// Scales all gradients so that their common norm is at most `bound`, as `torch.nn.utils.clip_grad_norm_` does; returns
/// the norm before scaling.
///
/// # Errors
/// candle rejects a computation.
pub fn clip_gradients(gradients: &mut Gradients, bound: Option<f64>) -> Result<f64> {
    // Row by row, because candle reduces to a single value in one thread block; and one read of the result at the end,
    // because each read waits for the GPU.
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
