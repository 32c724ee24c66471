//! [`FluxControlNet`]: diffusers' `FluxControlNetModel`, a copy of FLUX's first blocks that takes a control image and
//! whose outputs are residuals for the blocks of the transformer.

use super::config::FluxConfig;
use super::latents;
use super::model::FluxTrunk;
use crate::weight_builder::{Linear, WeightBuilder};
use crate::{BlockContext, DenoiserInput, HiddenState, ModelError, Result, Rotary};
use candle_core::Tensor;
use candle_nn::{Conv2d, Conv2dConfig, Module as _};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use std::sync::Arc;

/// diffusers' `FluxControlNetModel`.
pub struct FluxControlNet {
    trunk: FluxTrunk,
    control_embedder: Linear,
    hint: Option<HintBlock>,
    /// One token per mode of a union ControlNet, (modes, width).
    modes: Option<Tensor>,
    double_outputs: Vec<Linear>,
    single_outputs: Vec<Linear>,
}

/// Outputs of a ControlNet, one per block: (batch, image tokens, width), in raster order.
#[derive(Debug, Clone)]
pub struct FluxResiduals {
    /// `controlnet_block_samples`: of double-stream blocks.
    pub double: Vec<Tensor>,
    /// `controlnet_single_block_samples`: of single-stream blocks.
    pub single: Vec<Tensor>,
}

/// diffusers' `ControlNetConditioningEmbedding`, which XLabs' ControlNets have: convolutions from an image to features
/// at an eighth of its size.
struct HintBlock(Vec<Conv2d>);

impl FluxControlNet {
    /// Builds the ControlNet from `source`, with the tensor names of diffusers, and the attention of `plan`.
    ///
    /// # Errors
    /// A tensor that is missing.
    pub fn build(config: FluxConfig, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Self> {
        let builder = WeightBuilder::root(source);
        let outputs = |name: &str, count: usize| -> Result<Vec<Linear>> {
            (0..count).map(|index| builder.pp(name).linear(&index.to_string())).collect()
        };
        let modes = "controlnet_mode_embedder.weight";
        Ok(Self {
            control_embedder: builder.linear("controlnet_x_embedder")?,
            hint: HintBlock::load(&builder.pp("input_hint_block"))?,
            modes: builder.has(modes).then(|| builder.tensor(modes)).transpose()?,
            double_outputs: outputs("controlnet_blocks", config.double_blocks)?,
            single_outputs: outputs("controlnet_single_blocks", config.single_blocks)?,
            trunk: FluxTrunk::build(config, source, plan)?,
        })
    }

    /// Sizes of the ControlNet.
    pub fn config(&self) -> &FluxConfig {
        self.trunk.config()
    }

    /// Whether the control is an image in pixels, not its latents.
    pub fn takes_pixels(&self) -> bool {
        self.hint.is_some()
    }

    /// Number of modes of a union ControlNet; 0 for others.
    pub fn modes(&self) -> usize {
        self.modes.as_ref().map_or(0, |modes| modes.dims()[0])
    }

    /// The residuals for one forward of the transformer.
    ///
    /// # Shapes
    /// control (batch, image tokens, channels), or (batch, 3, height, width) if [`Self::takes_pixels`];
    /// mode (batch, 1).
    ///
    /// # Errors
    /// A missing or misshapen input.
    pub fn forward(&self, input: &DenoiserInput, control: &Tensor, mode: Option<&Tensor>) -> Result<FluxResiduals> {
        let mut input = input.clone();
        if !self.config().guidance {
            input.conditions.guidance = None;
        }
        let mut state = self.trunk.embed(&input)?;
        let control = self.embed_control(&control.to_dtype(input.latents.dtype())?, input.latents.dim(1)?)?;
        state.image = (&state.image + state.context.geometry.to_tiles(&control)?)?;
        state = self.with_mode(state, mode)?;
        let mut residuals = Vec::new();
        for (index, output) in self.double_outputs.iter().chain(&self.single_outputs).enumerate() {
            state = self.trunk.block(index, state)?;
            residuals.push(state.context.geometry.to_raster(&output.forward(&state.image)?)?);
        }
        let single = residuals.split_off(self.double_outputs.len());
        Ok(FluxResiduals { double: residuals, single })
    }

    /// The embedded control.
    ///
    /// # Shapes
    /// As in [`Self::forward`] -> (batch, image tokens, width).
    fn embed_control(&self, control: &Tensor, tokens: usize) -> Result<Tensor> {
        let control = match &self.hint {
            Some(hint) => latents::pack(&hint.forward(control)?)?.0,
            None => control.clone(),
        };
        let channels = self.config().in_channels;
        if control.rank() != 3 || control.dim(1)? != tokens || control.dim(2)? != channels {
            let reason = format!("expected {tokens} tokens of {channels} channels, found {:?}", control.dims());
            return Err(ModelError::bad_input(CONTROL, reason));
        }
        Ok(self.control_embedder.forward(&control)?)
    }

    /// Prepends the mode of a union ControlNet to the text, as a token at the position of the first text token.
    fn with_mode(&self, state: HiddenState, mode: Option<&Tensor>) -> Result<HiddenState> {
        let (Some(modes), Some(text)) = (&self.modes, &state.text) else { return Ok(state) };
        let mode = mode.ok_or_else(|| ModelError::missing_input(MODE))?;
        let batch = text.dim(0)?;
        let token = modes.index_select(&self.mode_indices(mode, batch)?, 0)?.unsqueeze(1)?; // (batch, 1, width)
        let text = Tensor::cat(&[&token.to_dtype(text.dtype())?, text], 1)?;
        let shared = || ModelError::bad_input(MODE, "the context is shared; pass a state from embed");
        let context = Arc::into_inner(state.context).ok_or_else(shared)?;
        let rotary = context.rotary.map(repeat_first_text_position).transpose()?;
        Ok(HiddenState { text: Some(text), context: Arc::new(BlockContext { rotary, ..context }), ..state })
    }

    /// Checks modes (batch, 1), and converts them to indices (batch) in u32.
    fn mode_indices(&self, mode: &Tensor, batch: usize) -> Result<Tensor> {
        let modes: Vec<i64> = mode.flatten_all()?.to_dtype(candle_core::DType::I64)?.to_vec1()?;
        let known = 0..self.modes() as i64;
        match modes.iter().find(|mode| !known.contains(mode)) {
            None if modes.len() == batch => {
                Ok(Tensor::from_iter(modes.into_iter().map(|mode| mode as u32), mode.device())?)
            }
            None => Err(ModelError::bad_input(
                MODE,
                format!("expected {batch} modes, one per sample, found {}", modes.len()),
            )),
            Some(mode) => {
                Err(ModelError::bad_input(MODE, format!("expected a mode from 0 to {}, found {mode}", known.end - 1)))
            }
        }
    }
}

const CONTROL: &str = "controlnet_cond";
const MODE: &str = "controlnet_mode";

/// Repeats the rotary embedding of the first text token, for one more token at its position.
fn repeat_first_text_position(Rotary { image, text: (cos, sin) }: Rotary) -> Result<Rotary> {
    let repeat_first = |table: Tensor| -> Result<Tensor> { Ok(Tensor::cat(&[&table.narrow(0, 0, 1)?, &table], 0)?) };
    Ok(Rotary { image, text: (repeat_first(cos)?, repeat_first(sin)?) })
}

impl HintBlock {
    /// Loads the convolutions, if there are any. Every second one in `blocks` has stride 2.
    fn load(builder: &WeightBuilder) -> Result<Option<Self>> {
        if !builder.pp("conv_in").has("weight") {
            return Ok(None);
        }
        let conv = |name: &str, stride: usize| -> Result<Conv2d> {
            let builder = builder.pp(name);
            let config = Conv2dConfig { padding: 1, stride, ..Conv2dConfig::default() };
            Ok(Conv2d::new(builder.tensor("weight")?, Some(builder.tensor("bias")?), config))
        };
        let mut layers = vec![conv("conv_in", 1)?];
        let mut index = 0;
        while builder.pp(format!("blocks.{index}")).has("weight") {
            layers.push(conv(&format!("blocks.{index}"), 1 + index % 2)?);
            index += 1;
        }
        layers.push(conv("conv_out", 1)?);
        Ok(Some(Self(layers)))
    }

    /// # Shapes
    /// (batch, 3, height, width) -> (batch, channels, height / 8, width / 8).
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = pixels.clone();
        for (index, conv) in self.0.iter().enumerate() {
            let converted = Conv2d::new(
                conv.weight().to_dtype(x.dtype())?,
                conv.bias().map(|bias| bias.to_dtype(x.dtype())).transpose()?,
                *conv.config(),
            );
            x = converted.forward(&x)?;
            if index + 1 < self.0.len() {
                x = x.silu()?;
            }
        }
        Ok(x)
    }
}
