//! The arguments of `clearform bench`.

use super::{DeviceArg, DtypeArg, SourceArgs};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// `clearform bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What is timed.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What is timed.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// One attention call on random queries, keys and values already in tile order.
    Attention(AttentionBenchArgs),
    /// One evaluation of a FLUX transformer of given sizes, with random weights.
    Step(StepBenchArgs),
    /// One evaluation of a model at several sizes and attentions.
    Model(ModelBenchArgs),
    /// How much of what attention computes lies inside the disc; nothing is timed.
    #[command(alias = "share")]
    Tiles(TilesBenchArgs),
}

/// `clearform bench attention`.
#[derive(Debug, Args)]
pub struct AttentionBenchArgs {
    /// Image tokens, HEIGHTxWIDTH.
    #[arg(long, default_value = "64x64", value_name = "HxW")]
    pub grid: String,
    /// Radius of the window, in tokens.
    #[arg(long, default_value_t = 16.0, value_name = "R")]
    pub radius: f64,
    /// Attention heads.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub heads: usize,
    /// Channels per head.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub head_dim: usize,
    /// Text tokens.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub text: usize,
    /// Number format.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DtypeArg,
    /// Time the backward pass too.
    #[arg(long)]
    pub backward: bool,
    /// `full` or `clear:r=R[,d=D]` instead of --radius.
    #[arg(long, value_name = "PLAN")]
    pub attention: Option<String>,
    /// `cpu`, or `cuda:N` where it was built in.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// Timed runs, after one that is not counted.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeat: usize,
}

/// `clearform bench step`.
#[derive(Debug, Args)]
pub struct StepBenchArgs {
    /// Channels of a token inside the transformer.
    #[arg(long, default_value_t = 1536, value_name = "N")]
    pub width: usize,
    /// Channels per head.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub head_dim: usize,
    /// Double-stream blocks.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub double: usize,
    /// Single-stream blocks.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub single: usize,
    /// Image tokens, HEIGHTxWIDTH.
    #[arg(long, default_value = "64x64", value_name = "HxW")]
    pub grid: String,
    /// `full`, `clear:r=R[,d=D]`, or a TOML file with a plan per layer.
    #[arg(long, default_value = "clear:r=16", value_name = "PLAN")]
    pub attention: String,
    /// What else is the same for every evaluation.
    #[command(flatten)]
    pub evaluation: EvaluationArgs,
}

/// `clearform bench model`.
#[derive(Debug, Args)]
pub struct ModelBenchArgs {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Image tokens, HEIGHTxWIDTH; several with commas.
    #[arg(long, default_value = "16x16,32x32,64x64", value_delimiter = ',', value_name = "HxW")]
    pub grid: Vec<String>,
    /// Plans as `--attention` elsewhere; several with spaces between.
    #[arg(long, default_values = ["full", "clear:r=16"], num_args = 1.., value_name = "PLAN")]
    pub attention: Vec<String>,
    /// What else is the same for every evaluation.
    #[command(flatten)]
    pub evaluation: EvaluationArgs,
}

/// `clearform bench tiles`. Without options it gives the table of tiles that CLEAR's kernel is held against.
#[derive(Debug, Args)]
pub struct TilesBenchArgs {
    /// Image tokens, HEIGHTxWIDTH; several with commas.
    #[arg(long, default_value = "64x64,128x128,256x256,512x512", value_delimiter = ',', value_name = "HxW")]
    pub grid: Vec<String>,
    /// Radius of the window, in tokens; several with commas.
    #[arg(long, default_value = "8,16,32", value_delimiter = ',', value_name = "R")]
    pub radius: Vec<f64>,
    /// Patches of queries and of keys, or `cpu` and `gpu` for those of clearform's kernels; several with commas.
    #[arg(
        long,
        default_value = "8x8/8x8,16x8/8x8,16x8/16x8,16x16/8x8,cpu,gpu",
        value_delimiter = ',',
        value_name = "HxW/HxW"
    )]
    pub tiles: Vec<String>,
}

/// One evaluation of a transformer on random inputs.
#[derive(Debug, Args)]
pub struct EvaluationArgs {
    /// Text tokens, where the model takes text.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub text: usize,
    /// Number format.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DtypeArg,
    /// `cpu`, or `cuda:N` where it was built in.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// Timed runs, after one that is not counted.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeat: usize,
}
