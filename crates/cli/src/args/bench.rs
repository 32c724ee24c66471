//! The arguments of `clearform bench`.

use super::headings::{ATTENTION, DEVICE, INPUT, TIMING};
use super::{DeviceArgs, DtypeArg, MemoryArgs, SourceArgs, VaeArgs, at_least_one, finite};
use clap::{Args, Subcommand};
use clearform::bench::WeightFormat;
use std::path::PathBuf;

/// `clearform bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What is measured.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Time one attention call on random queries, keys and values already in tile order.
    Attention(AttentionBenchArgs),
    /// Time one evaluation of a FLUX transformer of given sizes, with random weights.
    Step(StepBenchArgs),
    /// Time one evaluation of a model at several sizes and with several attention plans.
    Model(ModelBenchArgs),
    /// Time the decoding of random latents at several sizes.
    Vae(VaeBenchArgs),
    /// Count how much of what attention computes lies inside the disc; nothing is timed.
    #[command(alias = "share")]
    Tiles(TilesBenchArgs),
}

/// `clearform bench attention`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform bench attention --grid 128x128 --radius 16")]
pub struct AttentionBenchArgs {
    /// Image tokens.
    #[arg(long, default_value = "64x64", value_name = "HxW", help_heading = INPUT)]
    pub grid: String,
    /// Text tokens.
    #[arg(long, default_value_t = 512, value_name = "N", help_heading = INPUT)]
    pub text: usize,
    /// Attention heads.
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = INPUT)]
    pub heads: usize,
    /// Channels per head.
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = INPUT)]
    pub head_dim: usize,
    /// Window radius, in tokens.
    #[arg(long, default_value_t = 16.0, value_parser = finite, value_name = "R", help_heading = ATTENTION)]
    pub radius: f64,
    /// Attention plan, instead of --radius: `full` or `clear:r=R[,d=D]`.
    #[arg(long, value_name = "PLAN", conflicts_with = "radius", help_heading = ATTENTION)]
    pub attention: Option<String>,
    /// Time the backward pass too.
    #[arg(long, help_heading = TIMING)]
    pub backward: bool,
    /// Timed runs, after one warm-up run.
    #[arg(long, default_value_t = 5, value_name = "N", help_heading = TIMING)]
    pub repeat: usize,
    /// Where it runs.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// Dtype to compute in.
    #[arg(long, value_enum, default_value = "f32", help_heading = DEVICE)]
    pub dtype: DtypeArg,
}

/// `clearform bench step`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform bench step --grid 64x64 --attention clear:r=16")]
pub struct StepBenchArgs {
    /// Hidden size of the transformer.
    #[arg(long, default_value_t = 1536, value_name = "N", help_heading = INPUT)]
    pub width: usize,
    /// Channels per head.
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = INPUT)]
    pub head_dim: usize,
    /// Double-stream blocks.
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = INPUT)]
    pub double: usize,
    /// Single-stream blocks.
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = INPUT)]
    pub single: usize,
    /// Image tokens.
    #[arg(long, default_value = "64x64", value_name = "HxW", help_heading = INPUT)]
    pub grid: String,
    /// Attention plan: `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer.
    #[arg(long, default_value = "clear:r=16", value_name = "PLAN", help_heading = ATTENTION)]
    pub attention: String,
    /// How the weights are stored: f32, bf16, fp8_e4m3fn, q8_0, q4_k and so on [default: the dtype to compute in].
    #[arg(long, value_name = "FORMAT", help_heading = INPUT)]
    pub format: Option<WeightFormat>,
    /// What is the same for every evaluation.
    #[command(flatten)]
    pub timing: TimingArgs,
}

/// `clearform bench model`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform bench model --random flux-dev --format q4_k --dtype bf16 --grid 64x64")]
pub struct ModelBenchArgs {
    /// Portable model, diffusers folder or single file.
    #[arg(required_unless_present = "random")]
    pub model: Option<PathBuf>,
    /// Random weights in the shapes of a published model instead: flux-dev, flux-schnell, sd3.5-large, pixart-sigma and so
    /// on.
    #[arg(long, value_name = "NAME", conflicts_with = "model", help_heading = INPUT)]
    pub random: Option<String>,
    /// How random weights are stored: f32, bf16, fp8_e4m3fn, q8_0, q4_k and so on [default: the dtype to compute in].
    #[arg(long, value_name = "FORMAT", conflicts_with = "model", help_heading = INPUT)]
    pub format: Option<WeightFormat>,
    /// How the model is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Image tokens; several separated by commas.
    #[arg(
        long,
        default_value = "16x16,32x32,64x64",
        value_delimiter = ',',
        value_name = "HxW",
        help_heading = INPUT
    )]
    pub grid: Vec<String>,
    /// Attention plans, separated by spaces: `full`, `clear:r=R[,d=D]`, or TOML files with a plan per layer.
    #[arg(
        long,
        default_values = ["full", "clear:r=16"],
        num_args = 1..,
        value_name = "PLAN",
        help_heading = ATTENTION
    )]
    pub attention: Vec<String>,
    /// What is the same for every evaluation.
    #[command(flatten)]
    pub timing: TimingArgs,
}

/// `clearform bench vae`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform bench vae FLUX.1-dev --size 512,1024")]
pub struct VaeBenchArgs {
    /// Portable model or diffusers folder.
    pub model: PathBuf,
    /// Width and height of the images, in pixels; several separated by commas.
    #[arg(long, default_value = "512,1024", value_delimiter = ',', value_name = "PIXELS", help_heading = INPUT)]
    pub size: Vec<usize>,
    /// Timed runs, after one warm-up run; 0 times the first.
    #[arg(long, default_value_t = 3, value_name = "N", help_heading = TIMING)]
    pub repeat: usize,
    /// Where it runs.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// How images are decoded.
    #[command(flatten)]
    pub vae: VaeArgs,
}

/// `clearform bench tiles`. The defaults give the table of tiles that CLEAR's kernel is compared with.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform bench tiles --grid 64x64 --radius 8,16 --tiles 8x8/8x8,cpu,gpu")]
pub struct TilesBenchArgs {
    /// Image tokens; several separated by commas.
    #[arg(
        long,
        default_value = "64x64,128x128,256x256,512x512",
        value_delimiter = ',',
        value_name = "HxW",
        help_heading = INPUT
    )]
    pub grid: Vec<String>,
    /// Window radius in tokens; several separated by commas.
    #[arg(
        long,
        default_value = "8,16,32",
        value_delimiter = ',',
        value_parser = finite,
        value_name = "R",
        help_heading = ATTENTION
    )]
    pub radius: Vec<f64>,
    /// Tiles of queries and of keys, or `cpu` and `gpu` for those of clearform's kernels; several separated by commas.
    #[arg(
        long,
        default_value = "8x8/8x8,16x8/8x8,16x8/16x8,16x16/8x8,cpu,gpu",
        value_delimiter = ',',
        value_name = "HxW/HxW",
        help_heading = ATTENTION
    )]
    pub tiles: Vec<String>,
}

/// How one evaluation of a transformer on random inputs is timed.
#[derive(Debug, Args)]
pub struct TimingArgs {
    /// Text tokens [default: 512 if the model takes text].
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = INPUT)]
    pub text: Option<usize>,
    /// Timed runs, after one warm-up run.
    #[arg(long, default_value_t = 5, value_name = "N", help_heading = TIMING)]
    pub repeat: usize,
    /// Where it runs.
    #[command(flatten)]
    pub running: DeviceArgs,
    /// Dtype to compute in.
    #[arg(long, value_enum, default_value = "f32", help_heading = DEVICE)]
    pub dtype: DtypeArg,
    /// How much memory may be taken.
    #[command(flatten)]
    pub memory: MemoryArgs,
}
