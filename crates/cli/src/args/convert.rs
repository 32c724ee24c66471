//! The arguments of `clearform convert` and `clearform distill`.

use super::headings::{ATTENTION, DISTILLATION, INPUT, OUTPUT};
use super::{DeviceArgs, DtypeArg, SourceArgs, WeightAdapterArgs};
use clap::Args;
use std::path::PathBuf;

/// `clearform convert`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform convert FLUX.1-dev -o FLUX.1-dev-clear --radius 16")]
pub struct ConvertArgs {
    /// Diffusers folder, single file, or portable model.
    pub source: PathBuf,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Window radius, in tokens.
    #[arg(long, default_value_t = 16.0, value_name = "R", help_heading = ATTENTION)]
    pub radius: f64,
    /// Also attend to the whole image, averaged over D x D cells.
    #[arg(long, value_name = "D", help_heading = ATTENTION)]
    pub pool: Option<usize>,
    /// Attention plan, instead of --radius and --pool: `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer.
    #[arg(long, value_name = "PLAN", conflicts_with_all = ["radius", "pool"], help_heading = ATTENTION)]
    pub attention: Option<String>,
    /// Replace the attention without distilling.
    #[arg(long, conflicts_with = "steps", help_heading = DISTILLATION)]
    pub no_distill: bool,
    /// How the student is distilled.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Adapters that are merged into the model before it is distilled.
    #[command(flatten)]
    pub adapters: WeightAdapterArgs,
    /// Folder to write the portable model to.
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Dtype of the written transformer [default: the source's].
    #[arg(long, value_enum, help_heading = OUTPUT)]
    pub dtype: Option<DtypeArg>,
    /// Hard-link the components instead of copying them.
    #[arg(long, help_heading = OUTPUT)]
    pub link: bool,
    /// Replace the output folder if it exists.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Show the plan and what would become of each tensor; write nothing.
    #[arg(long, help_heading = OUTPUT)]
    pub dry_run: bool,
    /// Where the student is trained.
    #[command(flatten)]
    pub running: DeviceArgs,
}

/// `clearform distill`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform distill FLUX.1-dev-clear --teacher FLUX.1-dev --steps 2000")]
pub struct DistillArgs {
    /// Portable model to train further.
    pub model: PathBuf,
    /// The original model that it was converted from.
    #[arg(long, value_name = "MODEL", help_heading = INPUT)]
    pub teacher: PathBuf,
    /// How the student is distilled.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Folder to write the distilled model to [default: MODEL is replaced].
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: Option<PathBuf>,
    /// Where the student is trained.
    #[command(flatten)]
    pub running: DeviceArgs,
}

/// How a student is distilled.
#[derive(Debug, Clone, Args)]
pub struct TrainingArgs {
    /// Diffusers folder with the VAE, text encoders, tokenizers and scheduler that the source lacks.
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub components: Option<PathBuf>,
    /// Prompts to generate samples from, or class indices, one per line [default: built-in prompts, or evenly spread
    /// classes].
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub prompts: Option<PathBuf>,
    /// Samples from an earlier run, instead of new ones.
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub samples: Option<PathBuf>,
    /// Number of samples to generate.
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = DISTILLATION)]
    pub sample_count: usize,
    /// Denoising steps per sample [default: the variant's].
    #[arg(long, value_name = "N", help_heading = DISTILLATION)]
    pub sample_steps: Option<usize>,
    /// Width and height of the samples, in pixels [default: the model's native size].
    #[arg(long, value_name = "PIXELS", help_heading = DISTILLATION)]
    pub sample_size: Option<usize>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 1000, value_name = "N", help_heading = DISTILLATION)]
    pub steps: usize,
    /// Samples per batch.
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = DISTILLATION)]
    pub batch: usize,
    /// Batches whose gradients are accumulated for one optimizer step.
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = DISTILLATION)]
    pub accumulate: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 6e-4, value_name = "RATE", help_heading = DISTILLATION)]
    pub lr: f64,
    /// Apply the attention loss to every Nth block (FLUX: every Nth single-stream block).
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = DISTILLATION)]
    pub attention_every: usize,
    /// Keep every block's activations instead of recomputing them: faster, but needs more memory.
    #[arg(long, help_heading = DISTILLATION)]
    pub keep_activations: bool,
    /// Optimizer steps between checkpoints.
    #[arg(long, default_value_t = 50, value_name = "N", help_heading = DISTILLATION)]
    pub checkpoint_every: usize,
    /// Seed of samples, noise and timesteps.
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = DISTILLATION)]
    pub seed: u64,
    /// Resume an interrupted run.
    #[arg(long, help_heading = DISTILLATION)]
    pub resume: bool,
}
