//! The command line as data. Flag names follow diffusers and stable-diffusion.cpp where they have one.

mod adapters;
mod bench;
mod export;

pub use adapters::{
    AdapterArg, AdapterArgs, ApplyMode, PluginSearchArgs, PluginsAction, PluginsArgs, WeightAdapterArgs,
};
pub use bench::{
    AttentionBenchArgs, BenchArgs, BenchCommand, EvaluationArgs, ModelBenchArgs, StepBenchArgs, TilesBenchArgs,
};
pub use export::ExportArgs;

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// Make pre-trained diffusion transformers linear: ingest a checkpoint, rewrite its attention, distil it, run it.
#[derive(Debug, Parser)]
#[command(name = "clearform", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print one JSON object on stdout and nothing else there.
    #[arg(long, global = true)]
    pub json: bool,
    /// Worker threads; all cores without it.
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
}

const EXAMPLES: &str = "\
Examples:
  clearform demo -o demo
  clearform inspect FLUX.1-dev
  clearform convert FLUX.1-dev -o FLUX.1-dev-clear --radius 16
  clearform convert flux1-dev.safetensors -o flux-clear --components FLUX.1-dev
  clearform generate flux-clear \"a lighthouse at dawn\" --width 2048 --height 2048 -o out.png";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what a checkpoint is, whether it is whole, and what it would cost.
    Inspect(InspectArgs),
    /// The main job: ingest, rewrite, distil, emit.
    Convert(Box<ConvertArgs>),
    /// Distil a converted model further.
    Distill(Box<DistillArgs>),
    /// Take the attention layers out of a model, or put them into another.
    Patch(PatchArgs),
    /// From a prompt or a class to a picture.
    Generate(Box<GenerateArgs>),
    /// Run the transformer once on given tensors.
    Forward(ForwardArgs),
    /// Teacher and student side by side on the same seeds.
    Compare(CompareArgs),
    /// What carries over to the linear form: a fine-tune's weights, LoRAs, ControlNets.
    Transfer(Box<TransferArgs>),
    /// Time attention, a step or a model.
    Bench(BenchArgs),
    /// List or check plugins.
    Plugins(PluginsArgs),
    /// Write the transformer in one file, under the names of another layout.
    Export(ExportArgs),
    /// Hold every recorded file against its size and hash.
    Verify(VerifyArgs),
    /// The whole story on an embedded model, ending in a report.
    Demo(DemoArgs),
}

/// Number formats a model can run or be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
}

/// How a source is read.
#[derive(Debug, Clone, Default, Args)]
pub struct SourceArgs {
    /// Diffusers config.json for a single file whose sizes its tensors do not tell.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Take the source for this family.
    #[arg(long, value_name = "FAMILY")]
    pub family: Option<String>,
    /// Take the source for this variant.
    #[arg(long, value_name = "VARIANT")]
    pub variant: Option<String>,
    /// A further manifest of families, layouts and variants.
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// Go on although tensors of the source have no counterpart.
    #[arg(long)]
    pub allow_unmatched: bool,
}

/// A device, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceArg {
    /// The processor.
    Cpu,
    /// The NVIDIA GPU of that number.
    Cuda(usize),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = || text.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda);
        let place = if text == "cpu" { Some(Self::Cpu) } else { number() };
        place.ok_or_else(|| "expected cpu or cuda:N".to_owned())
    }
}

/// Where a model runs.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// `cpu`, or `cuda:N` where it was built in.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// Number format; the file's own without it.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer; the model's own plan without it.
    #[arg(long, value_name = "PLAN")]
    pub attention: Option<String>,
}

/// `clearform inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Exit 0 only for a complete model of a supported family.")]
pub struct InspectArgs {
    /// Diffusers folder, single file, or portable model.
    pub source: PathBuf,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
}

/// `clearform convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Diffusers folder, single file, or portable model.
    pub source: PathBuf,
    /// Folder of the portable model.
    #[arg(short, long, value_name = "MODEL")]
    pub output: PathBuf,
    /// Radius of the window, in tokens.
    #[arg(long, default_value_t = 16.0, value_name = "R")]
    pub radius: f64,
    /// Also see the whole image averaged over D x D cells.
    #[arg(long, value_name = "D")]
    pub pool: Option<usize>,
    /// A whole plan instead of --radius and --pool.
    #[arg(long, value_name = "PLAN", conflicts_with_all = ["radius", "pool"])]
    pub attention: Option<String>,
    /// Rewrite without distilling.
    #[arg(long, conflicts_with = "steps")]
    pub no_distill: bool,
    /// Number format of the emitted transformer; the source's without it.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Hard links instead of copies of the components.
    #[arg(long)]
    pub link: bool,
    /// Replace MODEL if it stands.
    #[arg(long)]
    pub overwrite: bool,
    /// Show the plan and the account of tensors; write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// How it is distilled.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// What is baked into the model, before it is distilled.
    #[command(flatten)]
    pub adapters: WeightAdapterArgs,
}

/// How a student is distilled.
#[derive(Debug, Clone, Args)]
pub struct TrainingArgs {
    /// Diffusers folder with VAE, text encoders, tokenizers and scheduler, where the source has none.
    #[arg(long, value_name = "DIR")]
    pub components: Option<PathBuf>,
    /// Prompts for the samples, or numbers of classes, one a line.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Samples made before.
    #[arg(long, value_name = "DIR")]
    pub samples: Option<PathBuf>,
    /// How many samples to make.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub sample_count: usize,
    /// Denoising steps of each sample.
    #[arg(long, value_name = "N")]
    pub sample_steps: Option<usize>,
    /// Width and height of the samples, in pixels.
    #[arg(long, value_name = "PIXELS")]
    pub sample_size: Option<usize>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub steps: usize,
    /// Samples a step.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub batch: usize,
    /// Batches whose gradients are added up for one step.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub accumulate: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 6e-4, value_name = "X")]
    pub lr: f64,
    /// The attention loss looks at every Kth block; in FLUX at every Kth single-stream block.
    #[arg(long, default_value_t = 4, value_name = "K")]
    pub attention_every: usize,
    /// Keep every block's activations instead of computing them again: faster, and more memory.
    #[arg(long)]
    pub keep_activations: bool,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub checkpoint_every: usize,
    /// Seed of samples, noise and timesteps.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Take up work that was interrupted.
    #[arg(long)]
    pub resume: bool,
    /// `cpu`, or `cuda:N` where it was built in.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceArg,
}

/// `clearform distill`.
#[derive(Debug, Args)]
pub struct DistillArgs {
    /// Portable model.
    pub model: PathBuf,
    /// The original it was made from.
    #[arg(long, value_name = "SOURCE")]
    pub teacher: PathBuf,
    /// Where the distilled model goes; over MODEL without it.
    #[arg(short, long, value_name = "MODEL")]
    pub output: Option<PathBuf>,
    /// How it is distilled.
    #[command(flatten)]
    pub training: TrainingArgs,
}

/// `clearform patch`.
#[derive(Debug, Args)]
pub struct PatchArgs {
    /// Which way.
    #[command(subcommand)]
    pub action: PatchAction,
}

/// Which way a patch goes.
#[derive(Debug, Subcommand)]
pub enum PatchAction {
    /// Write the distilled attention of a model to one file.
    Extract {
        /// Portable model.
        model: PathBuf,
        /// The original it was made from.
        #[arg(long, value_name = "SOURCE")]
        base: PathBuf,
        /// The patch.
        #[arg(short, long, value_name = "PATCH")]
        output: PathBuf,
    },
    /// Put distilled attention into a checkpoint.
    Apply(PatchApplyArgs),
}

/// `clearform patch apply`.
#[derive(Debug, Args)]
pub struct PatchApplyArgs {
    /// The patch, or a file of CLEAR's own.
    pub patch: PathBuf,
    /// The checkpoint it goes into.
    #[arg(long, value_name = "SOURCE")]
    pub to: PathBuf,
    /// Folder of the portable model.
    #[arg(short, long, value_name = "MODEL")]
    pub output: PathBuf,
    /// Put the tensors in, or add what distillation changed.
    #[arg(long, value_enum, default_value = "replace")]
    pub mode: PatchModeArg,
    /// The teacher of the patch, for `--mode shift`.
    #[arg(long, value_name = "TEACHER")]
    pub base: Option<PathBuf>,
    /// Radius, where the patch does not tell.
    #[arg(long, value_name = "R")]
    pub radius: Option<f64>,
    /// Replace MODEL if it stands.
    #[arg(long)]
    pub overwrite: bool,
}

/// How a patch meets a fine-tune.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PatchModeArg {
    /// The patch's tensors, as CLEAR does.
    Replace,
    /// W + (student - teacher): keeps what the fine-tune learned.
    Shift,
}

/// `clearform generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Portable model or diffusers folder.
    pub model: PathBuf,
    /// What to draw, for models of prompts.
    #[arg(required_unless_present = "class")]
    pub prompt: Option<String>,
    /// What to draw, for models of classes.
    #[arg(long, value_name = "N", conflicts_with = "prompt")]
    pub class: Option<u32>,
    /// What to stay away from, with classifier-free guidance.
    #[arg(long, value_name = "PROMPT")]
    pub negative_prompt: Option<String>,
    /// Picture, or pictures with a number in the name (`out-%03d.png`).
    #[arg(short, long, default_value = "out.png", value_name = "FILE")]
    pub output: String,
    /// Pixels across; the model's own size without it.
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<usize>,
    /// Pixels down; the model's own size without it.
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<usize>,
    /// Denoising steps; the variant's without it.
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance scale; the variant's without it.
    #[arg(long, value_name = "X")]
    pub guidance: Option<f64>,
    /// Classifier-free guidance scale, as diffusers' true_cfg_scale.
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    pub true_cfg_scale: f64,
    /// Channels that classifier-free guidance acts on, from the first; facebook's DiT guides 3.
    #[arg(long, value_name = "N")]
    pub guided_channels: Option<usize>,
    /// Seed: the noise of torch.Generator("cpu").manual_seed.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Pictures of the prompt.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub batch: usize,
    /// Diffusers folder with what the model lacks.
    #[arg(long, value_name = "DIR")]
    pub components: Option<PathBuf>,
    /// What the ControlNets are controlled by: a picture for each, in their order, or one for all.
    #[arg(long, value_name = "IMG")]
    pub control_image: Vec<PathBuf>,
    /// What acts on the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// How the model is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Where and how it runs.
    #[command(flatten)]
    pub running: DeviceArgs,
}

/// `clearform forward`.
#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// Inputs, named and shaped as the forward of the family's diffusers class takes them.
    #[arg(long, value_name = "FILE")]
    pub inputs: PathBuf,
    /// The output, one tensor `sample` in f32.
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// What acts on the model. ControlNets take the inputs `controlnet_cond` and `controlnet_mode`; where there are
    /// several, `controlnet_cond_0` and so on.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Where and how it runs.
    #[command(flatten)]
    pub running: DeviceArgs,
}

/// `clearform compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The original.
    pub teacher: PathBuf,
    /// The linear model.
    pub student: PathBuf,
    /// Folder of the report.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// What both draw.
    #[command(flatten)]
    pub drawing: SamplingArgs,
}

/// `clearform transfer`.
#[derive(Debug, Args)]
pub struct TransferArgs {
    /// The original.
    pub teacher: PathBuf,
    /// Its linear form.
    pub student: PathBuf,
    /// Folder of the report, and of the patched fine-tunes.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// A fine-tune of the original, which gets the distilled attention.
    #[arg(long, value_name = "SOURCE")]
    pub fine_tune: Option<PathBuf>,
    /// What ControlNets are controlled by: a picture for each prompt, or one for all.
    #[arg(long, value_name = "IMG")]
    pub control_image: Vec<PathBuf>,
    /// What both draw.
    #[command(flatten)]
    pub drawing: SamplingArgs,
    /// What acts on both.
    #[command(flatten)]
    pub adapters: AdapterArgs,
}

/// What two models draw from the same noise.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Prompts, or numbers of classes, one a line; a few built-in ones without it.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Denoising steps.
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Pixels across and down.
    #[arg(long, value_name = "PIXELS")]
    pub size: Option<usize>,
    /// Seed of the first prompt; each next has one more.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Diffusers folder with what the models lack.
    #[arg(long, value_name = "DIR")]
    pub components: Option<PathBuf>,
    /// `cpu`, or `cuda:N` where it was built in.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceArg,
}

/// `clearform verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Portable model.
    pub model: PathBuf,
}

/// `clearform demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Folder of the report.
    #[arg(short, long, default_value = "demo", value_name = "DIR")]
    pub output: PathBuf,
    /// Distillation steps for each radius.
    #[arg(long, default_value_t = 150, value_name = "N")]
    pub steps: usize,
    /// The last student also sees the whole image, averaged over D x D cells.
    #[arg(long, default_value_t = 4, value_name = "D")]
    pub pool: usize,
    /// Where plugins are: with them, the story goes on to adapters.
    #[command(flatten)]
    pub plugins: PluginSearchArgs,
}
