//! The arguments of the commands that read and write files without running a model: `inspect`, `export` and `verify`.

use super::SourceArgs;
use super::headings::OUTPUT;
use clap::Args;
use std::path::PathBuf;

/// `clearform inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Exits with 0 only for a complete model of a supported family.\n\n\
                        Example:\n  clearform inspect flux1-dev.safetensors")]
pub struct InspectArgs {
    /// Diffusers folder, single file, or portable model.
    pub source: PathBuf,
    /// How the source is read.
    #[command(flatten)]
    pub reading: SourceArgs,
}

/// `clearform export`.
#[derive(Debug, Args)]
#[command(after_help = "The file's metadata hold the attention plan, which other programs do not read.\n\n\
                        Example:\n  clearform export FLUX.1-dev-clear --to comfy -o flux-clear.safetensors")]
pub struct ExportArgs {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// How the model is read.
    #[command(flatten)]
    pub reading: SourceArgs,
    /// Layout whose tensor names to use: `diffusers`, `original` (the authors'), another layout of the family, or `gguf`: a
    /// GGUF file with the authors' names, as stable-diffusion.cpp and ComfyUI-GGUF read them.
    #[arg(long, value_name = "LAYOUT", help_heading = OUTPUT)]
    pub to: String,
    /// File to write: safetensors, or GGUF if its name ends in .gguf.
    #[arg(short, long, value_name = "FILE", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Quantise the matrices of the model's blocks: `q8_0`, `q4_0`, `q4_1`, `q5_0`, `q5_1`, or `q2_k` to `q6_k`. GGUF only.
    #[arg(long, value_name = "FORMAT", help_heading = OUTPUT)]
    pub quantize: Option<String>,
    /// Replace the output file if it exists.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
}

/// `clearform verify`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform verify FLUX.1-dev-clear")]
pub struct VerifyArgs {
    /// Portable model.
    pub model: PathBuf,
}
