//! The arguments of `clearform export`.

use super::SourceArgs;
use clap::Args;
use std::path::PathBuf;

/// `clearform export`.
#[derive(Debug, Args)]
#[command(after_help = "The file holds the weights alone: an attention plan is not recorded in it.")]
pub struct ExportArgs {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// Whose names the tensors get: `diffusers`, `original` (the authors'), or another layout of the family.
    #[arg(long, value_name = "LAYOUT")]
    pub to: String,
    /// The safetensors file.
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Replace FILE if it stands.
    #[arg(long)]
    pub overwrite: bool,
    /// How the model is read.
    #[command(flatten)]
    pub reading: SourceArgs,
}
