//! The arguments of `clearform generate` and `clearform forward`.

use super::headings::{ADAPTERS, ATTENTION, DEVICE, INPUT, OUTPUT, SAMPLING};
use super::{AdapterArgs, ComponentFileArgs, DeviceArgs, DtypeArg, MemoryArgs, SeedArg, SourceArgs, VaeArgs, finite};
use clap::Args;
use std::path::PathBuf;

/// Images of a batch, at most. They are denoised together, so memory ends before.
const MOST_IMAGES: i64 = 1024;

/// `clearform generate`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  clearform generate flux-clear \"a lighthouse at dawn\" --width 2048 --height 2048 -o out.png"
)]
pub struct GenerateArgs {
    /// Portable model or diffusers folder.
    pub model: PathBuf,
    /// What the image shows; --class for class-conditional models, or --from-metadata, stand in its place.
    pub prompt: Option<String>,
    /// Class to generate, for class-conditional models.
    #[arg(long, value_name = "N", conflicts_with = "prompt", help_heading = INPUT)]
    pub class: Option<u32>,
    /// Take prompt, seed, size, steps, guidance and attention from an image that clearform or AUTOMATIC1111's web UI
    /// wrote; what is given beside it counts more.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub from_metadata: Option<PathBuf>,
    /// What the image should not show; needs classifier-free guidance.
    #[arg(long, value_name = "PROMPT", help_heading = INPUT)]
    pub negative_prompt: Option<String>,
    /// How the model is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Diffusers folder with the components that the model lacks.
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub components: Option<PathBuf>,
    /// Components in files of their own.
    #[command(flatten)]
    pub component_files: ComponentFileArgs,
    /// Attention plan: `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer [default: the model's own].
    #[arg(long, value_name = "PLAN", help_heading = ATTENTION)]
    pub attention: Option<String>,
    /// Image width [default: the model's native size].
    #[arg(long, value_name = "PIXELS", help_heading = SAMPLING)]
    pub width: Option<usize>,
    /// Image height [default: the model's native size].
    #[arg(long, value_name = "PIXELS", help_heading = SAMPLING)]
    pub height: Option<usize>,
    /// Generate images of PixArt in the size asked for, not in the nearest size of its training (use_resolution_binning
    /// in diffusers).
    #[arg(long, help_heading = SAMPLING)]
    pub no_resolution_binning: bool,
    /// Denoising steps (num_inference_steps in diffusers) [default: the variant's].
    #[arg(long, alias = "num-inference-steps", value_name = "N", help_heading = SAMPLING)]
    pub steps: Option<usize>,
    /// Guidance scale (guidance_scale in diffusers) [default: the variant's].
    #[arg(long, alias = "guidance-scale", value_parser = finite, value_name = "SCALE", help_heading = SAMPLING)]
    pub guidance: Option<f64>,
    /// Classifier-free guidance scale, as true_cfg_scale in diffusers; acts above 1 with a negative prompt [default:
    /// 1].
    #[arg(long, value_parser = finite, value_name = "SCALE", help_heading = SAMPLING)]
    pub true_cfg_scale: Option<f64>,
    /// Apply classifier-free guidance to the first N channels only (Facebook's DiT code uses 3).
    #[arg(long, value_name = "N", help_heading = SAMPLING)]
    pub guided_channels: Option<usize>,
    /// Seed: the noise is that of torch.Generator("cpu").manual_seed(N); `random` draws one and prints it [default: 0].
    #[arg(long, value_name = "N|random", help_heading = SAMPLING)]
    pub seed: Option<SeedArg>,
    /// Number of images [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST_IMAGES), help_heading = SAMPLING)]
    pub batch: Option<u32>,
    /// Adapters applied to the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// Control image: first for a Control or Fill transformer itself, then one per ControlNet, or one for all.
    #[arg(long, value_name = "FILE", help_heading = ADAPTERS)]
    pub control_image: Vec<PathBuf>,
    /// Mask for a ControlNet for inpainting: white is painted anew, black is kept as in the control image.
    #[arg(long, value_name = "FILE", help_heading = ADAPTERS)]
    pub control_mask: Option<PathBuf>,
    /// PNG, JPEG or WebP file to write, by its extension; for several images a pattern with a number (`out-%03d.png`).
    /// Where it exists, the next number is taken.
    #[arg(short, long, default_value = "out.png", value_name = "FILE", help_heading = OUTPUT)]
    pub output: String,
    /// Replace images that exist.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Where the model runs.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// Dtype to compute in [default: the file's; on a GPU bf16 for files in f32].
    #[arg(long, value_enum, help_heading = DEVICE)]
    pub dtype: Option<DtypeArg>,
    /// How the image is decoded.
    #[command(flatten)]
    pub vae: VaeArgs,
    /// How much memory may be taken.
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// `clearform forward`.
#[derive(Debug, Args)]
#[command(
    after_help = "ControlNets read the inputs `controlnet_cond` and `controlnet_mode`; where there are several, \
                  `controlnet_cond_0` and so on.\n\n\
                  Example:\n  clearform forward FLUX.1-dev --inputs inputs.safetensors -o sample.safetensors"
)]
pub struct ForwardArgs {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// Safetensors file with the inputs, named and shaped as for forward() of the diffusers class.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub inputs: PathBuf,
    /// How the model is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Attention plan: `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer [default: the model's own].
    #[arg(long, value_name = "PLAN", help_heading = ATTENTION)]
    pub attention: Option<String>,
    /// Adapters applied to the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// Safetensors file to write; it holds one tensor, `sample`, in f32.
    #[arg(short, long, value_name = "FILE", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Replace the file if it exists.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Where the model runs.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// Dtype to compute in [default: f32, on a GPU bf16].
    #[arg(long, value_enum, help_heading = DEVICE)]
    pub dtype: Option<DtypeArg>,
}
