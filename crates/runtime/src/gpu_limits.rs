//! What a GPU cannot compute, refused before anything is loaded.

use crate::{Result, RuntimeError};
use candle_core::{DType, Device};
use clearform_models::vae::{AutoencoderSpec, VaeTiling};
use clearform_models::{ImageSize, MAX_GPU_ELEMENTS};

/// What a model computes in on `device` where nothing else is asked for: f32 on a CPU, and bf16 on a GPU, whose attention
/// kernels take 16-bit values.
pub fn default_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// Refuses dtypes that there is no attention kernel for.
///
/// # Errors
/// [`RuntimeError::BadSetting`] for a dtype other than bf16 and f16 on a GPU.
pub fn check_dtype(device: &Device, dtype: DType) -> Result<()> {
    if device.is_cpu() { Ok(()) } else { check_gpu_dtype(dtype) }
}

fn check_gpu_dtype(dtype: DType) -> Result<()> {
    if matches!(dtype, DType::BF16 | DType::F16) {
        return Ok(());
    }
    let name = dtype.as_str();
    Err(RuntimeError::BadSetting(format!(
        "dtype {name}: attention on a GPU is computed in bf16 or f16; pass --dtype bf16, or --device cpu"
    )))
}

/// Refuses images whose decoding needs tensors that candle's operations cannot index on a GPU. Tiles are small enough.
///
/// # Errors
/// [`RuntimeError::BadSetting`] with the figures.
pub(crate) fn check_decodable(
    device: &Device,
    vae: &dyn AutoencoderSpec,
    tiling: VaeTiling,
    size: ImageSize,
) -> Result<()> {
    if device.is_cpu() || tiling.tile(vae, size).is_some() {
        Ok(())
    } else {
        check_activation(vae.largest_activation(size), size)
    }
}

fn check_activation(elements: usize, ImageSize { height, width }: ImageSize) -> Result<()> {
    if elements <= MAX_GPU_ELEMENTS {
        return Ok(());
    }
    let factor = (MAX_GPU_ELEMENTS as f64 / elements as f64).sqrt();
    let [most_width, most_height] = [width, height].map(|edge| (edge as f64 * factor) as usize / 16 * 16);
    Err(RuntimeError::BadSetting(format!(
        "{width}x{height} pixels: the VAE needs a tensor of {elements} elements to decode them, and a GPU indexes at most \
         {MAX_GPU_ELEMENTS}; choose at most {most_width}x{most_height}, or pass --vae-tiling on or --device cpu"
    )))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn images_that_the_vae_cannot_index_are_refused_with_the_largest_size() {
        let size = |edge| ImageSize { height: edge, width: edge };
        let elements = |edge: usize| 256 * (edge + 2) * (edge + 2); // FLUX's VAE
        let message = check_activation(elements(4096), size(4096)).unwrap_err().to_string();
        assert!(message.starts_with("4096x4096 pixels: the VAE needs a tensor of 4299162624 elements"), "{message}");
        assert!(message.contains("choose at most 2880x2880"), "{message}");
        check_activation(elements(2880), size(2880)).unwrap();
    }

    #[test]
    fn a_gpu_refuses_f32_and_a_cpu_does_not() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            check_dtype(&Device::Cpu, dtype).unwrap();
            assert_eq!(check_gpu_dtype(dtype).is_ok(), dtype != DType::F32);
        }
        let message = check_gpu_dtype(DType::F32).unwrap_err().to_string();
        assert!(message.starts_with("dtype f32: attention on a GPU is computed in bf16 or f16"), "{message}");
    }
}
