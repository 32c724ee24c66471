//! Control images: resized, scaled to the range that a ControlNet takes, and encoded with the VAE if it takes latents.

use crate::adapters::ActiveControlNet;
use crate::control_concat::channel_axis;
use crate::control_mask::{covered, mask_values, with_kept};
use crate::images::resized;
use crate::stages::repeat;
use crate::{Pipeline, Result, RuntimeError};
use candle_core::{DType, Device, Tensor};
use clearform_models::vae::Autoencoder;
use clearform_models::{BatchSpec, ImageSize};
use clearform_plugin_host::{ControlInput, ControlKind, ControlNetInput};
use image::RgbImage;

/// Images that steer a batch. Each list has one image for the whole batch, or one for each of its images.
#[derive(Debug, Clone, Default)]
pub struct ControlImages {
    /// Those of the transformer itself, if it takes one.
    pub transformer: Vec<RgbImage>,
    /// Those of each ControlNet, in order.
    pub controlnets: Vec<Vec<RgbImage>>,
    /// Where ControlNets for inpainting paint anew (white) or keep the control image (black).
    pub mask: Option<RgbImage>,
}

impl Pipeline {
    /// Assigns the images that a user lists: first that of the transformer itself if it takes one, then those of the
    /// ControlNets in order. A single image serves all ControlNets.
    ///
    /// # Errors
    /// The transformer's image is missing, or the number of others is neither 1 nor that of ControlNets.
    pub fn control_images(&self, images: &[RgbImage]) -> Result<ControlImages> {
        let (transformer, others) = self.split_control_images(images)?;
        let found = others.len();
        let expected = self.controlnets().len();
        if expected == 0 && found > 0 {
            let taken = if self.takes_control() { "the model takes one" } else { "the model takes none" };
            return Err(RuntimeError::BadSetting(format!(
                "--control-image: {taken}, and there is no ControlNet for {found}: pass one with --controlnet FILE, or \
                 leave the image out"
            )));
        }
        if found != expected && found != 1 {
            return Err(RuntimeError::BadSetting(format!(
                "control images: expected {expected}, one for each ControlNet (--control-image), found {found}"
            )));
        }
        let controlnets = (0..expected).map(|index| vec![others[index.min(found - 1)].clone()]).collect();
        Ok(ControlImages { transformer: transformer.into_iter().cloned().collect(), controlnets, mask: None })
    }

    /// Checks that there is a mask if, and only if, a ControlNet takes one.
    ///
    /// # Errors
    /// A mask that none takes, or none for a ControlNet that takes one.
    pub fn check_mask(&self, mask: Option<&RgbImage>) -> Result<()> {
        let taking = self.controlnets().iter().find(|active| self.takes_mask(active));
        match (taking, mask) {
            (Some(active), None) => Err(missing_mask(active)),
            (None, Some(_)) => Err(RuntimeError::BadSetting(
                "--control-mask: no ControlNet takes a mask; pass one for inpainting with --controlnet FILE, or leave \
                 the mask out"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Whether a ControlNet takes a mask beside the latents of its control image.
    fn takes_mask(&self, active: &ActiveControlNet) -> bool {
        let ControlInput { kind, channels, .. } = active.controlnet.input();
        kind == ControlKind::Latents && channels == self.latent_spec.channels() + 1
    }

    /// Gives `images`, one for each image of a batch or one for all, to everything that takes a control image.
    pub fn shared_control_images(&self, images: &[RgbImage]) -> ControlImages {
        let transformer = if self.takes_control() { images.to_vec() } else { Vec::new() };
        ControlImages { transformer, controlnets: vec![images.to_vec(); self.controlnets().len()], mask: None }
    }

    /// The image of the transformer itself, if it takes one, and the images of the ControlNets.
    fn split_control_images<'a>(&self, images: &'a [RgbImage]) -> Result<(Option<&'a RgbImage>, &'a [RgbImage])> {
        match (self.takes_control(), images.split_first()) {
            (false, _) => Ok((None, images)),
            (true, Some((first, others))) => Ok((Some(first), others)),
            (true, None) => Err(missing_control()),
        }
    }

    /// The inputs of all ControlNets for a batch of images.
    ///
    /// # Errors
    /// A number of images that does not divide the batch, or a ControlNet of another model.
    pub(crate) fn controlnet_inputs(
        &self,
        controls: &ControlImages,
        batch_spec: BatchSpec,
    ) -> Result<Vec<ControlNetInput>> {
        let pairs = self.controlnets().iter().zip(&controls.controlnets);
        let mask = controls.mask.as_ref();
        pairs.map(|(active, images)| self.controlnet_input(active, images, mask, batch_spec)).collect()
    }

    fn controlnet_input(
        &self,
        active: &ActiveControlNet,
        images: &[RgbImage],
        mask: Option<&RgbImage>,
        BatchSpec { size, batch, guidance }: BatchSpec,
    ) -> Result<ControlNetInput> {
        let control = match self.takes_mask(active) {
            true => self.masked_control(active, images, mask.ok_or_else(|| missing_mask(active))?, size)?,
            false => self.control_values(active, images, size)?,
        };
        let mode = active.schedule.mode.map(|mode| Tensor::full(mode as i64, (batch, 1), &Device::Cpu)).transpose()?;
        Ok(ControlNetInput {
            controlnet: active.controlnet.clone(),
            control: repeat(&control, batch)?,
            mode,
            guidance: Some(Tensor::full(guidance as f32, batch, &Device::Cpu)?),
            scale: active.scale,
            interval: active.schedule.interval,
        })
    }

    /// Latents of `images` without what is painted anew, and the mask, (images, channels, height, width).
    fn masked_control(
        &self,
        active: &ActiveControlNet,
        images: &[RgbImage],
        mask: &RgbImage,
        size: ImageSize,
    ) -> Result<Tensor> {
        let input = active.controlnet.input();
        let mask = mask_values(mask, size)?;
        let pixels = covered(&all_pixels(images, size, input.range)?, &mask)?;
        with_kept(&self.encode_control(&pixels, input)?, &mask)
    }

    /// Latents of a control image in the form that the ControlNet takes.
    fn encode_control(&self, pixels: &Tensor, input: ControlInput) -> Result<Tensor> {
        match input.unshifted {
            true => self.encode_image(pixels, |vae, image, tile| vae.encode_unshifted(image, tile)),
            false => self.encode_image(pixels, |vae, image, tile| vae.encode(image, tile)),
        }
    }

    /// Pixels or latents of `images`, as the ControlNet takes them, (images, ...).
    fn control_values(&self, active: &ActiveControlNet, images: &[RgbImage], size: ImageSize) -> Result<Tensor> {
        let input = active.controlnet.input();
        let pixels = all_pixels(images, size, input.range)?;
        let control = match input.kind {
            ControlKind::Pixels => pixels,
            ControlKind::Latents => self.encode_control(&pixels, input)?,
        };
        let channels = control.dim(channel_axis(&control))?;
        if channels == input.channels {
            return Ok(control);
        }
        Err(RuntimeError::BadSetting(format!(
            "{}: expected a control image of {} channels, found {channels}: the ControlNet belongs to another model, or \
             takes more than an image and a mask, which is not supported",
            active.controlnet.path().display(),
            input.channels
        )))
    }

    /// Packed latents of the transformer's own control images, as in diffusers' `FluxControlPipeline`, for each image of the
    /// batch; `None` if it takes none.
    ///
    /// # Errors
    /// The image is missing, or the number of images does not divide the batch.
    pub fn control_latents(&self, controls: &ControlImages, batch_spec: BatchSpec) -> Result<Option<Tensor>> {
        match (self.takes_control(), &controls.transformer[..]) {
            (false, _) => Ok(None),
            (true, []) => Err(missing_control()),
            (true, images) => {
                let pixels = all_pixels(images, batch_spec.size, VAE_RANGE)?;
                let latents = self.encode_image(&pixels, |vae, image, tile| vae.encode(image, tile))?;
                repeat(&latents, batch_spec.batch).map(Some)
            }
        }
    }

    /// The means of the VAE's latents as `encode` gives them, packed if the transformer takes them so. One image at a time,
    /// as they are decoded.
    ///
    /// # Shapes
    /// (batch, 3, height, width) -> (batch, image tokens, channels) or (batch, channels, height, width).
    fn encode_image(
        &self,
        pixels: &Tensor,
        encode: impl Fn(&dyn Autoencoder, &Tensor, Option<usize>) -> clearform_models::Result<Tensor>,
    ) -> Result<Tensor> {
        let vae = self.autoencoder()?.ok_or_else(|| {
            RuntimeError::BadSetting("control images: this model has no VAE to encode them with".to_owned())
        })?;
        let (batch, _, height, width) = pixels.dims4()?;
        let size = ImageSize { height, width };
        self.check_decodable(size)?;
        let tile = self.vae_tile(size);
        let encode_one = |index| -> Result<Tensor> {
            let image = pixels.narrow(0, index, 1)?.contiguous()?.to_device(self.device())?;
            Ok(encode(vae.as_ref(), &image, tile)?)
        };
        let latents = Tensor::cat(&(0..batch).map(encode_one).collect::<Result<Vec<_>>>()?, 0)?;
        Ok(self.transformer().pipeline_spec().pack(&latents)?.0)
    }
}

fn missing_control() -> RuntimeError {
    let reason = "control images: the transformer takes one, found none; pass --control-image FILE";
    RuntimeError::BadSetting(reason.to_owned())
}

fn missing_mask(active: &ActiveControlNet) -> RuntimeError {
    RuntimeError::BadSetting(format!(
        "{}: the ControlNet takes a mask beside the control image (inpainting): pass --control-mask FILE to generate, \
         white where the image is painted anew",
        active.controlnet.path().display()
    ))
}

/// [`pixels`] of several images, (images, 3, height, width).
fn all_pixels(images: &[RgbImage], size: ImageSize, range: [f64; 2]) -> Result<Tensor> {
    if images.is_empty() {
        let reason = "control images: expected one or one for each image, found none; pass --control-image FILE";
        return Err(RuntimeError::BadSetting(reason.to_owned()));
    }
    let pixels = images.iter().map(|image| pixels(image, size, range)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&pixels, 0)?)
}

/// The values of black and white in the VAE's input.
const VAE_RANGE: [f64; 2] = [-1.0, 1.0];

/// An image resized to `size`, with black and white at the ends of the range.
///
/// # Shapes
/// The result is (1, 3, height, width), f32.
fn pixels(image: &RgbImage, size: ImageSize, [low, high]: [f64; 2]) -> Result<Tensor> {
    let bytes = Tensor::from_vec(resized(image, size).into_raw(), (1, size.height, size.width, 3), &Device::Cpu)?;
    let values = bytes.to_dtype(DType::F32)?.affine((high - low) / 255.0, low)?;
    Ok(values.permute((0, 3, 1, 2))?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn bytes_fill_the_range_channel_by_channel() {
        let image = RgbImage::from_fn(2, 1, |x, _| Rgb(if x == 0 { [0, 51, 102] } else { [255, 204, 153] }));
        let size = ImageSize { height: 1, width: 2 };
        for (range, wanted) in
            [([0.0, 1.0], [0.0, 1.0, 0.2, 0.8, 0.4, 0.6]), (VAE_RANGE, [-1.0, 1.0, -0.6, 0.6, -0.2, 0.2])]
        {
            let values = pixels(&image, size, range).unwrap();
            assert_eq!(values.dims(), [1, 3, 1, 2]);
            let values = values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().zip(wanted).all(|(got, wanted)| (got - wanted).abs() < 1e-6), "{values:?}");
        }
    }

    /// An even surface stays what it is at any size.
    #[test]
    fn other_sizes_are_resized() {
        let image = RgbImage::from_pixel(5, 3, Rgb([51, 102, 255]));
        let values = pixels(&image, ImageSize { height: 4, width: 6 }, [0.0, 1.0]).unwrap();
        assert_eq!(values.dims(), [1, 3, 4, 6]);
        let channels = values.flatten_from(2).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        for (channel, wanted) in channels.iter().zip([0.2, 0.4, 1.0]) {
            assert!(channel.iter().all(|value| (value - wanted).abs() < 1e-6), "{channel:?}");
        }
    }
}
