//! [`Windowed`]: attention of a [`Window`] as one fused operation on the CPU, with its backward.
//!
//! Queries are taken 32 at a time, side by side in the lanes of a vector, and see runs of keys: whole ones without a
//! mask, edge ones with it. Softmax is online (Milakov and Gimelshein, algorithm 3), backward recomputes probabilities
//! from the maximum and sum of each query (FlashAttention-2, algorithm 2): memory grows with the tokens alone. Knows no
//! policy.

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod forward;
mod operation;
mod problem;
mod step;

use crate::sequence::Sequence;
use crate::{Attended, Attention, Geometry, Qkv, Window, reference};
#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{CustomOp3, DType, Result, Tensor};
#[cfg(feature = "cuda")]
use clearform_kernels::Refusal;
use operation::Softmax;
use problem::Problem;

#[cfg(feature = "cuda")]
pub(crate) use cuda::Known as KnownLists;

/// Attention of a window: a fused kernel where there is one for the device and the number format, and elsewhere the
/// plain reference.
pub(crate) struct Windowed(pub Window);

impl Attention for Windowed {
    fn attend(&self, image: &Qkv, text: Option<&Qkv>, geometry: &Geometry) -> Result<Attended> {
        let sequence = Sequence::new(image, text, geometry, &self.0)?;
        let out = match (image.query.device().is_cpu(), image.query.dtype()) {
            (true, DType::F32 | DType::F64 | DType::BF16) => {
                apply(&sequence, Softmax::new(Problem::new(&sequence, geometry, self.0.radius)?))?
            }
            #[cfg(feature = "cuda")]
            (false, _) if image.query.device().is_cuda() => match cuda::attend(&sequence, geometry, self.0.radius)? {
                Ok(out) => out,
                Err(refusal @ Refusal::Number { .. }) if sequence.image > PLAIN => {
                    bail!("{refusal}; give --dtype bf16")
                }
                Err(refusal) if sequence.image > PLAIN => bail!("{refusal}"),
                Err(_) => reference::over(&sequence, geometry, &self.0)?,
            },
            _ => reference::over(&sequence, geometry, &self.0)?,
        };
        sequence.split(&out, text.is_some())
    }
}

/// Image tokens up to which the plain reference, which costs their square, stands in for a kernel on a GPU.
#[cfg(feature = "cuda")]
const PLAIN: usize = 4096;

fn apply(sequence: &Sequence, operation: impl CustomOp3 + Send + Sync + 'static) -> Result<Tensor> {
    let (query, key, value) = (&sequence.query, &sequence.key, &sequence.value);
    query.contiguous()?.apply_op3(&key.contiguous()?, &value.contiguous()?, operation)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Radius, TokenGrid};
    use candle_core::{Device, Tensor};
    use clearform_ops::simd::{Factor, Pair};
    use half::bf16;

    struct Inputs {
        image: Qkv,
        text: Qkv,
        geometry: Geometry,
        window: Window,
    }

    impl Inputs {
        fn new((height, width): (usize, usize), text: usize, head_dim: usize, radius: f64) -> Self {
            let geometry = Geometry::new(vec![TokenGrid::new(height, width).unwrap()]);
            let random = |tokens: usize| {
                let one = || Tensor::randn(0f32, 1.0, (2, tokens, 2, head_dim), &Device::Cpu).unwrap();
                Qkv { query: one(), key: one(), value: one() }.converted(DType::BF16)
            };
            let window = Window { radius: Some(Radius::new(radius).unwrap()), pool: None };
            Self { image: random(height * width), text: random(text), geometry, window }
        }

        /// The plain operation in a number format, text and image in one.
        fn plain(&self, dtype: DType) -> Vec<f64> {
            let (image, text) = (self.image.converted(dtype), self.text.converted(dtype));
            let out = reference::attend(&image, Some(&text), &self.geometry, &self.window).unwrap();
            numbers(&Tensor::cat(&[&out.text.unwrap(), &out.image], 1).unwrap())
        }

        fn problem(&self) -> (Problem, [Vec<bf16>; 3]) {
            let sequence = Sequence::new(&self.image, Some(&self.text), &self.geometry, &self.window).unwrap();
            let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<bf16>().unwrap();
            let problem = Problem::new(&sequence, &self.geometry, self.window.radius).unwrap();
            (problem, [&sequence.query, &sequence.key, &sequence.value].map(values))
        }

        /// The fused kernel by products of `F`.
        fn fused<F: Factor<Sum = f32>>(&self) -> Vec<f64> {
            let (problem, [query, key, value]) = self.problem();
            let (out, _) = forward::forward::<bf16, F>(&problem, [&query, &key, &value]);
            out.into_iter().map(f64::from).collect()
        }

        /// Gradients by products of `F`, where the gradient of the output is the values' own.
        fn gradients<F: Factor<Sum = f32>>(&self) -> [Vec<f64>; 3] {
            let (problem, [query, key, value]) = self.problem();
            let (out, scales) = forward::forward::<bf16, f32>(&problem, [&query, &key, &value]);
            let scales: Vec<_> = scales.into_iter().map(|scale| scale.map(f64::from)).collect();
            let (query, key, value, out, scales) = (&query, &key, &value, &out, &scales);
            let given = backward::Given { query, key, value, out, grad: value, scales };
            backward::backward::<bf16, F>(&problem, &given).map(|grad| grad.into_iter().map(f64::from).collect())
        }
    }

    impl Qkv {
        fn converted(&self, dtype: DType) -> Self {
            let [query, key, value] = [&self.query, &self.key, &self.value].map(|x| x.to_dtype(dtype).unwrap());
            Self { query, key, value }
        }
    }

    fn numbers(x: &Tensor) -> Vec<f64> {
        x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn distance(got: &[f64], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len());
        let (mut difference, mut size) = (0.0, 0.0);
        for (got, want) in got.iter().zip(want) {
            difference += (got - want) * (got - want);
            size += want * want;
        }
        f64::sqrt(difference / size)
    }

    /// Text of odd length puts the image at odd places, ragged grids put cells there.
    #[test]
    fn pairs_of_bf16_give_what_f32_gives() {
        let cases = [((8, 8), 4, 32, 3.0), ((9, 14), 7, 24, 4.5), ((5, 7), 1, 9, 2.0), ((1, 37), 65, 16, 4.0)];
        for (grid, text, head_dim, radius) in cases {
            let inputs = Inputs::new(grid, text, head_dim, radius);
            let exact = inputs.plain(DType::F64);
            let plain = distance(&inputs.plain(DType::BF16), &exact);
            for got in [inputs.fused::<Pair>(), inputs.fused::<f32>()] {
                let error = distance(&got, &exact);
                assert!(error <= 2.0 * plain + 1e-6, "{grid:?} + {text}: {error:e}, the plain operation {plain:e}");
            }
            for (got, want) in inputs.gradients::<Pair>().iter().zip(inputs.gradients::<f32>()) {
                let error = distance(got, &want);
                assert!(error <= 1e-2, "{grid:?} + {text}: gradients differ by {error:e}");
            }
        }
    }
}
