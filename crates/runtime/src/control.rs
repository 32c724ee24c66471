//! From a picture to what a branch is controlled by: resized, with the values it asks for, and through the VAE if it takes
//! latents.

use crate::adapters::ActiveControlNet;
use crate::control_concat::channel_axis;
use crate::pipeline::repeat;
use crate::{Pipeline, Result, RuntimeError};
use candle_core::{Device, Tensor};
use clearform_models::{BatchSpec, ImageSize};
use clearform_plugin_host::{ControlKind, ControlNetInput};
use image::RgbImage;
use image::imageops::{FilterType, resize};

impl Pipeline {
    /// What the branches are controlled by, for a batch of pictures: `pictures` in the order of the branches, or one for
    /// all of them.
    ///
    /// # Errors
    /// As many pictures as branches, or one, were expected; or a branch takes what this model does not have.
    pub fn controls(&self, pictures: &[RgbImage], batch_spec: BatchSpec) -> Result<Vec<ControlNetInput>> {
        let (found, controlnets) = (pictures.len(), self.controlnets().len());
        if found != controlnets && (found != 1 || controlnets == 0) {
            return Err(RuntimeError::BadSetting(format!(
                "control images: expected {controlnets}, one for each ControlNet (--control-image), found {found}"
            )));
        }
        let picture = |index: usize| &pictures[index.min(found - 1)];
        let one = |(index, controlnet): (usize, &ActiveControlNet)| {
            self.control(controlnet, std::slice::from_ref(picture(index)), batch_spec)
        };
        self.controlnets().iter().enumerate().map(one).collect()
    }

    /// What `schedule` is controlled by, for a batch that `pictures` share evenly.
    ///
    /// # Errors
    /// As [`Self::controls`].
    pub fn control(
        &self,
        schedule: &ActiveControlNet,
        pictures: &[RgbImage],
        BatchSpec { size, batch, guidance }: BatchSpec,
    ) -> Result<ControlNetInput> {
        let input = schedule.controlnet.input();
        let pixels = pictures.iter().map(|picture| pixels(picture, size, input.range)).collect::<Result<Vec<_>>>()?;
        let pixels = Tensor::cat(&pixels, 0)?;
        let control = match input.kind {
            ControlKind::Pixels => pixels,
            ControlKind::Latents => self.packed(&pixels)?,
        };
        let channels = control.dim(channel_axis(&control))?;
        if channels != input.channels {
            return Err(RuntimeError::BadSetting(format!(
                "{}: it takes {} channels of control, but this model's pictures give {channels}: it was made for another \
                 model",
                schedule.controlnet.path().display(),
                input.channels
            )));
        }
        let mode =
            schedule.schedule.mode.map(|mode| Tensor::full(mode as i64, (batch, 1), &Device::Cpu)).transpose()?;
        Ok(ControlNetInput {
            controlnet: schedule.controlnet.clone(),
            control: repeat(&control, batch)?,
            mode,
            guidance: Some(Tensor::full(guidance as f32, batch, &Device::Cpu)?),
            scale: schedule.scale,
            interval: schedule.schedule.interval,
        })
    }

    /// The picture that the transformer itself looks at, if it does, and those for the branches.
    pub(crate) fn split_control_images<'a>(
        &self,
        pictures: &'a [RgbImage],
    ) -> Result<(Option<&'a RgbImage>, &'a [RgbImage])> {
        match (self.takes_control(), pictures.split_first()) {
            (false, _) => Ok((None, pictures)),
            (true, Some((own, others))) => Ok((Some(own), others)),
            (true, None) => {
                let reason = "control images: the transformer draws from one (--control-image), but found none";
                Err(RuntimeError::BadSetting(reason.to_owned()))
            }
        }
    }

    /// Packed latents of the picture that the transformer itself looks at, as FluxControlPipeline encodes it.
    pub(crate) fn own_control(&self, picture: &RgbImage, size: ImageSize, batch: usize) -> Result<Tensor> {
        repeat(&self.packed(&pixels(picture, size, OWN_RANGE)?)?, batch)
    }

    /// # Shapes
    /// (batch, 3, height, width) -> (batch, image tokens, channels), the latents' means.
    fn packed(&self, pixels: &Tensor) -> Result<Tensor> {
        let vae = self.load_vae()?.ok_or_else(|| {
            RuntimeError::BadSetting("control images: this model draws pixels, and has no latents of them".to_owned())
        })?;
        let latents = vae.encode(&pixels.to_device(self.device())?)?;
        Ok(self.transformer().family().pack(&latents)?.0)
    }
}

/// What black and white become for the VAE.
const OWN_RANGE: [f64; 2] = [-1.0, 1.0];

/// A picture at `size`, with black and white at the ends of `range`.
///
/// # Shapes
/// The result is (1, 3, height, width), f32.
fn pixels(picture: &RgbImage, size: ImageSize, [low, high]: [f64; 2]) -> Result<Tensor> {
    let (width, height) = (size.width as u32, size.height as u32);
    let fitting = match picture.dimensions() == (width, height) {
        true => picture.clone(),
        false => resize(picture, width, height, FilterType::Lanczos3),
    };
    let bytes = Tensor::from_vec(fitting.into_raw(), (1, size.height, size.width, 3), &Device::Cpu)?;
    let values = bytes.to_dtype(candle_core::DType::F32)?.affine((high - low) / 255.0, low)?;
    Ok(values.permute((0, 3, 1, 2))?.contiguous()?)
}
