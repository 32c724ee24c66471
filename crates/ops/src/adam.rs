//! [`adam_step`]: one pass over a parameter, its gradient and its moments.

use crate::reference::{self, AdamState, AdamStep};
use candle_core::{CpuStorage, DType, Result, Storage, Tensor};

/// A step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) in the order of operations of `torch.optim.AdamW`:
/// m and v are moved towards the gradient and its square, the parameter by −rate · m / (√v / correction + ε).
///
/// # Shapes
/// All of one shape.
///
/// # Errors
/// Shapes that differ.
pub fn adam_step(state: &AdamState, gradient: &Tensor, step: AdamStep) -> Result<AdamState> {
    let AdamState { parameter, first, second } = state;
    let inputs = [parameter, gradient, first, second];
    let is_plain = |x: &&Tensor| x.device().is_cpu() && x.dtype() == DType::F32 && x.is_contiguous();
    if !inputs.iter().all(is_plain) || inputs.iter().any(|x| x.dims() != gradient.dims()) {
        return reference::adam_step(state, gradient, step);
    }
    let guards = inputs.map(Tensor::storage_and_layout);
    let values = |index: usize| {
        let (storage, layout) = &guards[index];
        let (start, end) = layout.contiguous_offsets()?;
        let Storage::Cpu(CpuStorage::F32(values)) = &**storage else { return None };
        values.get(start..end)
    };
    let (Some(parameter), Some(gradient), Some(first), Some(second)) = (values(0), values(1), values(2), values(3))
    else {
        return reference::adam_step(state, gradient, step);
    };
    let [parameter, first, second] = stepped([parameter, gradient, first, second], step);
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, state.parameter.shape(), state.parameter.device());
    Ok(AdamState { parameter: tensor(parameter)?, first: tensor(first)?, second: tensor(second)? })
}

/// The parameter and both moments after the step, each element rounded as [`reference::adam_step`] does.
fn stepped([parameter, gradient, first, second]: [&[f32]; 4], step: AdamStep) -> [Vec<f32>; 3] {
    let [kept, rate, beta1, beta2, epsilon] =
        [step.kept, step.rate, step.beta1, step.beta2, step.epsilon].map(|value| value as f32);
    let [rest1, rest2] = [step.beta1, step.beta2].map(|beta| (1.0 - beta) as f32);
    let scale = (1.0 / step.correction) as f32;
    let mut out = [parameter, first, second].map(<[f32]>::to_vec);
    let [parameter, first, second] = &mut out;
    for (((parameter, first), second), &gradient) in
        parameter.iter_mut().zip(first.iter_mut()).zip(second.iter_mut()).zip(gradient)
    {
        *first = *first * beta1 + gradient * rest1;
        *second = *second * beta2 + gradient * gradient * rest2;
        *parameter = *parameter * kept - *first / (second.sqrt() * scale + epsilon) * rate;
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn one_pass_gives_the_bits_of_the_reference() {
        let random = || Tensor::randn(0.0f32, 1.0, (7, 5), &Device::Cpu).unwrap();
        let second = random().sqr().unwrap();
        let state = AdamState { parameter: random(), first: random(), second };
        let step = AdamStep { kept: 0.99, rate: 0.01, beta1: 0.9, beta2: 0.99, correction: 0.2, epsilon: 1e-8 };
        let gradient = random();
        let wanted = reference::adam_step(&state, &gradient, step).unwrap();
        // A part of a larger tensor has an offset.
        let shifted = Tensor::cat(&[&random(), &state.parameter], 0).unwrap().narrow(0, 7, 7).unwrap();
        for parameter in [state.parameter.clone(), shifted] {
            let got = adam_step(&AdamState { parameter, ..state.clone() }, &gradient, step).unwrap();
            for (got, wanted) in
                [(got.parameter, &wanted.parameter), (got.first, &wanted.first), (got.second, &wanted.second)]
            {
                assert_eq!(got.to_vec2::<f32>().unwrap(), wanted.to_vec2::<f32>().unwrap());
            }
        }
        assert!(adam_step(&state, &gradient.t().unwrap(), step).is_err(), "shapes that differ");
    }
}
