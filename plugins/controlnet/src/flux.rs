//! ControlNets for FLUX.1: [`FluxNetwork`].

use crate::identified_file::{IdentifiedFile, model_message};
use crate::injection::FluxInjection;
use crate::network::{ControlNetwork, NetworkInput, PIXEL_RANGE, check_sizes};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_models::families::flux::{FluxConfig, FluxControlNet};
use clearform_plugin_abi::sdk::{ControlSpec, Result};
use clearform_plugin_abi::{CONTROL_LATENTS, CONTROL_PIXELS};
use serde_json::Value;

/// A ControlNet for FLUX.1.
struct FluxNetwork {
    net: FluxControlNet,
    injection: FluxInjection,
}

/// Embeds the control.
const CONTROL_EMBEDDER: &str = "controlnet_x_embedder.weight";

/// Opens a ControlNet for a model with the config.json `base`.
///
/// # Errors
/// A tensor that is missing or unknown, a setting that is not supported, or a ControlNet for another model.
pub fn open(file: &IdentifiedFile, base: &Value, plan: &AttentionPlan) -> Result<Box<dyn ControlNetwork>> {
    let base = FluxConfig::new(base).map_err(|error| format!("the model's config: {error}"))?;
    let config = FluxConfig::new(file.config()).map_err(model_message)?;
    check_control_channels(file, config.in_channels)?;
    let net = file.build(|source, plan| FluxControlNet::build(config, source, plan), plan)?;
    check_patch_size(&net, file.config())?;
    // Residuals are added to the model's tokens, and both take the same text embeddings.
    let config = net.config();
    check_sizes(&[
        ("width", config.width(), base.width()),
        ("joint_attention_dim", config.text_channels, base.text_channels),
        ("pooled_projection_dim", config.pooled_channels, base.pooled_channels),
    ])?;
    let injection = FluxInjection::new(&net, &base);
    Ok(Box::new(FluxNetwork { net, injection }))
}

/// Refuses a net that takes a mask beside the latents: diffusers has no pipeline for such nets of FLUX.
fn check_control_channels(file: &IdentifiedFile, in_channels: usize) -> Result<()> {
    match file.shape(CONTROL_EMBEDDER).as_deref() {
        Some(&[_, found]) if found > in_channels => Err(format!(
            "{CONTROL_EMBEDDER:?} takes {found} channels, {} more than the latents: ControlNets of FLUX.1 that take a \
             mask too (inpainting) are not supported",
            found - in_channels
        )),
        _ => Ok(()),
    }
}

/// The features of an image are packed into tokens of 2 x 2, as the latents are.
fn check_patch_size(net: &FluxControlNet, config: &Value) -> Result<()> {
    match &config["patch_size"] {
        found if net.takes_pixels() && found.as_u64() != Some(2) => {
            Err(format!("config.json: patch_size: expected 2 for a ControlNet that takes pixels, found {found}"))
        }
        _ => Ok(()),
    }
}

impl ControlNetwork for FluxNetwork {
    fn control_spec(&self) -> ControlSpec {
        let (control, channels) = match self.net.takes_pixels() {
            true => (CONTROL_PIXELS, 3),
            false => (CONTROL_LATENTS, self.net.config().in_channels as u32),
        };
        let modes = self.net.modes() as u32;
        ControlSpec { control, channels, modes, range: PIXEL_RANGE, ..ControlSpec::default() }
    }

    fn residuals(&self, NetworkInput { model, control, mode, .. }: &NetworkInput) -> Result<Vec<(Tensor, Vec<u32>)>> {
        let residuals = self.net.forward(model, control, mode.as_ref()).map_err(model_message)?;
        Ok(self.injection.place(residuals))
    }
}
