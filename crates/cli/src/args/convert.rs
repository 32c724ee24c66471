//! The arguments of `clearform convert` and `clearform distill`.

use super::headings::{ATTENTION, DISTILLATION, INPUT, OUTPUT};
use super::{ComponentFileArgs, DeviceArgs, DtypeArg, MemoryArgs, SourceArgs, WeightAdapterArgs, finite, not_negative};
use clap::{ArgGroup, Args, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// What has no effect without a training.
const OF_TRAINING: [&str; 24] = [
    "prompts",
    "samples",
    "sample_count",
    "held_out",
    "require_error",
    "sample_steps",
    "sample_size",
    "steps",
    "time",
    "batch",
    "accumulate",
    "lr",
    "losses",
    "attention_every",
    "precision",
    "keep_activations",
    "checkpoint_every",
    "images_every",
    "max_memory",
    "offload",
    "seed",
    "resume",
    "lora_apply_mode",
    "device",
];

/// `clearform convert`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform convert FLUX.1-dev -o FLUX.1-dev-clear --radius 16")]
pub struct ConvertArgs {
    /// Diffusers folder, single file, or portable model.
    pub source: PathBuf,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Window radius, in tokens [default: 16; without distilling, that of a source that is linear already].
    #[arg(long, value_parser = finite, value_name = "R", help_heading = ATTENTION)]
    pub radius: Option<f64>,
    /// Also attend to the whole image, averaged over D x D cells.
    #[arg(long, value_name = "D", help_heading = ATTENTION)]
    pub pool: Option<usize>,
    /// Attention plan, instead of --radius and --pool: `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer.
    #[arg(long, value_name = "PLAN", conflicts_with_all = ["radius", "pool"], help_heading = ATTENTION)]
    pub attention: Option<String>,
    /// Replace the attention without distilling.
    #[arg(long, conflicts_with_all = OF_TRAINING, help_heading = DISTILLATION)]
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
    /// Write GGUF, with the matrices of the blocks in `q8_0`, `q4_0`, `q4_1`, `q5_0`, `q5_1`, or `q2_k` to `q6_k`.
    #[arg(long, value_name = "FORMAT", conflicts_with = "dtype", help_heading = OUTPUT)]
    pub quantize: Option<String>,
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
    /// How much memory samples and training may take.
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// `clearform distill`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("target").args(["output", "overwrite"]).required(true)))]
#[command(after_help = "Example:\n  clearform distill FLUX.1-dev-clear --teacher FLUX.1-dev --steps 2000 -o longer")]
pub struct DistillArgs {
    /// Portable model to train further.
    pub model: PathBuf,
    /// The original model that it was converted from.
    #[arg(long, value_name = "MODEL", help_heading = INPUT)]
    pub teacher: PathBuf,
    /// How the student is distilled.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Folder to write the distilled model to.
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: Option<PathBuf>,
    /// Replace MODEL.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Where the student is trained.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// How much memory samples and training may take.
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// How a student is distilled.
#[derive(Debug, Clone, Args)]
pub struct TrainingArgs {
    /// Diffusers folder with the VAE, text encoders, tokenizers and scheduler that the source lacks.
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub components: Option<PathBuf>,
    /// Components in files of their own.
    #[command(flatten)]
    pub component_files: ComponentFileArgs,
    /// Prompts to generate samples from, or class indices, one per line; lines that begin with # are comments [default:
    /// built-in prompts, or evenly spread classes].
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub prompts: Option<PathBuf>,
    /// Folder of the samples: those of an earlier run, or new ones, which are kept there for further runs.
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub samples: Option<PathBuf>,
    /// Number of samples to generate [default: by the model].
    #[arg(long, value_name = "N", help_heading = DISTILLATION)]
    pub sample_count: Option<usize>,
    /// Samples that are not trained on, for the verdict; 0 for no verdict.
    #[arg(long, default_value_t = 16, value_name = "N", help_heading = DISTILLATION)]
    pub held_out: usize,
    /// Exit with 1 if more than this share of the held-out error is left, such as 0.1; the model is written all the same.
    #[arg(long, value_parser = not_negative, value_name = "SHARE", help_heading = DISTILLATION)]
    pub require_error: Option<f64>,
    /// Denoising steps per sample [default: by the model].
    #[arg(long, value_name = "N", help_heading = DISTILLATION)]
    pub sample_steps: Option<usize>,
    /// Width and height of the samples, in pixels [default: the model's native size].
    #[arg(long, value_name = "PIXELS", help_heading = DISTILLATION)]
    pub sample_size: Option<usize>,
    /// Optimizer steps, or `auto`: until the error on held-out samples is flat [default: by the model].
    #[arg(long, value_name = "N|auto", help_heading = DISTILLATION)]
    pub steps: Option<Steps>,
    /// Time to train, instead of a number of steps: 90s, 5m, 2h. With --steps auto, the most.
    #[arg(long, value_name = "TIME", help_heading = DISTILLATION)]
    pub time: Option<Duration>,
    /// Samples per batch [default: by the model].
    #[arg(long, value_name = "N", help_heading = DISTILLATION)]
    pub batch: Option<usize>,
    /// Batches whose gradients are accumulated for one optimizer step.
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = DISTILLATION)]
    pub accumulate: usize,
    /// Peak learning rate [default: by the model].
    #[arg(long, value_parser = finite, value_name = "RATE", help_heading = DISTILLATION)]
    pub lr: Option<f64>,
    /// Weights of the losses against the target, the teacher's prediction and its attention outputs [default: by the
    /// model; the paper's are 1,0.5,0.5].
    #[arg(long, value_name = "T,P,A", help_heading = DISTILLATION)]
    pub losses: Option<LossWeights>,
    /// Apply the attention loss to every Nth block (FLUX: every Nth single-stream block) [default: by the model].
    #[arg(long, value_name = "N", help_heading = DISTILLATION)]
    pub attention_every: Option<usize>,
    /// Precision of the training: bf16 holds activations in it on a GPU, and multiplies in it on a CPU that does that
    /// faster. Trained parameters are f32 in any case [default: f32 on a CPU, bf16 on a GPU].
    #[arg(long, value_enum, value_name = "DTYPE", help_heading = DISTILLATION)]
    pub precision: Option<PrecisionArg>,
    /// Keep every block's activations instead of recomputing them: faster, but needs more memory. Small models always do.
    #[arg(long, help_heading = DISTILLATION)]
    pub keep_activations: bool,
    /// Optimizer steps between checkpoints.
    #[arg(long, default_value_t = 50, value_name = "N", help_heading = DISTILLATION)]
    pub checkpoint_every: usize,
    /// Optimizer steps between images of the student in the live report; 0 for none [default: a fifth of the steps in a
    /// small model, else none].
    #[arg(long, value_name = "N", help_heading = DISTILLATION)]
    pub images_every: Option<usize>,
    /// Seed of samples, noise and timesteps.
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = DISTILLATION)]
    pub seed: u64,
    /// Resume an interrupted run, with the options that it was begun with.
    #[arg(long, help_heading = DISTILLATION)]
    pub resume: bool,
}

/// Precision of a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
}

/// How many steps a training has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steps {
    /// This many.
    Count(usize),
    /// Until the error on held-out samples is flat.
    Auto,
}

impl FromStr for Steps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            count => count.parse().map(Self::Count).map_err(|_| "expected a number or auto".to_owned()),
        }
    }
}

impl Steps {
    /// The number, if there is one.
    pub fn count(self) -> Option<usize> {
        match self {
            Self::Count(count) => Some(count),
            Self::Auto => None,
        }
    }
}

/// A time in seconds, written with its unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Duration(pub f64);

impl FromStr for Duration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let units = [("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let found = units.iter().find_map(|(unit, seconds)| {
            let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
            (number > 0.0 && number.is_finite()).then_some(Self(number * seconds))
        });
        found.ok_or_else(|| "expected a time with its unit: 90s, 5m, 2h".to_owned())
    }
}

/// Three weights of losses, separated by commas.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossWeights(pub [f64; 3]);

impl FromStr for LossWeights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let weights: Option<Vec<f64>> = text.split(',').map(|weight| weight.parse().ok()).collect();
        let found = weights.and_then(|weights| <[f64; 3]>::try_from(weights).ok());
        let usable = |weights: &[f64; 3]| weights.iter().all(|weight| *weight >= 0.0 && weight.is_finite());
        found.filter(usable).map(Self).ok_or_else(|| "expected three weights of at least 0, as 1,0.5,0.5".to_owned())
    }
}
