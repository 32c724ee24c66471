//! [`ControlNetwork`]: a ControlNet of any family, and its input.

use candle_core::Tensor;
use clearform_models::DenoiserInput;
use clearform_plugin_abi::sdk::{ControlSpec, Result};

/// Pixel values for black and white, for the VAE as well as for ControlNets that take pixels.
pub const PIXEL_RANGE: [f64; 2] = [-1.0, 1.0];

/// A ControlNet beside a model of a given size.
pub trait ControlNetwork: Send + Sync {
    /// The control that it expects.
    fn control_spec(&self) -> ControlSpec;

    /// The residuals of one evaluation, each with the indexes of the model's blocks that it is added to.
    ///
    /// # Shapes
    /// Each residual is (batch, image tokens, width), in raster order.
    ///
    /// # Errors
    /// A missing or misshapen input.
    fn residuals(&self, input: &NetworkInput) -> Result<Vec<(Tensor, Vec<u32>)>>;
}

/// The input of one evaluation.
pub struct NetworkInput {
    /// The model's own input.
    pub model: DenoiserInput,
    /// The control.
    pub control: Tensor,
    /// Mode of each image, (batch, 1).
    pub mode: Option<Tensor>,
    /// The latents as the model embeds them, (batch, image tokens, width) in raster order.
    pub embedded: Option<Tensor>,
}

/// Compares sizes that a ControlNet and its model must share: (key, the ControlNet's, the model's).
///
/// # Errors
/// A size that differs.
pub fn check_sizes(sizes: &[(&str, usize, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, net, base)| net != base) {
        None => Ok(()),
        Some((name, net, base)) => {
            Err(format!("{name}: expected {base} as in the model, found {net}: the ControlNet is for another model"))
        }
    }
}
