//! [`Patches`]: pictures or latents to tokens of p x p places, and [`unpatchify`], the way back.

use crate::weight_builder::{Linear, WeightBuilder};
use crate::{ModelError, Result};
use candle_core::Tensor;
use clearform_attention::Geometry;

/// What a token's numbers run over first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelOrder {
    /// Channel, then row and column in the patch.
    First,
    /// Row and column in the patch, then channel.
    Last,
}

/// A convolution whose stride is its extent, which is a linear layer over patches.
pub(crate) struct Patches {
    projection: Linear,
    patch: usize,
}

impl Patches {
    /// Loads the layer "proj" of `scope`.
    pub(crate) fn load(builder: &WeightBuilder, patch: usize) -> Result<Self> {
        Ok(Self { projection: builder.linear("proj")?.flattened()?, patch })
    }

    /// Tokens of `latents`, with `positions` added.
    ///
    /// # Shapes
    /// latents (batch, channels, height, width), positions (1, tokens, width of the model) -> (batch, tokens, width of
    /// the model), in raster order.
    pub(crate) fn forward(&self, latents: &Tensor, positions: &Tensor) -> Result<Tensor> {
        let tokens = self.projection.forward(&patchify(latents, self.patch)?)?;
        Ok(tokens.broadcast_add(&positions.to_dtype(latents.dtype())?)?)
    }
}

/// Tokens of `patch` x `patch` places, in raster order, whose numbers run over channels first.
///
/// # Shapes
/// (batch, channels, height, width) -> (batch, height/p · width/p, channels · p²).
pub(crate) fn patchify(latents: &Tensor, patch: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = latents.dims4()?;
    if patch == 0 || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
        let reason = format!("height and width should be multiples of {patch}, found {height} x {width}");
        return Err(ModelError::bad_input("hidden_states", reason));
    }
    let (rows, columns) = (height / patch, width / patch);
    let patches = latents.reshape(&[batch, channels, rows, patch, columns, patch][..])?;
    let tokens = patches.permute(&[0, 2, 4, 1, 3, 5][..])?; // (batch, rows, columns, channels, p, p)
    Ok(tokens.reshape((batch, rows * columns, channels * patch * patch))?)
}

/// The way back from tokens of `rows` x `columns`, whose numbers have the order `order`.
///
/// # Shapes
/// (batch, rows · columns, channels · p²) -> (batch, channels, rows · p, columns · p).
pub(crate) fn unpatchify(
    tokens: &Tensor,
    (rows, columns): (usize, usize),
    patch: usize,
    order: ChannelOrder,
) -> Result<Tensor> {
    let (batch, count, packed) = tokens.dims3()?;
    let area = patch * patch;
    if area == 0 || count != rows * columns || !packed.is_multiple_of(area) {
        let reason = format!("{count} tokens of {packed} numbers are no {rows} x {columns} patches of {patch}");
        return Err(ModelError::bad_input("hidden_states", reason));
    }
    let channels = packed / area;
    let patches = match order {
        ChannelOrder::First => {
            let patches = tokens.reshape(&[batch, rows, columns, channels, patch, patch][..])?;
            patches.permute(&[0, 3, 1, 4, 2, 5][..])?
        }
        ChannelOrder::Last => {
            let patches = tokens.reshape(&[batch, rows, columns, patch, patch, channels][..])?;
            patches.permute(&[0, 5, 1, 3, 2, 4][..])?
        }
    }; // (batch, channels, rows, p, columns, p)
    Ok(patches.reshape((batch, channels, rows * patch, columns * patch))?)
}

/// Latents of tokens in the tile order of `geometry`, whose numbers run over channels last.
///
/// # Shapes
/// (batch, tokens, channels · p²) -> (batch, channels, height, width).
pub(crate) fn to_latents(tokens: &Tensor, geometry: &Geometry, patch: usize) -> Result<Tensor> {
    let grid = geometry.grids()[0];
    unpatchify(&geometry.to_raster(tokens)?, (grid.height, grid.width), patch, ChannelOrder::Last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_token_holds_channel_then_row_then_column() {
        let latents = Tensor::arange(0f32, 48., &Device::Cpu).unwrap().reshape((1, 2, 4, 6)).unwrap();
        let tokens = patchify(&latents, 2).unwrap();
        assert_eq!(tokens.dims(), [1, 6, 8]);
        let rows = tokens.to_vec3::<f32>().unwrap().remove(0);
        assert_eq!(rows[1], [2., 3., 8., 9., 26., 27., 32., 33.]);
        assert_eq!(rows[3], [12., 13., 18., 19., 36., 37., 42., 43.]);
        assert_eq!(numbers(&unpatchify(&tokens, (2, 3), 2, ChannelOrder::First).unwrap()), numbers(&latents));
        assert!(patchify(&latents.narrow(2, 0, 3).unwrap(), 2).is_err());
        assert!(unpatchify(&tokens, (3, 3), 2, ChannelOrder::First).is_err());
    }

    #[test]
    fn with_channels_last_neighbours_in_a_token_are_channels() {
        let tokens = Tensor::arange(0f32, 24., &Device::Cpu).unwrap().reshape((1, 2, 12)).unwrap();
        let picture = unpatchify(&tokens, (1, 2), 2, ChannelOrder::Last).unwrap();
        assert_eq!(picture.dims(), [1, 3, 2, 4]);
        assert_eq!(numbers(&picture)[..8], [0., 3., 12., 15., 6., 9., 18., 21.]);
        assert_eq!(numbers(&picture)[8..10], [1., 4.]);
    }
}
