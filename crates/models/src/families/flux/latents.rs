//! VAE latents to tokens of 2 x 2 places and back, as FluxPipeline packs them. It does not know the transformer.

use crate::Result;
use crate::layers::{ChannelOrder, patchify, unpatchify};
use candle_core::{DType, Tensor};

/// Edge of the square of latent places that make one token.
pub(super) const PATCH: usize = 2;

/// Packs latents to tokens, whose channels run over (channel, row in the patch, column in the patch); with the ids of
/// the tokens.
///
/// # Shapes
/// (batch, channels, height, width) -> (batch, height/2 · width/2, channels · 4) and (height/2 · width/2, 3) in f32.
pub(super) fn pack(latents: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, _, height, width) = latents.dims4()?;
    Ok((patchify(latents, PATCH)?, ids(height / PATCH, width / PATCH, latents)?))
}

/// The inverse of [`pack`].
///
/// # Shapes
/// (batch, height/2 · width/2, channels · 4) -> (batch, channels, height, width).
pub(super) fn unpack(tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    unpatchify(tokens, (height / PATCH, width / PATCH), PATCH, ChannelOrder::First)
}

/// f32 whatever the latents: bf16 has no odd numbers above 256.
fn ids(rows: usize, columns: usize, like: &Tensor) -> Result<Tensor> {
    let ids: Vec<f32> =
        (0..rows * columns).flat_map(|token| [0, token / columns, token % columns]).map(|id| id as f32).collect();
    Ok(Tensor::from_vec(ids, (rows * columns, 3), like.device())?.to_dtype(DType::F32)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn ids_are_rows_and_columns() {
        let latents = Tensor::zeros((1, 2, 4, 6), DType::F32, &Device::Cpu).unwrap();
        let (tokens, ids) = pack(&latents).unwrap();
        assert_eq!(tokens.dims(), [1, 6, 8]);
        assert_eq!(ids.to_vec2::<f32>().unwrap()[5], [0., 1., 2.]);
        assert!(unpack(&tokens, 6, 6).is_err());
    }
}
