//! [`Denoiser`]: a diffusion transformer that is stepped block by block.
//!
//! The step by blocks is the seam for all that must stand between blocks: residuals of a ControlNet, backward with
//! recomputation, activations for the attention loss.

use crate::Result;
use candle_core::Tensor;
use clearform_attention::{Attended, Geometry};
use std::sync::Arc;

/// What stays the same over all steps of one picture.
#[derive(Debug, Clone, Default)]
pub struct Conditions {
    /// Text features, (batch, text tokens, channels).
    pub text: Option<Tensor>,
    /// 1 where a text token counts, (batch, text tokens).
    pub text_mask: Option<Tensor>,
    /// Pooled text features, (batch, channels).
    pub pooled: Option<Tensor>,
    /// Embedded guidance scale, (batch).
    pub guidance: Option<Tensor>,
    /// Class labels, (batch).
    pub classes: Option<Tensor>,
    /// Grid, row and column of each image token in raster order, (image tokens, 3).
    pub image_ids: Option<Tensor>,
    /// The same for text, (text tokens, 3); all zero for FLUX.
    pub text_ids: Option<Tensor>,
    /// Height and width of the picture in pixels, (batch, 2).
    pub resolution: Option<Tensor>,
    /// Height through width of the picture, (batch, 1).
    pub aspect_ratio: Option<Tensor>,
}

impl Conditions {
    /// What has a row for each sample, by name.
    pub fn per_sample(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let rows = [
            ("text", &self.text),
            ("text_mask", &self.text_mask),
            ("pooled", &self.pooled),
            ("guidance", &self.guidance),
            ("classes", &self.classes),
            ("resolution", &self.resolution),
            ("aspect_ratio", &self.aspect_ratio),
        ];
        rows.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?)))
    }

    /// The same with `map` of everything that has a row for each sample, which is told its name.
    ///
    /// # Errors
    /// What `map` says.
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

    /// Samples `start..start + count` of them.
    ///
    /// # Errors
    /// There are not as many.
    pub fn samples(&self, start: usize, count: usize) -> Result<Self> {
        self.map_samples(|_, rows| Ok(rows.as_ref().map(|rows| rows.narrow(0, start, count)).transpose()?))
    }
}

/// Which step of how many. The model itself does not ask for it; what acts for a part of the way alone does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepIndex {
    /// From 0.
    pub index: usize,
    /// Steps in all.
    pub steps: usize,
}

impl Default for StepIndex {
    /// The only one.
    fn default() -> Self {
        Self { index: 0, steps: 1 }
    }
}

/// One evaluation's input, as the forward of the family's diffusers class takes it.
#[derive(Debug, Clone)]
pub struct DenoiserInput {
    /// Noisy latents: packed (batch, image tokens, channels) or (batch, channels, height, width), as the family's class.
    pub latents: Tensor,
    /// Timestep in the unit of the family's class, (batch).
    pub timestep: Tensor,
    /// Which of a picture's evaluations it is.
    pub step_index: StepIndex,
    /// Everything else.
    pub conditions: Conditions,
}

/// Cosines and sines of rotary positions, each (tokens, head_dim / 2) in f32; image in tile order.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// (cos, sin) of the image tokens.
    pub image: (Tensor, Tensor),
    /// (cos, sin) of the text tokens.
    pub text: (Tensor, Tensor),
}

/// Text that image tokens look at and that no block changes.
#[derive(Debug)]
pub struct CrossText {
    /// (batch, text tokens, width).
    pub tokens: Tensor,
    /// 1 where a text token counts, (batch, text tokens).
    pub mask: Option<Tensor>,
}

/// What every block reads and none changes.
#[derive(Debug)]
pub struct BlockContext {
    /// Timestep, guidance, class and pooled text, embedded, (batch, ..); the family says how it is divided.
    pub conditioning: Tensor,
    /// Text that is no stream of its own, where the family has cross-attention.
    pub text: Option<CrossText>,
    /// Rotary positions, where the family has them.
    pub rotary: Option<Rotary>,
    /// Where the image tokens lie.
    pub geometry: Geometry,
}

/// What travels from block to block.
#[derive(Debug, Clone)]
pub struct HiddenState {
    /// Image stream, (batch, image tokens, width), in the geometry's tile order.
    pub image: Tensor,
    /// Text stream, (batch, text tokens, width).
    pub text: Option<Tensor>,
    /// What the last block's attention gave, before its output projection; none before the first block.
    pub attention: Option<Attended>,
    /// What every block reads.
    pub context: Arc<BlockContext>,
}

/// A diffusion transformer.
pub trait Denoiser: Send + Sync {
    /// Names of the attention layers, one per block, in order ("transformer_blocks.0.attn").
    fn layers(&self) -> &[String];

    /// Embeds latents, text and conditions, and permutes image tokens to tile order.
    ///
    /// # Errors
    /// A missing or misshapen input.
    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState>;

    /// Runs block `index`.
    ///
    /// # Errors
    /// The tensor library refused.
    fn block(&self, index: usize, state: HiddenState) -> Result<HiddenState>;

    /// The prediction from the last state, shaped as the latents were, in raster order.
    ///
    /// # Errors
    /// The tensor library refused.
    fn head(&self, state: &HiddenState) -> Result<Tensor>;

    /// How many blocks there are.
    fn block_count(&self) -> usize {
        self.layers().len()
    }

    /// Embed, blocks, head.
    ///
    /// # Errors
    /// As its parts.
    fn forward(&self, input: &DenoiserInput) -> Result<Tensor> {
        let mut state = self.embed(input)?;
        for index in 0..self.block_count() {
            state = self.block(index, state)?;
        }
        self.head(&state)
    }
}
