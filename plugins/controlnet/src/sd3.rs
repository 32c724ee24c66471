//! ControlNets for Stable Diffusion 3 and 3.5: [`Sd3Network`].

use crate::identified_file::{IdentifiedFile, model_message};
use crate::injection::sd3_blocks;
use crate::network::{ControlNetwork, NetworkInput, PIXEL_RANGE, check_sizes};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_models::families::sd3::{Sd3Config, Sd3ControlNet, Sd3ControlNetConfig};
use clearform_plugin_abi::sdk::{ControlSpec, Result};
use clearform_plugin_abi::{CONTROL_LATENTS, LOG_INFO};
use serde_json::Value;

/// A ControlNet for Stable Diffusion 3.
struct Sd3Network {
    net: Sd3ControlNet,
    /// The blocks of the model that each residual is added to.
    blocks: Vec<Vec<u32>>,
    /// Values of black and white in the VAE's input.
    range: [f64; 2],
}

/// Embeds the control.
const CONTROL_EMBEDDER: &str = "pos_embed_input.proj.weight";
/// The tensor in which Stability's files say what their control is.
const CONTROL_TYPE: &str = "control_type";
/// Its value for edges.
const CANNY: f64 = 1.0;
/// Stability's ControlNet of edges was trained on images that were encoded with these values for black and white:
/// `vae_encode` in their code, `SD3CannyImageProcessor` in the model card.
const CANNY_RANGE: [f64; 2] = [0.5, 128.0];

/// Opens a ControlNet for a model with the config.json `base`.
///
/// # Errors
/// A tensor that is missing or unknown, a setting that is not supported, or a ControlNet for another model.
pub fn open(file: &IdentifiedFile, base: &Value, plan: &AttentionPlan) -> Result<Box<dyn ControlNetwork>> {
    let base = Sd3Config::new(base).map_err(|error| format!("the model's config: {error}"))?;
    let config = with_mask(Sd3ControlNetConfig::new(file.config()).map_err(model_message)?, file);
    let net = file.build(|source, plan| Sd3ControlNet::build(config, source, plan), plan)?;
    let config = net.config();
    check_config(config, &base)?;
    let blocks = sd3_blocks(config.sizes.blocks, base.blocks);
    let range = pixel_range(file, config)?;
    Ok(Box::new(Sd3Network { net, blocks, range }))
}

/// The config with one more channel for a mask, if the tensors have it and config.json does not say: nets for
/// inpainting are older than the key.
fn with_mask(config: Sd3ControlNetConfig, file: &IdentifiedFile) -> Sd3ControlNetConfig {
    let channels = file.shape(CONTROL_EMBEDDER).and_then(|shape| shape.get(1).copied());
    let has_mask = channels == Some(config.sizes.in_channels + 1) && !file.states("extra_conditioning_channels");
    let extra_channels = if has_mask { 1 } else { config.extra_channels };
    Sd3ControlNetConfig { extra_channels, ..config }
}

/// Residuals are added to the model's tokens, and both take the same latents and text embeddings.
fn check_config(config: &Sd3ControlNetConfig, base: &Sd3Config) -> Result<()> {
    let sizes = &config.sizes;
    check_sizes(&[
        ("width", sizes.width(), base.width()),
        ("in_channels", sizes.in_channels, base.in_channels),
        ("patch_size", sizes.patch_size, base.patch_size),
        ("pooled_projection_dim", sizes.pooled_channels, base.pooled_channels),
    ])?;
    let text = [("joint_attention_dim", sizes.text_channels, base.text_channels)];
    if config.takes_text { check_sizes(&text) } else { Ok(()) }
}

/// Values of black and white. Only Stability's own files say whether the control is edges; in diffusers' folder of the
/// same ControlNet it is the user who has to know.
fn pixel_range(file: &IdentifiedFile, config: &Sd3ControlNetConfig) -> Result<[f64; 2]> {
    let control_type = if file.layout() == "original" { file.number(CONTROL_TYPE)? } else { None };
    if control_type.is_none() && !config.embeds_latents {
        file.log(
            LOG_INFO,
            "the control image is encoded from -1 to 1, as StableDiffusion3ControlNetPipeline does. If this is \
             Stability's ControlNet of edges (canny), use their file sd3.5_large_controlnet_canny.safetensors, which \
             says so: it takes other values",
        );
    }
    Ok(if control_type == Some(CANNY) { CANNY_RANGE } else { PIXEL_RANGE })
}

impl ControlNetwork for Sd3Network {
    fn control_spec(&self) -> ControlSpec {
        let config = self.net.config();
        ControlSpec {
            control: CONTROL_LATENTS,
            channels: config.control_channels() as u32,
            range: self.range,
            // The pipeline for inpainting shifts the latents of every control image.
            unshifted: config.zero_pooled && config.extra_channels == 0,
            zero_pooled: config.zero_pooled,
            embedded_latents: !config.embeds_latents,
            ..ControlSpec::default()
        }
    }

    fn residuals(&self, input: &NetworkInput) -> Result<Vec<(Tensor, Vec<u32>)>> {
        let NetworkInput { model, control, embedded, .. } = input;
        let residuals = self.net.forward(model, control, embedded.as_ref()).map_err(model_message)?;
        Ok(residuals.into_iter().zip(self.blocks.iter().cloned()).collect())
    }
}
