//! [`PipelineSpec`]: what the pipeline around a diffusion transformer does, as far as it depends on the family.

use crate::text::TextEncoders;
use crate::{BatchSpec, Conditions, GuidanceKind, ImageSize, NoiseProcess, Prompt, Result};
use candle_core::{Device, Tensor};

/// The family's part of a diffusers pipeline: encoding, guidance, noise process, and the form of latents.
pub trait PipelineSpec: Send + Sync {
    /// How training mixes latents with noise, and what the transformer predicts.
    fn noise_process(&self) -> NoiseProcess;

    /// How the pipeline spaces the sigmas of a flow before the scheduler shifts them.
    fn spacing(&self) -> StepSpacing {
        StepSpacing::Even
    }

    /// How the guidance scale acts.
    fn guidance_kind(&self) -> GuidanceKind;

    /// Width and height of a token in latent pixels (or image pixels, for a model without a VAE).
    fn patch_size(&self) -> usize;

    /// Width and height of the training images in latent pixels (or image pixels), if the config states it.
    fn sample_size(&self) -> Option<usize> {
        None
    }

    /// The size in which an image of `size` is generated, before it is resized: some pipelines take only sizes of
    /// training (`use_resolution_binning`).
    fn generated_size(&self, size: ImageSize) -> ImageSize {
        size
    }

    /// Encodes prompts with the text encoders of the pipeline, or turns classes into labels.
    ///
    /// # Shapes
    /// Every tensor has one row per prompt, except the ids of text tokens.
    ///
    /// # Errors
    /// A text for a class-conditional model or the reverse, or a text encoder that is not available.
    fn encode(&self, prompts: &[Prompt], encoders: &dyn TextEncoders) -> Result<Conditions>;

    /// Adds to `conditions` what depends on the image size and the guidance scale, not on the prompt.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn add_size_conditions(
        &self,
        conditions: Conditions,
        batch_spec: BatchSpec,
        device: &Device,
    ) -> Result<Conditions> {
        let _ = (batch_spec, device);
        Ok(conditions)
    }

    /// Whether the transformer takes the guidance scale as an input.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn embeds_guidance(&self) -> Result<bool> {
        let size = ImageSize { height: self.patch_size(), width: self.patch_size() };
        let batch_spec = BatchSpec { size, batch: 1, guidance: 0.0 };
        Ok(self.add_size_conditions(Conditions::default(), batch_spec, &Device::Cpu)?.guidance.is_some())
    }

    /// Converts latents to the transformer's input, and computes the ids of the image tokens where the family has them
    /// (`FluxPipeline._pack_latents`).
    ///
    /// # Shapes
    /// (batch, channels, height, width) -> as [`DenoiserInput::latents`](crate::DenoiserInput::latents), and ids (image
    /// tokens, 3).
    ///
    /// # Errors
    /// A height or width that is not a multiple of the patch size.
    fn pack(&self, latents: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        Ok((latents.clone(), None))
    }

    /// The inverse of [`Self::pack`], for latents of `height` x `width`.
    ///
    /// # Shapes
    /// As [`DenoiserInput::latents`](crate::DenoiserInput::latents) -> (batch, channels, height, width).
    ///
    /// # Errors
    /// A number of tokens that does not match the size.
    fn unpack(&self, packed: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        crate::layers::expect("latents", packed, &[None, None, Some(height), Some(width)])?;
        Ok(packed.clone())
    }
}

/// How the sigmas of a flow are spaced before the scheduler shifts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StepSpacing {
    /// Evenly from 1 to 1 / steps: the `sigmas` that FluxPipeline passes to `set_timesteps`.
    #[default]
    Even,
    /// Evenly over the training timesteps: `set_timesteps(steps)`, as StableDiffusion3Pipeline calls it.
    Trained,
}
