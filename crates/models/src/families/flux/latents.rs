//! VAE latents to tokens of 2 x 2 places and back, as FluxPipeline packs them. It does not know the transformer.

use crate::{ModelError, Result};
use candle_core::{DType, Tensor};

/// Edge of the square of latent places that make one token.
const PATCH: usize = 2;

/// Packs latents to tokens, whose channels run over (channel, row in the patch, column in the patch); with the ids of
/// the tokens.
///
/// # Shapes
/// (batch, channels, height, width) -> (batch, height/2 · width/2, channels · 4) and (height/2 · width/2, 3) in f32.
pub(super) fn pack(latents: &Tensor) -> Result<(Tensor, Tensor)> {
    let (batch, channels, height, width) = latents.dims4()?;
    if height % PATCH != 0 || width % PATCH != 0 {
        return Err(ModelError::bad_input(
            "latents",
            format!("height and width should be even, found {height} x {width}"),
        ));
    }
    let (rows, columns) = (height / PATCH, width / PATCH);
    let patches = latents.reshape((batch * channels, rows, PATCH, columns * PATCH))?;
    let patches = patches.reshape(&[batch, channels, rows, PATCH, columns, PATCH][..])?;
    let tokens = patches.permute(&[0, 2, 4, 1, 3, 5][..])?; // (batch, rows, columns, channels, 2, 2)
    Ok((tokens.reshape((batch, rows * columns, channels * PATCH * PATCH))?, ids(rows, columns, latents)?))
}

/// The inverse of [`pack`].
///
/// # Shapes
/// (batch, height/2 · width/2, channels · 4) -> (batch, channels, height, width).
pub(super) fn unpack(tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, count, packed) = tokens.dims3()?;
    let (rows, columns, channels) = (height / PATCH, width / PATCH, packed / (PATCH * PATCH));
    let whole = height.is_multiple_of(PATCH) && width.is_multiple_of(PATCH) && packed.is_multiple_of(PATCH * PATCH);
    if !whole || count != rows * columns {
        let reason = format!("{count} tokens of {packed} channels are no latents of {height} x {width}");
        return Err(ModelError::bad_input("latents", reason));
    }
    let patches = tokens.reshape(&[batch, rows, columns, channels, PATCH, PATCH][..])?;
    let patches = patches.permute(&[0, 3, 1, 4, 2, 5][..])?; // (batch, channels, rows, 2, columns, 2)
    Ok(patches.reshape((batch, channels, height, width))?)
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
    fn a_token_holds_channel_then_row_then_column() {
        let latents = Tensor::arange(0f32, 48., &Device::Cpu).unwrap().reshape((1, 2, 4, 6)).unwrap();
        let (tokens, ids) = pack(&latents).unwrap();
        assert_eq!(tokens.dims(), [1, 6, 8]);
        let tokens = tokens.to_vec3::<f32>().unwrap().remove(0);
        assert_eq!(tokens[1], [2., 3., 8., 9., 26., 27., 32., 33.]);
        assert_eq!(tokens[3], [12., 13., 18., 19., 36., 37., 42., 43.]);
        assert_eq!(ids.to_vec2::<f32>().unwrap()[5], [0., 1., 2.]);
    }

    #[test]
    fn unpack_undoes_pack() {
        let latents = Tensor::randn(0f32, 1., (2, 3, 4, 6), &Device::Cpu).unwrap();
        let (tokens, _) = pack(&latents).unwrap();
        let back = unpack(&tokens, 4, 6).unwrap();
        assert_eq!(
            back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            latents.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
        assert!(unpack(&tokens, 6, 6).is_err());
        assert!(pack(&latents.narrow(2, 0, 3).unwrap()).is_err());
    }
}
