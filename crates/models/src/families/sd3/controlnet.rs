//! [`Sd3ControlNet`]: diffusers' `SD3ControlNetModel`, blocks that take a control image beside the latents and whose
//! outputs are residuals for the blocks of the transformer.
//!
//! There are two forms. InstantX' is a copy of the transformer's first blocks with embedders of its own. Stability's for
//! SD 3.5 large (8b) takes the latents as the transformer embeds them, and no text but the pooled one.

use super::blocks::{ImageBlock, JointBlock};
use super::config::Sd3Config;
use super::embedders::{LatentEmbedder, TimeTextEmbedder};
use crate::config_keys::{ConfigKeys, bad};
use crate::layers::{Blocks, PatchEmbed, checked_batch, expect, grid};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, DenoiserInput, HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{AttentionPlan, Geometries};
use clearform_weights::TensorSource;
use serde_json::Value;
use std::sync::Arc;

/// Sizes and form of an SD3 ControlNet. Absent keys have the defaults of diffusers' `SD3ControlNetModel`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sd3ControlNetConfig {
    /// The sizes that the transformer has too.
    pub sizes: Sd3Config,
    /// Channels of the control beside those of the latents, such as a mask (`extra_conditioning_channels`).
    pub extra_channels: usize,
    /// Whether its blocks take the text (`joint_attention_dim` is not null).
    pub takes_text: bool,
    /// Whether it embeds the latents itself (`use_pos_embed`). Otherwise it takes them as the transformer embeds them.
    pub embeds_latents: bool,
    /// Whether the pipeline passes zeros as pooled text, and control latents without the shift of the VAE
    /// (`force_zeros_for_pooled_projection`).
    pub zero_pooled: bool,
}

/// diffusers' `SD3ControlNetModel`.
pub struct Sd3ControlNet {
    config: Sd3ControlNetConfig,
    geometries: Geometries,
    latent_embedder: Option<LatentEmbedder>,
    control_embedder: PatchEmbed,
    time_text: TimeTextEmbedder,
    blocks: ControlBlocks,
    outputs: Vec<Linear>,
}

/// The blocks of the two forms.
enum ControlBlocks {
    Joint { text_embedder: Linear, blocks: Blocks<JointBlock> },
    Image(Blocks<ImageBlock>),
}

impl Sd3ControlNetConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// A key of the wrong type or with a value that is not supported.
    pub fn new(config: &Value) -> Result<Self> {
        let keys = ConfigKeys::new(config)?;
        let embeds_latents = keys.flag("use_pos_embed", true)?;
        let positions = keys.text("pos_embed_type", "sincos")?;
        if embeds_latents && positions != "sincos" {
            return Err(bad("pos_embed_type", format!("{positions:?} is not supported, only \"sincos\"")));
        }
        Ok(Self {
            sizes: Sd3Config::new(config)?,
            extra_channels: keys.count("extra_conditioning_channels", 0)?,
            takes_text: !config.get("joint_attention_dim").is_some_and(Value::is_null),
            embeds_latents,
            zero_pooled: keys.flag("force_zeros_for_pooled_projection", true)?,
        })
    }

    /// Channels of the control.
    pub fn control_channels(&self) -> usize {
        self.sizes.in_channels + self.extra_channels
    }
}

impl Sd3ControlNet {
    /// Builds the ControlNet from `source`, with the tensor names of diffusers, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn build(config: Sd3ControlNetConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let sizes = &config.sizes;
        let embed_latents = || LatentEmbedder::load(&builder.pp("pos_embed"), sizes);
        let outputs = builder.pp("controlnet_blocks");
        Ok(Self {
            geometries: Geometries::default(),
            latent_embedder: config.embeds_latents.then(embed_latents).transpose()?,
            control_embedder: control_embedder(&builder.pp("pos_embed_input"), &config)?,
            time_text: TimeTextEmbedder::load(&builder.pp("time_text_embed"), sizes)?,
            blocks: ControlBlocks::load(&config, source, plan)?,
            outputs: (0..sizes.blocks).map(|index| outputs.linear(&index.to_string())).collect::<Result<_>>()?,
            config,
        })
    }

    /// Sizes and form of the ControlNet.
    pub fn config(&self) -> &Sd3ControlNetConfig {
        &self.config
    }

    /// The residuals for one forward of the transformer, one per block of the ControlNet. `embedded` are the latents as
    /// the transformer embeds them, which a ControlNet that does not embed them itself takes.
    ///
    /// # Shapes
    /// control (batch, [`Sd3ControlNetConfig::control_channels`], height, width) like the latents;
    /// embedded (batch, image tokens, width) in raster order -> each (batch, image tokens, width) in raster order.
    ///
    /// # Errors
    /// A missing or misshapen input.
    pub fn forward(&self, input: &DenoiserInput, control: &Tensor, embedded: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut state = self.embed(input, control, embedded)?;
        let mut residuals = Vec::with_capacity(self.outputs.len());
        for (index, output) in self.outputs.iter().enumerate() {
            state = self.blocks.forward(index, state)?;
            residuals.push(state.context.geometry.to_raster(&output.forward(&state.image)?)?);
        }
        Ok(residuals)
    }

    /// The state before the first block: the embedded latents plus the embedded control.
    fn embed(&self, input: &DenoiserInput, control: &Tensor, embedded: Option<&Tensor>) -> Result<HiddenState> {
        let latents = &input.latents;
        let sizes = &self.config.sizes;
        let batch = checked_batch(latents, &input.timestep, sizes.in_channels)?;
        let (_, _, height, width) = latents.dims4()?;
        expect(CONTROL, control, &[Some(batch), Some(self.config.control_channels()), Some(height), Some(width)])?;
        let (grid_size, geometry) = grid(latents, sizes.patch_size, &self.geometries)?;
        let image = match &self.latent_embedder {
            Some(embedder) => embedder.forward(latents, grid_size)?,
            None => self.embedded(embedded, batch, grid_size)?.to_dtype(latents.dtype())?,
        }; // (batch, image tokens, width)
        let image = (image + self.control_embedder.tokens(&control.to_dtype(latents.dtype())?)?)?;
        Ok(HiddenState {
            image: geometry.to_tiles(&image)?,
            text: self.blocks.embed_text(input, batch, sizes.text_channels)?,
            attention: None,
            context: Arc::new(BlockContext {
                conditioning: self.time_text.forward(input, batch)?,
                rotary: None,
                text: None,
                geometry,
            }),
        })
    }

    /// Checks the latents that the transformer embedded.
    fn embedded<'a>(
        &self,
        embedded: Option<&'a Tensor>,
        batch: usize,
        (rows, columns): (usize, usize),
    ) -> Result<&'a Tensor> {
        let embedded = embedded.ok_or_else(|| ModelError::missing_input(EMBEDDED))?;
        expect(EMBEDDED, embedded, &[Some(batch), Some(rows * columns), Some(self.config.sizes.width())])?;
        Ok(embedded)
    }
}

impl ControlBlocks {
    fn load(config: &Sd3ControlNetConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let sizes = &config.sizes;
        if !config.takes_text {
            return Ok(Self::Image(Blocks::load(sizes.blocks, sizes, source, plan)?));
        }
        Ok(Self::Joint {
            text_embedder: WeightBuilder::root(source).linear("context_embedder")?,
            blocks: Blocks::load(sizes.blocks, sizes, source, plan)?,
        })
    }

    /// The text stream before the first block, (batch, text tokens, width); `None` for blocks that take no text.
    fn embed_text(&self, input: &DenoiserInput, batch: usize, channels: usize) -> Result<Option<Tensor>> {
        let Self::Joint { text_embedder, .. } = self else { return Ok(None) };
        let text = input.conditions.text.as_ref();
        let text = text.ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        expect("encoder_hidden_states", text, &[Some(batch), None, Some(channels)])?;
        Ok(Some(text_embedder.forward(&text.to_dtype(input.latents.dtype())?)?))
    }

    fn forward(&self, index: usize, state: HiddenState) -> Result<HiddenState> {
        match self {
            Self::Joint { blocks, .. } => blocks.get(index)?.forward(state),
            Self::Image(blocks) => blocks.get(index)?.forward(state),
        }
    }
}

const CONTROL: &str = "controlnet_cond";
/// Has no name in diffusers, where such a ControlNet gets the embedder itself.
const EMBEDDED: &str = "embedded latents";

/// `pos_embed_input`, which adds no positions.
fn control_embedder(builder: &WeightBuilder, config: &Sd3ControlNetConfig) -> Result<PatchEmbed> {
    let embedder = PatchEmbed::load(builder, config.sizes.patch_size)?;
    let found = embedder.channels()?;
    match found == config.control_channels() {
        true => Ok(embedder),
        false => {
            let Sd3ControlNetConfig { sizes: Sd3Config { in_channels, .. }, extra_channels, .. } = config;
            let reason = format!(
                "pos_embed_input takes {found} channels, expected {in_channels} of the latents and {extra_channels} more; \
                 state it in the ControlNet's config.json"
            );
            Err(bad("extra_conditioning_channels", reason))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn absent_keys_are_those_of_instantx() {
        let config = Sd3ControlNetConfig::new(&json!({"num_layers": 6})).unwrap();
        assert!(config.takes_text && config.embeds_latents && config.zero_pooled);
        assert_eq!((config.control_channels(), config.sizes.blocks), (16, 6));
    }

    #[test]
    fn the_form_of_stability_takes_no_text_and_embeds_nothing() {
        let keys = json!({
            "joint_attention_dim": null, "pos_embed_max_size": null, "pos_embed_type": null, "use_pos_embed": false,
            "force_zeros_for_pooled_projection": false,
        });
        let config = Sd3ControlNetConfig::new(&keys).unwrap();
        assert!(!config.takes_text && !config.embeds_latents && !config.zero_pooled);
    }

    #[test]
    fn values_that_are_not_supported_are_named() {
        let cases = [
            (json!({"pos_embed_type": "learned"}), "config key \"pos_embed_type\": \"learned\" is not supported"),
            (json!({"qk_norm": "layer_norm"}), "config key \"qk_norm\": \"layer_norm\" is not supported"),
            (json!({"use_pos_embed": "no"}), "config key \"use_pos_embed\": expected true or false"),
        ];
        for (config, expected) in cases {
            let error = Sd3ControlNetConfig::new(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
