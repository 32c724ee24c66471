//! [`JointBlock`]: SD3's transformer block. It knows neither how attention is computed nor where the image tokens lie.

use crate::layers::{FeedForward, NORM_EPS, QkvProjections, attention, modulation};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{HiddenState, ModelError, Result};
use candle_core::{D, Tensor};
use clearform_attention::{Attention, AttentionPlan, Geometry, Qkv};
use clearform_ops::{gated_add, modulated_layer_norm};
use clearform_weights::TensorSource;

/// A block with weights of its own for image and text, joined by attention. In some blocks the image attends to itself
/// a second time; in the last one the text is only looked at.
pub(super) struct JointBlock {
    modulation: Linear,
    projections: QkvProjections,
    out: Linear,
    mlp: FeedForward,
    second: Option<SelfAttention>,
    text: TextStream,
    attention: Box<dyn Attention>,
}

/// The second attention of a dual block (SD 3.5 medium), over the image alone.
struct SelfAttention {
    projections: QkvProjections,
    out: Linear,
    attention: Box<dyn Attention>,
}

/// The text's half of a block.
struct TextStream {
    modulation: Linear,
    projections: QkvProjections,
    /// None in the last block.
    rest: Option<(Linear, FeedForward)>,
}

/// Shift, scale and gate of one step of a block, (batch, width) each.
type ModulationTriple = [Tensor; 3];

const IMAGE: [&str; 3] = ["to_q", "to_k", "to_v"];
const IMAGE_NORMS: [&str; 2] = ["norm_q", "norm_k"];
const TEXT: [&str; 3] = ["add_q_proj", "add_k_proj", "add_v_proj"];
const TEXT_NORMS: [&str; 2] = ["norm_added_q", "norm_added_k"];

impl JointBlock {
    /// Loads the block `name` of `source`, with `heads` heads and the attention that `plan` has for it.
    pub(super) fn load(source: &dyn TensorSource, name: &str, heads: usize, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source).pp(name);
        let joint = builder.pp("attn");
        let second = || -> Result<SelfAttention> {
            let own = builder.pp("attn2");
            Ok(SelfAttention {
                projections: QkvProjections::load(&own, IMAGE, IMAGE_NORMS, heads)?,
                out: own.linear("to_out.0")?,
                attention: attention(plan, &format!("{name}.attn2"), source)?,
            })
        };
        Ok(Self {
            modulation: builder.linear("norm1.linear")?,
            projections: QkvProjections::load(&joint, IMAGE, IMAGE_NORMS, heads)?,
            out: joint.linear("to_out.0")?,
            mlp: FeedForward::load(&builder.pp("ff"))?,
            second: if builder.has("attn2.to_q.weight") { Some(second()?) } else { None },
            text: TextStream::load(&builder, heads)?,
            attention: attention(plan, &format!("{name}.attn"), source)?,
        })
    }

    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let context = &state.context;
        let text = state.text.as_ref().ok_or_else(|| ModelError::missing_input("encoder_hidden_states"))?;
        let (first, mlp, second) = self.steps(&context.conditioning)?;
        let [shift, scale, gate] = &first;

        let image_qkv = self.projections.forward(&modulated_layer_norm(&state.image, shift, scale, NORM_EPS)?)?;
        let text_steps = self.text.steps(&context.conditioning)?;
        let text_qkv = self.text.qkv(text, &text_steps)?;
        let attended = self.attention.attend(&image_qkv, Some(&text_qkv), &context.geometry)?;

        let mut image = gated_add(&state.image, gate, &self.out.forward(&attended.image.flatten_from(2)?)?)?;
        if let (Some(attention), Some([shift, scale, gate])) = (&self.second, &second) {
            let normed = modulated_layer_norm(&state.image, shift, scale, NORM_EPS)?;
            image = gated_add(&image, gate, &attention.forward(&normed, &context.geometry)?)?;
        }
        let image = feed_forward(&image, &self.mlp, &mlp)?;
        let text = self.text.finish(text, attended.text.as_ref(), &text_steps)?;
        Ok(HiddenState { image, text: Some(text), attention: Some(attended), context: state.context })
    }

    /// The steps of attention, MLP and second attention, in the order in which one layer gives them.
    fn steps(&self, conditioning: &Tensor) -> Result<(ModulationTriple, ModulationTriple, Option<ModulationTriple>)> {
        if self.second.is_none() {
            let [a, b, c, d, e, f] = modulation::<6>(&self.modulation, conditioning)?;
            return Ok(([a, b, c], [d, e, f], None));
        }
        let [a, b, c, d, e, f, g, h, i] = modulation::<9>(&self.modulation, conditioning)?;
        Ok(([a, b, c], [d, e, f], Some([g, h, i])))
    }
}

impl SelfAttention {
    fn forward(&self, x: &Tensor, geometry: &Geometry) -> Result<Tensor> {
        let attended = self.attention.attend(&self.projections.forward(x)?, None, geometry)?;
        Ok(self.out.forward(&attended.image.flatten_from(2)?)?)
    }
}

impl TextStream {
    fn load(builder: &WeightBuilder, heads: usize) -> Result<Self> {
        let joint = builder.pp("attn");
        let rest = || Ok::<_, ModelError>((joint.linear("to_add_out")?, FeedForward::load(&builder.pp("ff_context"))?));
        Ok(Self {
            modulation: builder.linear("norm1_context.linear")?,
            projections: QkvProjections::load(&joint, TEXT, TEXT_NORMS, heads)?,
            rest: if joint.has("to_add_out.weight") { Some(rest()?) } else { None },
        })
    }

    /// Shift and scale first; then, where the text goes on, a gate and the step of its MLP. The last block's layer gives
    /// scale before shift (diffusers' AdaLayerNormContinuous).
    fn steps(&self, conditioning: &Tensor) -> Result<Vec<Tensor>> {
        let parts = if self.rest.is_some() { 6 } else { 2 };
        let mut steps = self.modulation.forward(&conditioning.silu()?)?.chunk(parts, D::Minus1)?;
        if self.rest.is_none() {
            steps.reverse();
        }
        Ok(steps)
    }

    fn qkv(&self, text: &Tensor, steps: &[Tensor]) -> Result<Qkv> {
        self.projections.forward(&modulated_layer_norm(text, &steps[0], &steps[1], NORM_EPS)?)
    }

    fn finish(&self, text: &Tensor, attended: Option<&Tensor>, steps: &[Tensor]) -> Result<Tensor> {
        let (Some((out, mlp)), Some(attended), [_, _, gate, step @ ..]) = (&self.rest, attended, steps) else {
            return Ok(text.clone());
        };
        let text = gated_add(text, gate, &out.forward(&attended.flatten_from(2)?)?)?;
        feed_forward(&text, mlp, step)
    }
}

fn feed_forward(x: &Tensor, mlp: &FeedForward, step: &[Tensor]) -> Result<Tensor> {
    let normed = modulated_layer_norm(x, &step[0], &step[1], NORM_EPS)?;
    Ok(gated_add(x, &step[2], &mlp.forward(&normed)?)?)
}
