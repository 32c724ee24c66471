//! What SD3's transformer and its ControlNets embed alike: [`LatentEmbedder`] and [`TimeTextEmbedder`].

use super::config::Sd3Config;
use crate::layers::{Mlp, PatchEmbed, expect, sinusoidal_embedding};
use crate::weight_builder::WeightBuilder;
use crate::{DenoiserInput, ModelError, Result};
use candle_core::Tensor;

/// diffusers' `PatchEmbed` with a table of positions, of which it takes the centre.
pub(super) struct LatentEmbedder {
    patches: PatchEmbed,
    /// (1, max_grid · max_grid, width).
    positions: Tensor,
    patch_size: usize,
    max_grid: usize,
}

/// diffusers' `CombinedTimestepTextProjEmbeddings`.
pub(super) struct TimeTextEmbedder {
    time: Mlp,
    pooled: Mlp,
    pooled_channels: usize,
}

impl LatentEmbedder {
    /// Loads "proj" and "pos_embed".
    pub(super) fn load(builder: &WeightBuilder, config: &Sd3Config) -> Result<Self> {
        let max_grid = config.max_grid;
        Ok(Self {
            patches: PatchEmbed::load(builder, config.patch_size)?,
            positions: builder.shaped("pos_embed", &[1, max_grid * max_grid, config.width()])?,
            patch_size: config.patch_size,
            max_grid,
        })
    }

    /// Tokens in raster order.
    ///
    /// # Shapes
    /// latents (batch, channels, height, width) -> (batch, rows · columns, width).
    pub(super) fn forward(&self, latents: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        self.patches.forward(latents, &self.cropped_positions(grid)?)
    }

    /// The centre of the position embedding table, cropped to the grid (`PatchEmbed.cropped_pos_embed`).
    ///
    /// # Shapes
    /// The result is (1, rows · columns, width).
    fn cropped_positions(&self, (rows, columns): (usize, usize)) -> Result<Tensor> {
        let max_grid = self.max_grid;
        if rows > max_grid || columns > max_grid {
            let max_size = max_grid * self.patch_size;
            let reason =
                format!("this model supports latents of up to {max_size} x {max_size}; generate a smaller image");
            return Err(ModelError::bad_input("hidden_states", reason));
        }
        let top = (max_grid - rows) / 2;
        let left = (max_grid - columns) / 2;
        let table = self.positions.reshape((1, max_grid, max_grid, ()))?;
        let cropped = table.narrow(1, top, rows)?.narrow(2, left, columns)?;
        Ok(cropped.reshape((1, rows * columns, ()))?)
    }
}

impl TimeTextEmbedder {
    /// Loads "timestep_embedder" and "text_embedder".
    pub(super) fn load(builder: &WeightBuilder, config: &Sd3Config) -> Result<Self> {
        let mlp = |name: &str| Mlp::load(&builder.pp(name), ["linear_1", "linear_2"]);
        let pooled_channels = config.pooled_channels;
        Ok(Self { time: mlp("timestep_embedder")?, pooled: mlp("text_embedder")?, pooled_channels })
    }

    /// The sum of the timestep and pooled text embeddings.
    ///
    /// # Shapes
    /// The result is (batch, width).
    pub(super) fn forward(&self, input: &DenoiserInput, batch: usize) -> Result<Tensor> {
        let pooled = &input.conditions.pooled;
        let pooled = pooled.as_ref().ok_or_else(|| ModelError::missing_input("pooled_projections"))?;
        expect("pooled_projections", pooled, &[Some(batch), Some(self.pooled_channels)])?;
        let dtype = input.latents.dtype();
        let time = self.time.forward(&sinusoidal_embedding(&input.timestep, 0.0, dtype)?)?;
        Ok((time + self.pooled.forward(&pooled.to_dtype(dtype)?)?)?)
    }
}
