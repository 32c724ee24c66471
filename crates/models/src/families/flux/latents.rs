//! Packs VAE latents into tokens of 2 x 2 latent pixels, and unpacks them, as FluxPipeline does.

use crate::Result;
use crate::layers::{ChannelOrder, patchify, unpatchify};
use candle_core::{Device, Tensor};

/// Width and height of a token in latent pixels.
pub(super) const PATCH_SIZE: usize = 2;

/// `FluxPipeline._pack_latents` and `_prepare_latent_image_ids`: tokens, and their ids.
///
/// # Shapes
/// (batch, channels, height, width) -> (batch, height/2 · width/2, channels · 4), in the order (channel, row in the
/// patch, column in the patch), and ids (height/2 · width/2, 3) in f32.
pub(super) fn pack(latents: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, _, height, width) = latents.dims4()?;
    Ok((patchify(latents, PATCH_SIZE)?, ids(height / PATCH_SIZE, width / PATCH_SIZE, latents.device())?))
}

/// The inverse of [`pack`]: `FluxPipeline._unpack_latents`.
///
/// # Shapes
/// (batch, height/2 · width/2, channels · 4) -> (batch, channels, height, width).
pub(super) fn unpack(tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    unpatchify(tokens, (height / PATCH_SIZE, width / PATCH_SIZE), PATCH_SIZE, ChannelOrder::First)
}

/// Ids (0, row, column). Always f32, since bf16 cannot represent odd numbers above 256.
fn ids(rows: usize, columns: usize, device: &Device) -> Result<Tensor> {
    let ids: Vec<f32> =
        (0..rows * columns).flat_map(|token| [0, token / columns, token % columns]).map(|id| id as f32).collect();
    Ok(Tensor::from_vec(ids, (rows * columns, 3), device)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_patches_and_ids_their_rows_and_columns() {
        let latents = Tensor::arange(0f32, 48., &Device::Cpu).unwrap().reshape((1, 2, 4, 6)).unwrap();
        let (tokens, ids) = pack(&latents).unwrap();
        assert_eq!(tokens.to_vec3::<f32>().unwrap()[0][4], [14., 15., 20., 21., 38., 39., 44., 45.]);
        let expected = [[0., 0., 0.], [0., 0., 1.], [0., 0., 2.], [0., 1., 0.], [0., 1., 1.], [0., 1., 2.]];
        assert_eq!(ids.to_vec2::<f32>().unwrap(), expected);
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&unpack(&tokens, 4, 6).unwrap()), values(&latents));
        let error = unpack(&tokens, 6, 6).unwrap_err().to_string();
        assert!(error.contains("6 tokens of 8 channels do not make 3 x 3 patches"), "{error}");
    }
}
