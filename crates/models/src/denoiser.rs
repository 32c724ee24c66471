//! [`Denoiser`]: a diffusion transformer that runs block by block, and its inputs.
//!
//! Callers can act between blocks: add the residuals of a ControlNet, recompute a block in backward (gradient
//! checkpointing), or read activations for the attention loss.

use crate::{ModelError, Result};
use candle_core::Tensor;
use clearform_attention::{Attended, Geometry};
use clearform_ops::add;
use std::sync::Arc;

/// Inputs that are the same at every denoising step. A family uses those that its class has.
#[derive(Debug, Clone, Default)]
pub struct Conditions {
    /// `encoder_hidden_states`, (batch, text tokens, channels).
    pub text: Option<Tensor>,
    /// `encoder_attention_mask`, (batch, text tokens): 1 for tokens to attend to, 0 for padding.
    pub text_mask: Option<Tensor>,
    /// `pooled_projections`, (batch, channels).
    pub pooled: Option<Tensor>,
    /// Guidance scale that the transformer embeds (FLUX.1-dev), (batch).
    pub guidance: Option<Tensor>,
    /// `class_labels`, (batch).
    pub classes: Option<Tensor>,
    /// `img_ids`: grid, row and column of each image token in raster order, (image tokens, 3).
    pub image_ids: Option<Tensor>,
    /// `txt_ids`: the same for text, (text tokens, 3); all zero for FLUX.
    pub text_ids: Option<Tensor>,
    /// Height and width of the image in pixels (PixArt-alpha), (batch, 2).
    pub resolution: Option<Tensor>,
    /// Height divided by width (PixArt-alpha), (batch, 1).
    pub aspect_ratio: Option<Tensor>,
}

impl Conditions {
    /// The tensors that have one row per sample, with their names.
    pub fn per_sample(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let named = [
            ("text", &self.text),
            ("text_mask", &self.text_mask),
            ("pooled", &self.pooled),
            ("guidance", &self.guidance),
            ("classes", &self.classes),
            ("resolution", &self.resolution),
            ("aspect_ratio", &self.aspect_ratio),
        ];
        named.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?)))
    }

    /// Applies `map` to each tensor that has one row per sample, passing its name. Image and text ids are kept.
    ///
    /// # Errors
    /// Errors of `map`.
    pub fn map_samples<E>(
        &self,
        mut map: impl FnMut(&'static str, &Option<Tensor>) -> std::result::Result<Option<Tensor>, E>,
    ) -> std::result::Result<Self, E> {
        Ok(Self {
            text: map("text", &self.text)?,
            text_mask: map("text_mask", &self.text_mask)?,
            pooled: map("pooled", &self.pooled)?,
            guidance: map("guidance", &self.guidance)?,
            classes: map("classes", &self.classes)?,
            resolution: map("resolution", &self.resolution)?,
            aspect_ratio: map("aspect_ratio", &self.aspect_ratio)?,
            image_ids: self.image_ids.clone(),
            text_ids: self.text_ids.clone(),
        })
    }

    /// The conditions of samples `start..start + count`.
    ///
    /// # Errors
    /// The batch has fewer samples.
    pub fn samples(&self, start: usize, count: usize) -> Result<Self> {
        self.map_samples(|_, tensor| Ok(tensor.as_ref().map(|tensor| tensor.narrow(0, start, count)).transpose()?))
    }
}

/// Index of the denoising step. Models ignore it; a ControlNet that acts during part of the steps reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepIndex {
    /// Counted from 0.
    pub index: usize,
    /// Number of steps.
    pub steps: usize,
}

impl Default for StepIndex {
    /// The first of one step.
    fn default() -> Self {
        Self { index: 0, steps: 1 }
    }
}

/// Arguments of one forward, as the family's diffusers class takes them.
#[derive(Debug, Clone)]
pub struct DenoiserInput {
    /// Noisy latents (`hidden_states`): (batch, channels, height, width), or for FLUX packed (batch, image tokens,
    /// channels).
    pub latents: Tensor,
    /// Timestep in the range of the family's class, (batch): 0 to 1 for FLUX, 0 to 1000 for SD3.
    pub timestep: Tensor,
    /// Index of the denoising step.
    pub step_index: StepIndex,
    /// All other arguments.
    pub conditions: Conditions,
}

impl DenoiserInput {
    /// Number of samples.
    ///
    /// # Errors
    /// Latents of other than three or four dimensions, a timestep that is not one value per sample, or no samples.
    pub fn batch(&self) -> Result<usize> {
        let latents = self.latents.dims();
        let &[batch, _, _, ..] = latents else {
            let reason = "expected (batch, tokens, channels) or (batch, channels, height, width)";
            return Err(ModelError::bad_input("hidden_states", format!("{reason}, found {latents:?}")));
        };
        match self.timestep.dims() {
            [count] if *count == batch && batch > 0 => Ok(batch),
            found => {
                let reason =
                    format!("expected one value for each sample of hidden_states {latents:?}, found {found:?}");
                Err(ModelError::bad_input("timestep", reason))
            }
        }
    }

    /// The input of samples `start..start + count`.
    ///
    /// # Errors
    /// The batch has fewer samples.
    pub fn samples(&self, start: usize, count: usize) -> Result<Self> {
        Ok(Self {
            latents: self.latents.narrow(0, start, count)?,
            timestep: self.timestep.narrow(0, start, count)?,
            step_index: self.step_index,
            conditions: self.conditions.samples(start, count)?,
        })
    }
}

/// Rotary position embeddings (RoFormer, arXiv 2104.09864): cosines and sines, each (tokens, head_dim / 2) in f32.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// (cos, sin) of the image tokens, in tile order.
    pub image: (Tensor, Tensor),
    /// (cos, sin) of the text tokens.
    pub text: (Tensor, Tensor),
}

/// Text for cross-attention (PixArt). Blocks read it and do not change it.
#[derive(Debug)]
pub struct CrossText {
    /// Projected text tokens, (batch, text tokens, width).
    pub tokens: Tensor,
    /// 1 for tokens to attend to, 0 for padding, (batch, text tokens).
    pub mask: Option<Tensor>,
}

/// What all blocks read and none changes.
#[derive(Debug)]
pub struct BlockContext {
    /// The embedded timestep, guidance, class and pooled text, (batch, ..). The shape depends on the family; DiT has
    /// timestep and class as they are, because each block embeds them with weights of its own.
    pub conditioning: Tensor,
    /// Text for cross-attention, in families that have it.
    pub text: Option<CrossText>,
    /// Rotary position embeddings, in families that have them.
    pub rotary: Option<Rotary>,
    /// Grid and tile order of the image tokens.
    pub geometry: Geometry,
}

/// The state between two blocks.
#[derive(Debug, Clone)]
pub struct HiddenState {
    /// Image stream, (batch, image tokens, width), in the geometry's tile order.
    pub image: Tensor,
    /// Text stream, (batch, text tokens, width), in families with joint attention.
    pub text: Option<Tensor>,
    /// Output of the last block's attention before the output projection; `None` before the first block.
    pub attention: Option<Attended>,
    /// What all blocks read.
    pub context: Arc<BlockContext>,
}

impl HiddenState {
    /// Adds a residual to the image stream, whose shape and order it has.
    ///
    /// # Errors
    /// Another shape or dtype.
    pub fn add_to_image(&mut self, residual: &Tensor) -> Result<()> {
        self.image = add(&self.image, residual)?;
        Ok(())
    }
}

/// A diffusion transformer that predicts noise, velocity or x0 from noisy latents.
pub trait Denoiser: Send + Sync {
    /// Names of the attention layers, one per block, in order ("transformer_blocks.0.attn").
    fn layer_names(&self) -> &[String];

    /// Embeds latents, timestep and conditions, and permutes image tokens to tile order.
    ///
    /// # Errors
    /// A missing or misshapen input.
    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState>;

    /// Runs block `index`.
    ///
    /// # Errors
    /// There is no such block, or a tensor operation failed.
    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState>;

    /// The prediction from the state after the last block, in raster order and shaped like the latents. DiT and PixArt
    /// predict twice as many channels; the second half is the variance.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn head(&self, state: &HiddenState) -> Result<Tensor>;

    /// Number of blocks.
    fn block_count(&self) -> usize {
        self.layer_names().len()
    }

    /// The whole forward: [`Self::embed`], every [`Self::block`], [`Self::head`].
    ///
    /// # Errors
    /// Errors of these.
    fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
        let mut state = self.embed(input)?;
        for index in 0..self.block_count() {
            // What the block before attended to is of no use any more.
            state = self.block(index, HiddenState { attention: None, ..state })?;
        }
        self.head(&state)
    }

    /// The forward of each input, such as both evaluations of classifier-free guidance.
    ///
    /// # Errors
    /// As [`Self::forward`].
    fn forward_each(&self, inputs: &[DenoiserInput]) -> Result<Vec<Tensor>> {
        inputs.iter().map(|input| self.forward(input)).collect()
    }
}
