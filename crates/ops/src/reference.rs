//! The operations in plain tensor algebra: the specification of the fused ones, which tests compare with them. All
//! accept f64 and are differentiated by candle itself.

use crate::winograd::ChannelAffine;
use candle_core::{D, DType, Result, Tensor};
use clearform_weights::{BaseWeight, Weight};

/// x (w + Σ scale · up · down)ᵀ + b.
///
/// # Shapes
/// x (.., inputs), weight (outputs, inputs), bias (outputs) -> (.., outputs).
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let base = match &weight.base {
        BaseWeight::Dense(base) => base.clone(),
        BaseWeight::Quantized(matrix) => {
            let [rows, columns] = matrix.shape();
            let mut values = vec![0.0; rows * columns];
            matrix.dequantize(0, &mut values);
            Tensor::from_vec(values, (rows, columns), x.device())?
        }
    };
    let mut sum = base.to_dtype(x.dtype())?;
    for term in &weight.low_rank {
        let product = term.up.to_dtype(x.dtype())?.matmul(&term.down.to_dtype(x.dtype())?)?;
        sum = (sum + (product * term.scale)?)?;
    }
    dense_linear(x, &sum, bias)
}

/// The numbers of a step of Adam with decoupled weight decay.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep {
    /// The parameter is multiplied by this: 1 − rate · weight decay.
    pub kept: f64,
    /// The learning rate over 1 − β₁ᵗ.
    pub rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// √(1 − β₂ᵗ).
    pub correction: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// A parameter and its moments.
#[derive(Debug, Clone)]
pub struct AdamState {
    /// The parameter.
    pub parameter: Tensor,
    /// Running mean of its gradients.
    pub first: Tensor,
    /// Running mean of their squares.
    pub second: Tensor,
}

/// A step of Adam.
///
/// # Shapes
/// All of one shape.
pub fn adam_step(state: &AdamState, gradient: &Tensor, step: AdamStep) -> Result<AdamState> {
    let moment = |before: &Tensor, beta: f64, value: &Tensor| (before * beta)? + (value * (1.0 - beta))?;
    let first = moment(&state.first, step.beta1, gradient)?;
    let second = moment(&state.second, step.beta2, &gradient.sqr()?)?;
    let denominator = ((second.sqrt()? / step.correction)? + step.epsilon)?;
    let change = ((&first / denominator)? * step.rate)?;
    let parameter = ((&state.parameter * step.kept)? - change)?;
    Ok(AdamState { parameter: parameter.detach(), first: first.detach(), second: second.detach() })
}

/// x wᵀ + b.
///
/// # Shapes
/// x (.., inputs), weight (outputs, inputs), bias (outputs) -> (.., outputs).
pub fn dense_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let inputs = x.dim(D::Minus1)?;
    let rows: usize = x.dims().iter().rev().skip(1).product();
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    let product = x.reshape((rows, inputs))?.matmul(&weight.to_dtype(x.dtype())?.t()?)?;
    let sum = match bias {
        Some(bias) => product.broadcast_add(&bias.to_dtype(x.dtype())?)?,
        None => product,
    };
    sum.reshape(shape)
}

/// Layer norm without weights, then modulation: norm(x) (1 + scale) + shift (adaLN; DiT, section 3.2).
///
/// # Shapes
/// x (batch, tokens, width), shift and scale (batch, width) -> as x.
pub fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let shift = shift.to_dtype(x.dtype())?;
    let scale = scale.to_dtype(x.dtype())?;
    normed.broadcast_mul(&(scale.unsqueeze(1)? + 1.0)?)?.broadcast_add(&shift.unsqueeze(1)?)
}

/// Root-mean-square norm over the last dimension, then rotary position embedding on interleaved pairs (RoFormer, eq.
/// 34).
///
/// # Shapes
/// x (batch, tokens, heads, head_dim), weight (head_dim), cos and sin (tokens, head_dim / 2) -> as x.
pub fn rms_norm_rope(x: &Tensor, weight: &Tensor, cos: &Tensor, sin: &Tensor, eps: f64) -> Result<Tensor> {
    rope(&rms_norm(x, weight, eps)?, cos, sin)
}

/// Root-mean-square norm over the last dimension: x / √(mean x² + eps) · weight.
///
/// # Shapes
/// x (.., channels), weight (channels) -> as x.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(&weight.to_dtype(x.dtype())?)
}

/// x · scale + shift, for each channel of each sample.
///
/// # Shapes
/// x (batch, channels, height, width) -> as x.
///
/// # Errors
/// Shapes that contradict each other.
pub fn channel_affine(x: &Tensor, affine: &ChannelAffine) -> Result<Tensor> {
    let (batch, channels, ..) = x.dims4()?;
    let tensor = |values: &[f32]| Tensor::from_slice(values, (batch, channels, 1, 1), x.device())?.to_dtype(x.dtype());
    x.broadcast_mul(&tensor(&affine.scales)?)?.broadcast_add(&tensor(&affine.shifts)?)
}

/// Group norm over channels and pixels: (x - mean) / √(variance + eps) weight + bias, over each of `groups` groups of
/// channels.
///
/// # Shapes
/// x (batch, channels, ..), weight and bias (channels) -> as x.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    // As torch does, in f32 where x has 16 bits.
    let work = if x.dtype().size_in_bytes() < 4 { DType::F32 } else { x.dtype() };
    let grouped = x.to_dtype(work)?.reshape((batch, groups, ()))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape((batch, channels, ()))?;
    let of_channels = |values: &Tensor| values.to_dtype(work)?.reshape((1, channels, 1));
    let scaled = normed.broadcast_mul(&of_channels(weight)?)?.broadcast_add(&of_channels(bias)?)?;
    scaled.reshape(x.shape())?.to_dtype(x.dtype())
}

/// silu(gate) · x (SwiGLU).
///
/// # Shapes
/// gate and x of one shape -> the same.
pub fn swiglu(gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    gate.silu()?.mul(&x.to_dtype(gate.dtype())?)
}

/// Rotates interleaved pairs (2i, 2i + 1) of the last dimension.
///
/// # Shapes
/// x (batch, tokens, heads, head_dim), cos and sin (tokens, head_dim / 2) -> as x.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (batch, tokens, heads, head_dim) = x.dims4()?;
    let pairs = x.reshape((batch, tokens, heads, head_dim / 2, 2))?;
    let even = pairs.narrow(4, 0, 1)?.squeeze(4)?;
    let odd = pairs.narrow(4, 1, 1)?.squeeze(4)?;
    let cos = cos.to_dtype(x.dtype())?.reshape((1, tokens, 1, head_dim / 2))?;
    let sin = sin.to_dtype(x.dtype())?.reshape((1, tokens, 1, head_dim / 2))?;
    let rotated_even = (even.broadcast_mul(&cos)? - odd.broadcast_mul(&sin)?)?;
    let rotated_odd = (even.broadcast_mul(&sin)? + odd.broadcast_mul(&cos)?)?;
    Tensor::stack(&[rotated_even, rotated_odd], 4)?.reshape((batch, tokens, heads, head_dim))
}

/// residual + gate · x.
///
/// # Shapes
/// residual and x (batch, tokens, width), gate (batch, width) -> as x.
pub fn gated_add(residual: &Tensor, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    residual + x.broadcast_mul(&gate.to_dtype(x.dtype())?.unsqueeze(1)?)?
}

/// GELU in its tanh approximation.
///
/// # Shapes
/// Any.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let inner = ((x.powf(3.0)? * 0.044715)? + x)?;
    let tanh = (inner * (2.0 / std::f64::consts::PI).sqrt())?.tanh()?;
    (x * 0.5)? * (tanh + 1.0)?
}
