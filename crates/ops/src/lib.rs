//! Differentiable operations of a diffusion transformer.
//!
//! Each is one pass over the rows in f32, f64 or bf16, with a backward that computes only the gradients that are
//! needed. [`mod@reference`] has the same operations in plain tensor algebra: they are the specification, and the
//! fallback where there is no kernel. [`simd`] compiles arithmetic for several instruction sets. [`TorchGenerator`]
//! makes the random numbers of PyTorch. Nothing here knows a model.

mod adam;
mod addition;
mod convolution;
#[cfg(feature = "cuda")]
pub mod cuda;
mod gated;
mod gelu;
mod gemm;
mod gpu_limit;
mod group_norm;
mod joining;
mod kernel;
mod linear;
mod matrix_rows;
mod mersenne;
mod norm;
mod quantize;
mod quantized_linear;
pub mod reference;
mod rope;
#[cfg(any(test, feature = "cuda"))]
mod row_copy;
mod silu;
pub mod simd;
mod strided_product;
mod torch_generator;
mod wide_attention;
mod winograd;

pub use adam::adam_step;
pub use addition::add;
pub use clearform_weights::ProductPrecision;
pub use convolution::{activated_convolution, convolution, has_bf16_products, upsampled_convolution};
pub use gated::gated_add;
pub use gelu::gelu;
pub use gpu_limit::{MAX_GPU_ELEMENTS, check_gpu_dims, check_gpu_size};
pub use group_norm::{GroupMoments, group_norm};
pub use joining::{by_tokens, concatenate, slice};
pub use linear::{dense_linear, linear};
pub use norm::{modulated_layer_norm, rms_norm, rms_norm_rope};
pub use quantize::quantize;
pub use reference::{AdamState, AdamStep};
pub use rope::rope;
pub use silu::{silu, swiglu};
pub use torch_generator::TorchGenerator;
pub use wide_attention::wide_attention;
pub use winograd::ChannelAffine;
