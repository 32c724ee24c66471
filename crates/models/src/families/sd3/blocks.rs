//! [`JointBlock`] and [`ImageBlock`]: diffusers' `JointTransformerBlock` and `SD3SingleTransformerBlock`.

use super::config::Sd3Config;
use crate::layers::{FeedForward, NORM_EPS, QkvProjections, TransformerBlock, attention, modulation};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, ModelError, Result};
use candle_core::{D, Tensor};
use clearform_attention::{Attention, AttentionPlan, Geometry, Qkv};
use clearform_ops::{gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// diffusers' `JointTransformerBlock`: image and text have separate weights and attend jointly. In SD 3.5 medium, some
/// blocks have a second attention over the image only. In the last block (`context_pre_only`) the text is not updated.
pub(crate) struct JointBlock {
    modulation: Linear,
    projections: QkvProjections,
    out: Linear,
    mlp: FeedForward,
    second_attention: Option<SelfAttention>,
    text: TextStream,
    attention: Box<dyn Attention>,
}

/// diffusers' `SD3SingleTransformerBlock`, of ControlNets that take no text.
pub(super) struct ImageBlock {
    modulation: Linear,
    attention: SelfAttention,
    mlp: FeedForward,
}

/// Attention over the image only: attn2 of a block with dual attention, and the attention of an [`ImageBlock`].
struct SelfAttention {
    projections: QkvProjections,
    out: Linear,
    attention: Box<dyn Attention>,
}

/// The text stream of a block.
struct TextStream {
    modulation: Linear,
    projections: QkvProjections,
    /// Output projection and MLP; `None` in the last block.
    output: Option<(Linear, FeedForward)>,
}

/// Shift, scale and gate of an attention or MLP, (batch, width) each.
type ModulationTriple = [Tensor; 3];

/// The modulation of a block's image stream.
struct ImageModulation {
    attention: ModulationTriple,
    mlp: ModulationTriple,
    second_attention: Option<ModulationTriple>,
}

const IMAGE: [&str; 3] = ["to_q", "to_k", "to_v"];
const IMAGE_NORMS: [&str; 2] = ["norm_q", "norm_k"];
const TEXT: [&str; 3] = ["add_q_proj", "add_k_proj", "add_v_proj"];
const TEXT_NORMS: [&str; 2] = ["norm_added_q", "norm_added_k"];

/// The name of block `index`.
pub(super) fn block_name(index: usize) -> String {
    format!("transformer_blocks.{index}")
}

impl TransformerBlock for JointBlock {
    type Config = Sd3Config;

    fn load(config: &Sd3Config, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self> {
        let name = block_name(index);
        let heads = config.heads;
        let builder = WeightBuilder::root(source).pp(&name);
        let joint = builder.pp("attn");
        let second_attention =
            || SelfAttention::load(&builder.pp("attn2"), heads, plan, &format!("{name}.attn2"), source);
        Ok(Self {
            modulation: builder.linear("norm1.linear")?,
            projections: QkvProjections::load(&joint, IMAGE, IMAGE_NORMS, heads)?,
            out: joint.linear("to_out.0")?,
            mlp: FeedForward::load(&builder.pp("ff"))?,
            second_attention: if builder.has("attn2.to_q.weight") { Some(second_attention()?) } else { None },
            text: TextStream::load(&builder, heads)?,
            attention: attention(plan, &format!("{name}.attn"), source)?,
        })
    }
}

impl JointBlock {
    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let context = &state.context;
        let text = state.text.as_ref().ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        let modulation = self.image_modulation(&context.conditioning)?;
        let [shift, scale, gate] = &modulation.attention;

        let image_qkv = self.projections.forward(&modulated_layer_norm(&state.image, shift, scale, NORM_EPS)?)?;
        let text_modulation = self.text.modulation(&context.conditioning)?;
        let text_qkv = self.text.qkv(text, &text_modulation)?;
        let attended = self.attention.attend(image_qkv, Some(text_qkv), &context.geometry)?;

        let mut image = gated_add(&state.image, gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        if let (Some(attention), Some([shift, scale, gate])) = (&self.second_attention, &modulation.second_attention) {
            let normed = modulated_layer_norm(&state.image, shift, scale, NORM_EPS)?;
            image = gated_add(&image, gate, &attention.forward(&normed, &context.geometry)?)?;
        }
        let image = feed_forward(&image, &self.mlp, &modulation.mlp)?;
        let text = self.text.finish(text, attended.text.as_ref(), &text_modulation)?;
        Ok(HiddenState { image, text: Some(text), attention: Some(attended), context: state.context })
    }

    /// The chunks of norm1's linear layer: `AdaLayerNormZero`, or `SD35AdaLayerNormZeroX` with a second attention.
    fn image_modulation(&self, conditioning: &Tensor) -> Result<ImageModulation> {
        if self.second_attention.is_none() {
            let [a, b, c, d, e, f] = modulation::<6>(&self.modulation, conditioning)?;
            return Ok(ImageModulation { attention: [a, b, c], mlp: [d, e, f], second_attention: None });
        }
        let [a, b, c, d, e, f, g, h, i] = modulation::<9>(&self.modulation, conditioning)?;
        Ok(ImageModulation { attention: [a, b, c], mlp: [d, e, f], second_attention: Some([g, h, i]) })
    }
}

impl TransformerBlock for ImageBlock {
    type Config = Sd3Config;

    fn load(config: &Sd3Config, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self> {
        let name = block_name(index);
        let builder = WeightBuilder::root(source).pp(&name);
        let layer = format!("{name}.attn");
        Ok(Self {
            modulation: builder.linear("norm1.linear")?,
            attention: SelfAttention::load(&builder.pp("attn"), config.heads, plan, &layer, source)?,
            mlp: FeedForward::load(&builder.pp("ff"))?,
        })
    }
}

impl ImageBlock {
    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let [shift, scale, gate, mlp @ ..] = modulation::<6>(&self.modulation, &state.context.conditioning)?;
        let normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        let attended = self.attention.forward(&normed, &state.context.geometry)?;
        let image = feed_forward(&gated_add(&state.image, &gate, &attended)?, &self.mlp, &mlp)?;
        Ok(HiddenState { image, ..state })
    }
}

impl SelfAttention {
    fn load(
        builder: &WeightBuilder,
        heads: usize,
        plan: &AttentionPlan,
        layer: &str,
        source: &dyn TensorSource,
    ) -> Result<Self> {
        Ok(Self {
            projections: QkvProjections::load(builder, IMAGE, IMAGE_NORMS, heads)?,
            out: builder.linear("to_out.0")?,
            attention: attention(plan, layer, source)?,
        })
    }

    /// # Shapes
    /// x (batch, image tokens, width) -> as x.
    fn forward(&self, x: &Tensor, geometry: &Geometry) -> Result<Tensor> {
        let attended = self.attention.attend(self.projections.forward(x)?, None, geometry)?;
        Ok(self.out.forward(&attended.image.flatten_from(2)?)?)
    }
}

impl TextStream {
    fn load(builder: &WeightBuilder, heads: usize) -> Result<Self> {
        let joint = builder.pp("attn");
        let output =
            || Ok::<_, ModelError>((joint.linear("to_add_out")?, FeedForward::load(&builder.pp("ff_context"))?));
        Ok(Self {
            modulation: builder.linear("norm1_context.linear")?,
            projections: QkvProjections::load(&joint, TEXT, TEXT_NORMS, heads)?,
            output: if joint.has("to_add_out.weight") { Some(output()?) } else { None },
        })
    }

    /// Shift and scale, then, except in the last block, the gate and the MLP's shift, scale and gate
    /// (`AdaLayerNormZero`). The last block's layer returns scale before shift (`AdaLayerNormContinuous`).
    fn modulation(&self, conditioning: &Tensor) -> Result<Vec<Tensor>> {
        let count = if self.output.is_some() { 6 } else { 2 };
        let mut chunks = self.modulation.forward(&conditioning.silu()?)?.chunk(count, D::Minus1)?;
        if self.output.is_none() {
            chunks.reverse();
        }
        Ok(chunks)
    }

    fn qkv(&self, text: &Tensor, modulation: &[Tensor]) -> Result<Qkv> {
        self.projections.forward(&modulated_layer_norm(text, &modulation[0], &modulation[1], NORM_EPS)?)
    }

    /// Output projection and MLP. In the last block the text is unchanged.
    ///
    /// # Shapes
    /// text (batch, text tokens, width), attended (batch, text tokens, heads, head_dim) -> as text.
    fn finish(&self, text: &Tensor, attended: Option<&Tensor>, modulation: &[Tensor]) -> Result<Tensor> {
        let (Some((out, mlp)), Some(attended), [_, _, gate, mlp_modulation @ ..]) =
            (&self.output, attended, modulation)
        else {
            return Ok(text.clone());
        };
        let text = gated_add(text, gate, &out.forward(&attended.flatten_from(2)?)?)?;
        feed_forward(&text, mlp, mlp_modulation)
    }
}

/// The MLP, with its shift, scale and gate.
fn feed_forward(x: &Tensor, mlp: &FeedForward, modulation: &[Tensor]) -> Result<Tensor> {
    let normed = modulated_layer_norm(x, &modulation[0], &modulation[1], NORM_EPS)?;
    Ok(gated_add(x, &modulation[2], &mlp.forward(&normed)?)?)
}
