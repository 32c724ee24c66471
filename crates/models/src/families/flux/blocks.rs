//! [`FluxBlock`]: a [`DoubleBlock`] or a [`SingleBlock`], diffusers' `FluxTransformerBlock` and
//! `FluxSingleTransformerBlock`.

use super::config::FluxConfig;
use crate::layers::{FeedForward, NORM_EPS, TransformerBlock, attention, modulation, split_heads};
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, HiddenState, ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{Attended, Attention, AttentionPlan, Qkv};
use clearform_ops::{by_tokens, concatenate, gated_add, gelu, modulated_layer_norm, rms_norm_rope};
use clearform_weights::TensorSource;

/// Cosines and sines, (tokens, head_dim / 2) each.
type CosSin = (Tensor, Tensor);

/// A block of FLUX. The double-stream blocks come first.
pub(crate) enum FluxBlock {
    Double(Box<DoubleBlock>),
    Single(Box<SingleBlock>),
}

/// diffusers' `FluxTransformerBlock`: image and text have separate weights and attend jointly.
pub(crate) struct DoubleBlock {
    image: Stream,
    text: Stream,
    attention: Box<dyn Attention>,
}

/// diffusers' `FluxSingleTransformerBlock`: image and text share the weights; attention and MLP run in parallel.
pub(crate) struct SingleBlock {
    modulation: Linear,
    projections: RotatedQkv,
    mlp: Linear,
    out: Linear,
    attention: Box<dyn Attention>,
}

/// The image or text stream of a double block.
struct Stream {
    modulation: Linear,
    projections: RotatedQkv,
    out: Linear,
    mlp: FeedForward,
}

/// Projections to queries, keys and values, with RMS norms and RoPE (diffusers' `FluxAttnProcessor`).
struct RotatedQkv {
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: Tensor,
    key_norm: Tensor,
}

/// Names of a stream's layers in a double block.
struct StreamNames {
    modulation: &'static str,
    projections: [&'static str; 5],
    out: &'static str,
    mlp: &'static str,
}

const IMAGE: StreamNames = StreamNames {
    modulation: "norm1.linear",
    projections: ["to_q", "to_k", "to_v", "norm_q", "norm_k"],
    out: "attn.to_out.0",
    mlp: "ff",
};

const TEXT: StreamNames = StreamNames {
    modulation: "norm1_context.linear",
    projections: ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"],
    out: "attn.to_add_out",
    mlp: "ff_context",
};

/// The name of block `index`, counting double-stream blocks first.
pub(super) fn block_name(config: &FluxConfig, index: usize) -> String {
    match index.checked_sub(config.double_blocks) {
        None => format!("transformer_blocks.{index}"),
        Some(single) => format!("single_transformer_blocks.{single}"),
    }
}

impl TransformerBlock for FluxBlock {
    type Config = FluxConfig;

    fn load(config: &FluxConfig, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self> {
        let name = block_name(config, index);
        let builder = WeightBuilder::root(source).pp(&name);
        let attention = attention(plan, &format!("{name}.attn"), source)?;
        Ok(match index < config.double_blocks {
            true => Self::Double(Box::new(DoubleBlock::load(&builder, attention)?)),
            false => Self::Single(Box::new(SingleBlock::load(&builder, attention)?)),
        })
    }
}

impl FluxBlock {
    pub(super) fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        match self {
            Self::Double(block) => block.forward(state),
            Self::Single(block) => block.forward(state),
        }
    }
}

impl DoubleBlock {
    fn load(builder: &WeightBuilder, attention: Box<dyn Attention>) -> Result<Self> {
        Ok(Self { image: Stream::load(builder, &IMAGE)?, text: Stream::load(builder, &TEXT)?, attention })
    }

    fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let context = &state.context;
        let rotary = rotary(&state.context)?;
        let text = text(&state)?;
        let image_modulation = modulation::<6>(&self.image.modulation, &context.conditioning)?;
        let text_modulation = modulation::<6>(&self.text.modulation, &context.conditioning)?;

        let image_qkv = self.image.qkv(&state.image, &image_modulation, &rotary.image)?;
        let text_qkv = self.text.qkv(text, &text_modulation, &rotary.text)?;
        let attended = self.attention.attend(image_qkv, Some(text_qkv), &context.geometry)?;

        let image = self.image.finish(&state.image, &attended.image, &image_modulation)?;
        let text = self.text.finish(text, attended_text(&attended)?, &text_modulation)?;
        Ok(HiddenState { image, text: Some(text), attention: Some(attended), context: state.context })
    }
}

impl SingleBlock {
    fn load(builder: &WeightBuilder, attention: Box<dyn Attention>) -> Result<Self> {
        Ok(Self {
            modulation: builder.linear("norm.linear")?,
            projections: RotatedQkv::load(&builder.pp("attn"), IMAGE.projections)?,
            mlp: builder.linear("proj_mlp")?,
            out: builder.linear("proj_out")?,
            attention,
        })
    }

    fn forward(&self, state: HiddenState) -> Result<HiddenState> {
        let context = &state.context;
        let rotary = rotary(&state.context)?;
        let text = text(&state)?;
        let [shift, scale, gate] = modulation::<3>(&self.modulation, &context.conditioning)?;
        let image_normed = modulated_layer_norm(&state.image, &shift, &scale, NORM_EPS)?;
        let text_normed = modulated_layer_norm(text, &shift, &scale, NORM_EPS)?;

        let image_qkv = self.projections.forward(&image_normed, &rotary.image)?;
        let text_qkv = self.projections.forward(&text_normed, &rotary.text)?;
        let attended = self.attention.attend(image_qkv, Some(text_qkv), &context.geometry)?;

        let image = gated_add(&state.image, &gate, &self.project(&attended.image, &image_normed)?)?;
        let text = gated_add(text, &gate, &self.project(attended_text(&attended)?, &text_normed)?)?;
        Ok(HiddenState { image, text: Some(text), attention: Some(attended), context: state.context })
    }

    /// `proj_out` of the concatenated attention and MLP.
    ///
    /// # Shapes
    /// attended (batch, tokens, heads, head_dim), normed (batch, tokens, width) -> as normed.
    fn project(&self, attended: &Tensor, normed: &Tensor) -> Result<Tensor> {
        let attended = attended.flatten_from(2)?;
        let project = |[attended, normed]: [&Tensor; 2]| {
            let mlp = gelu(&self.mlp.forward(normed)?)?; // (batch, tokens, 4 width)
            self.out.forward(&concatenate(&[attended, &mlp], 2)?)
        };
        Ok(by_tokens([&attended, normed], self.out.inputs(), project)?)
    }
}

impl Stream {
    fn load(builder: &WeightBuilder, names: &StreamNames) -> Result<Self> {
        Ok(Self {
            modulation: builder.linear(names.modulation)?,
            projections: RotatedQkv::load(&builder.pp("attn"), names.projections)?,
            out: builder.linear(names.out)?,
            mlp: FeedForward::load(&builder.pp(names.mlp))?,
        })
    }

    /// # Shapes
    /// x (batch, tokens, width) -> each (batch, tokens, heads, head_dim).
    fn qkv(&self, x: &Tensor, [shift, scale, ..]: &[Tensor; 6], rotation: &CosSin) -> Result<Qkv> {
        self.projections.forward(&modulated_layer_norm(x, shift, scale, NORM_EPS)?, rotation)
    }

    /// Output projection and MLP.
    ///
    /// # Shapes
    /// x (batch, tokens, width), attended (batch, tokens, heads, head_dim) -> as x.
    fn finish(&self, x: &Tensor, attended: &Tensor, modulation: &[Tensor; 6]) -> Result<Tensor> {
        let [_, _, gate, mlp_shift, mlp_scale, mlp_gate] = modulation;
        let x = gated_add(x, gate, &self.out.forward(&attended.flatten_from(2)?)?)?;
        let normed = modulated_layer_norm(&x, mlp_shift, mlp_scale, NORM_EPS)?;
        Ok(gated_add(&x, mlp_gate, &self.mlp.forward(&normed)?)?)
    }
}

impl RotatedQkv {
    fn load(builder: &WeightBuilder, [query, key, value, query_norm, key_norm]: [&str; 5]) -> Result<Self> {
        Ok(Self {
            query: builder.linear(query)?,
            key: builder.linear(key)?,
            value: builder.linear(value)?,
            query_norm: builder.pp(query_norm).tensor("weight")?,
            key_norm: builder.pp(key_norm).tensor("weight")?,
        })
    }

    /// # Shapes
    /// x (batch, tokens, width) -> each (batch, tokens, heads, head_dim).
    fn forward(&self, x: &Tensor, (cos, sin): &CosSin) -> Result<Qkv> {
        let heads = x.dim(2)? / self.query_norm.dim(0)?.max(1);
        let rotated = |projection: &Linear, norm: &Tensor| {
            let heads = split_heads(&projection.forward(x)?, heads)?;
            Ok::<_, ModelError>(rms_norm_rope(&heads, norm, cos, sin, NORM_EPS)?)
        };
        Ok(Qkv {
            query: rotated(&self.query, &self.query_norm)?,
            key: rotated(&self.key, &self.key_norm)?,
            value: split_heads(&self.value.forward(x)?, heads)?,
        })
    }
}

fn rotary(context: &BlockContext) -> Result<&crate::Rotary> {
    context.rotary.as_ref().ok_or_else(|| not_embedded("img_ids", "the state has no rotary positions"))
}

fn text(state: &HiddenState) -> Result<&Tensor> {
    state.text.as_ref().ok_or_else(|| not_embedded("encoder_hidden_states", "the state has no text stream"))
}

fn attended_text(attended: &Attended) -> Result<&Tensor> {
    attended.text.as_ref().ok_or_else(|| not_embedded("encoder_hidden_states", "attention returned no text stream"))
}

fn not_embedded(name: &str, reason: &str) -> ModelError {
    ModelError::bad_input(name, format!("{reason}; pass a state from embed"))
}
