//! The arguments of `clearform compare` and `clearform transfer`.

use super::headings::{INPUT, OUTPUT, SAMPLING};
use super::{AdapterArgs, ComponentFileArgs, DeviceArgs, MemoryArgs, SeedArg};
use clap::Args;
use std::path::PathBuf;

/// `clearform compare`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform compare FLUX.1-dev FLUX.1-dev-clear -o comparison")]
pub struct CompareArgs {
    /// The original model.
    pub teacher: PathBuf,
    /// The linear model.
    pub student: PathBuf,
    /// What both generate.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Folder to write the report to.
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Replace an earlier report in the folder.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Where both run.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// How much memory may be taken.
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// `clearform transfer`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform transfer FLUX.1-dev FLUX.1-dev-clear --lora style.safetensors -o report")]
pub struct TransferArgs {
    /// The original model.
    pub teacher: PathBuf,
    /// The linear model.
    pub student: PathBuf,
    /// A fine-tune of the original; the distilled attention is applied to it.
    #[arg(long, value_name = "MODEL", help_heading = INPUT)]
    pub fine_tune: Option<PathBuf>,
    /// What both generate.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Adapters applied to both.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// Folder to write the report and the patched fine-tunes to.
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Replace an earlier report in the folder.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Where both run.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// How much memory may be taken.
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// What two models generate from the same noise.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Prompts, or class indices, one per line; lines that begin with # are comments [default: a few built-in ones].
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub prompts: Option<PathBuf>,
    /// Diffusers folder with the components that the models lack.
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub components: Option<PathBuf>,
    /// Components in files of their own.
    #[command(flatten)]
    pub component_files: ComponentFileArgs,
    /// Control image, for ControlNets and for transformers that take one themselves: one per prompt, or one for all.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub control_image: Vec<PathBuf>,
    /// Width and height of the images, in pixels [default: the model's native size].
    #[arg(long, value_name = "PIXELS", help_heading = SAMPLING)]
    pub size: Option<usize>,
    /// Denoising steps [default: the variant's].
    #[arg(long, value_name = "N", help_heading = SAMPLING)]
    pub steps: Option<usize>,
    /// Seed of the first prompt, or `random`; each following prompt's is one higher.
    #[arg(long, default_value_t = SeedArg::default(), value_name = "N", help_heading = SAMPLING)]
    pub seed: SeedArg,
}
