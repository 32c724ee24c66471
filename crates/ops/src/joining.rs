//! [`concatenate`] and [`slice`]: tensors joined and cut along a dimension; [`by_tokens`]: a computation in parts, for
//! tensors that a GPU could not index ([`MAX_GPU_ELEMENTS`]) or that would fill the memory.

use crate::gpu_limit::MAX_GPU_ELEMENTS;
use candle_core::{Result, Tensor};

/// Elements of a tensor on the CPU that is computed at once, at most: 256 MiB in bf16. Parts of so many rows take as long
/// as the whole; a weight is packed for each of them, which is 1% of its product.
const MAX_CPU_ELEMENTS: usize = 1 << 27;

/// `tensors` next to each other along dimension `dim` (`torch.cat`); differentiable.
///
/// # Shapes
/// Equal but for dimension `dim`.
///
/// # Errors
/// Shapes that contradict each other; on a GPU, a result that it cannot index.
pub fn concatenate(tensors: &[&Tensor], dim: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(joined) = crate::cuda::concatenate(tensors, dim)? {
        return Ok(joined);
    }
    Tensor::cat(tensors, dim)
}

/// Elements `start..start + length` of dimension `dim` (`torch.narrow`); differentiable. On a GPU the result is contiguous.
///
/// # Errors
/// A range that is not inside the dimension.
pub fn slice(x: &Tensor, dim: usize, start: usize, length: usize) -> Result<Tensor> {
    let part = x.narrow(dim, start, length)?;
    #[cfg(feature = "cuda")]
    if let Some(copy) = crate::cuda::slice(x, &part, dim, start)? {
        return Ok(copy);
    }
    Ok(part)
}

/// `f` over all tokens of `inputs`, in parts small enough that no tensor of `width` channels exceeds what a GPU indexes, or
/// on a CPU a small share of the memory. `f` computes each token alone, so the result is the same.
///
/// # Shapes
/// inputs (batch, tokens, ..) -> (batch, tokens, ..).
///
/// # Errors
/// Those of `f`, or inputs of different numbers of tokens.
pub fn by_tokens<const N: usize>(
    inputs: [&Tensor; N],
    width: usize,
    f: impl Fn([&Tensor; N]) -> Result<Tensor>,
) -> Result<Tensor> {
    let on_cpu = inputs.iter().all(|x| x.device().is_cpu());
    in_parts(inputs, width, if on_cpu { MAX_CPU_ELEMENTS } else { MAX_GPU_ELEMENTS }, f)
}

fn in_parts<const N: usize>(
    inputs: [&Tensor; N],
    width: usize,
    most: usize,
    f: impl Fn([&Tensor; N]) -> Result<Tensor>,
) -> Result<Tensor> {
    let (batch, tokens) = match inputs[0].dims() {
        [batch, tokens, _, ..] => (*batch, *tokens),
        _ => return f(inputs),
    };
    let parts = token_parts(batch, tokens, width, most);
    if parts.len() <= 1 {
        return f(inputs);
    }
    let part = |[start, length]: [usize; 2]| {
        let mut slices = Vec::with_capacity(N);
        for x in inputs {
            slices.push(slice(x, 1, start, length)?);
        }
        f(std::array::from_fn(|index| &slices[index]))
    };
    let computed = parts.into_iter().map(part).collect::<Result<Vec<_>>>()?;
    concatenate(&computed.iter().collect::<Vec<_>>(), 1)
}

/// First token and number of tokens of each part, of as equal sizes as possible.
fn token_parts(batch: usize, tokens: usize, width: usize, most: usize) -> Vec<[usize; 2]> {
    let at_a_time = (most / (batch * width).max(1)).max(1);
    let count = tokens.div_ceil(at_a_time);
    let start = |part: usize| part * tokens / count.max(1);
    (0..count).map(|part| [start(part), start(part + 1) - start(part)]).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// FLUX's MLP over an 8192 x 8192 image.
    #[test]
    fn parts_of_8k_tensors_can_be_indexed() {
        let tokens = 512 * 512;
        for batch in 1..=4 {
            for width in [3072, 12288, 15360] {
                let parts = token_parts(batch, tokens, width, MAX_GPU_ELEMENTS);
                assert_eq!(parts.iter().map(|[_, length]| length).sum::<usize>(), tokens);
                assert!(parts.iter().all(|[_, length]| batch * length * width <= MAX_GPU_ELEMENTS));
                assert!(parts.len() <= (batch * tokens * width).div_ceil(MAX_GPU_ELEMENTS) + 1);
            }
        }
        assert_eq!(token_parts(1, tokens, 3072, MAX_GPU_ELEMENTS), [[0, tokens]]);
        assert_eq!(token_parts(1, tokens, 15360, MAX_GPU_ELEMENTS), [[0, tokens / 2], [tokens / 2, tokens / 2]]);
    }

    #[test]
    fn parts_equal_the_whole_with_their_gradients() {
        let x = candle_core::Var::from_tensor(&arange(30).reshape((2, 5, 3)).unwrap()).unwrap();
        let y = arange(20).reshape((2, 5, 2)).unwrap();
        let f = |[x, y]: [&Tensor; 2]| Tensor::cat(&[&x.sqr()?, &(y * 2.0)?], 2);
        let whole = f([&x, &y]).unwrap();
        let expected = whole.sum_all().unwrap().backward().unwrap();
        for most in [1, 10, 20, 29, 1000] {
            let parts = in_parts([&x, &y], 5, most, f).unwrap();
            assert_eq!(parts.to_vec3::<f32>().unwrap(), whole.to_vec3::<f32>().unwrap(), "{most}");
            let gradients = parts.sum_all().unwrap().backward().unwrap();
            let values = |store: &candle_core::backprop::GradStore| store.get(&x).unwrap().to_vec3::<f32>().unwrap();
            assert_eq!(values(&gradients), values(&expected));
        }
    }

    fn arange(count: u32) -> Tensor {
        Tensor::arange(0f32, count as f32, &Device::Cpu).unwrap()
    }
}
