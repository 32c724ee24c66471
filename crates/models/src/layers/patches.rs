//! [`PatchEmbed`] and [`patchify`]: images or latents to tokens of p x p pixels; [`unpatchify`]: the inverse.

use crate::weight_builder::{Linear, WeightBuilder};
use crate::{ModelError, Result};
use candle_core::Tensor;
use clearform_attention::Geometry;

/// The order of the values in a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelOrder {
    /// (channel, row in the patch, column in the patch), channel slowest: FLUX and the input of every model.
    First,
    /// (row in the patch, column in the patch, channel), channel fastest: the output of DiT, SD3 and PixArt.
    Last,
}

/// diffusers' `PatchEmbed`: a convolution whose stride equals its kernel size, computed as a linear layer over patches.
pub(crate) struct PatchEmbed {
    projection: Linear,
    patch_size: usize,
}

impl PatchEmbed {
    /// Loads the convolution "proj".
    pub(crate) fn load(builder: &WeightBuilder, patch_size: usize) -> Result<Self> {
        Ok(Self { projection: builder.linear("proj")?.flattened()?, patch_size })
    }

    /// Channels that it takes.
    pub(crate) fn channels(&self) -> Result<usize> {
        Ok(self.projection.inputs() / (self.patch_size * self.patch_size))
    }

    /// Tokens of `latents` in raster order.
    ///
    /// # Shapes
    /// latents (batch, channels, height, width) -> (batch, tokens, inner width).
    pub(crate) fn tokens(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(self.projection.forward(&patchify(latents, self.patch_size)?)?)
    }

    /// Tokens of `latents` in raster order, plus `positions`.
    ///
    /// # Shapes
    /// latents (batch, channels, height, width), positions (1, tokens, inner width) -> (batch, tokens, inner width).
    pub(crate) fn forward(&self, latents: &Tensor, positions: &Tensor) -> Result<Tensor> {
        Ok(self.tokens(latents)?.broadcast_add(&positions.to_dtype(latents.dtype())?)?)
    }
}

/// Tokens of p x p pixels, p = `patch_size`, in raster order, as [`ChannelOrder::First`].
///
/// # Shapes
/// (batch, channels, height, width) -> (batch, height/p · width/p, channels · p²).
pub(crate) fn patchify(latents: &Tensor, patch_size: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = latents.dims4()?;
    if patch_size == 0 || !height.is_multiple_of(patch_size) || !width.is_multiple_of(patch_size) {
        let reason = format!("expected height and width divisible by {patch_size}, found {height} x {width}");
        return Err(ModelError::bad_input("hidden_states", reason));
    }
    let rows = height / patch_size;
    let columns = width / patch_size;
    let patches = latents.reshape(&[batch, channels, rows, patch_size, columns, patch_size][..])?;
    let tokens = patches.permute(&[0, 2, 4, 1, 3, 5][..])?; // (batch, rows, columns, channels, p, p)
    Ok(tokens.reshape((batch, rows * columns, channels * patch_size * patch_size))?)
}

/// The inverse of [`patchify`] for a grid of `rows` x `columns` tokens in `order`.
///
/// # Shapes
/// (batch, rows · columns, channels · p²) -> (batch, channels, rows · p, columns · p).
pub(crate) fn unpatchify(
    tokens: &Tensor,
    (rows, columns): (usize, usize),
    patch_size: usize,
    order: ChannelOrder,
) -> Result<Tensor> {
    let (batch, count, packed) = tokens.dims3()?;
    let area = patch_size * patch_size;
    if area == 0 || count != rows * columns || !packed.is_multiple_of(area) {
        let reason =
            format!("{count} tokens of {packed} channels do not make {rows} x {columns} patches of size {patch_size}");
        return Err(ModelError::bad_input("hidden_states", reason));
    }
    let channels = packed / area;
    let patches = match order {
        ChannelOrder::First => {
            let patches = tokens.reshape(&[batch, rows, columns, channels, patch_size, patch_size][..])?;
            patches.permute(&[0, 3, 1, 4, 2, 5][..])?
        }
        ChannelOrder::Last => {
            let patches = tokens.reshape(&[batch, rows, columns, patch_size, patch_size, channels][..])?;
            patches.permute(&[0, 5, 1, 3, 2, 4][..])?
        }
    }; // (batch, channels, rows, p, columns, p)
    Ok(patches.reshape((batch, channels, rows * patch_size, columns * patch_size))?)
}

/// Latents of tokens in the tile order of `geometry`, as [`ChannelOrder::Last`].
///
/// # Shapes
/// (batch, tokens, channels · p²) -> (batch, channels, height, width).
pub(crate) fn to_latents(tokens: &Tensor, geometry: &Geometry, patch_size: usize) -> Result<Tensor> {
    let grid = geometry.grids()[0];
    unpatchify(&geometry.to_raster(tokens)?, (grid.height, grid.width), patch_size, ChannelOrder::Last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn tokens_are_in_order_channel_row_column() {
        let latents = Tensor::arange(0f32, 48., &Device::Cpu).unwrap().reshape((1, 2, 4, 6)).unwrap();
        let tokens = patchify(&latents, 2).unwrap();
        assert_eq!(tokens.dims(), [1, 6, 8]);
        let rows = tokens.to_vec3::<f32>().unwrap().remove(0);
        assert_eq!(rows[1], [2., 3., 8., 9., 26., 27., 32., 33.]);
        assert_eq!(rows[3], [12., 13., 18., 19., 36., 37., 42., 43.]);
        assert_eq!(values(&unpatchify(&tokens, (2, 3), 2, ChannelOrder::First).unwrap()), values(&latents));
        let odd = patchify(&latents.narrow(2, 0, 3).unwrap(), 2).unwrap_err().to_string();
        assert!(odd.contains("divisible by 2, found 3 x 6"), "{odd}");
        let too_few = unpatchify(&tokens, (3, 3), 2, ChannelOrder::First).unwrap_err().to_string();
        assert!(too_few.contains("6 tokens of 8 channels do not make 3 x 3 patches of size 2"), "{too_few}");
    }

    #[test]
    fn channels_vary_fastest_in_order_last() {
        let tokens = Tensor::arange(0f32, 24., &Device::Cpu).unwrap().reshape((1, 2, 12)).unwrap();
        let image = unpatchify(&tokens, (1, 2), 2, ChannelOrder::Last).unwrap();
        assert_eq!(image.dims(), [1, 3, 2, 4]);
        assert_eq!(values(&image)[..8], [0., 3., 12., 15., 6., 9., 18., 21.]);
        assert_eq!(values(&image)[8..10], [1., 4.]);
    }
}
