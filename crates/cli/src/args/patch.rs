//! The arguments of `clearform patch`.

use super::headings::{ATTENTION, INPUT, OUTPUT};
use super::{ComponentFileArgs, finite};
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// `clearform patch`.
#[derive(Debug, Args)]
pub struct PatchArgs {
    /// What to do with the patch.
    #[command(subcommand)]
    pub action: PatchAction,
}

/// What to do with a patch.
#[derive(Debug, Subcommand)]
pub enum PatchAction {
    /// Write the distilled attention of a model to one file.
    Extract(PatchExtractArgs),
    /// Apply distilled attention to a checkpoint.
    Apply(PatchApplyArgs),
}

/// `clearform patch extract`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  clearform patch extract FLUX.1-dev-clear --base FLUX.1-dev -o clear-r16.safetensors"
)]
pub struct PatchExtractArgs {
    /// Portable model.
    pub model: PathBuf,
    /// The original model that it was converted from.
    #[arg(long, value_name = "MODEL", help_heading = INPUT)]
    pub base: PathBuf,
    /// Safetensors file to write the patch to.
    #[arg(short, long, value_name = "FILE", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Replace the file if it exists.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
}

/// `clearform patch apply`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  clearform patch apply clear-r16.safetensors --to fine-tune.safetensors -o fine-tune-clear"
)]
pub struct PatchApplyArgs {
    /// A patch from `patch extract`, or a file published by CLEAR's authors.
    pub patch: PathBuf,
    /// The checkpoint to apply it to.
    #[arg(long, value_name = "SOURCE", help_heading = INPUT)]
    pub to: PathBuf,
    /// The patch's teacher, for `--mode shift`.
    #[arg(long, value_name = "MODEL", help_heading = INPUT)]
    pub base: Option<PathBuf>,
    /// Diffusers folder with the components that the checkpoint lacks [default: the base, if it is a folder].
    #[arg(long, value_name = "DIR", help_heading = INPUT)]
    pub components: Option<PathBuf>,
    /// Components in files of their own.
    #[command(flatten)]
    pub component_files: ComponentFileArgs,
    /// How the patch is applied.
    #[arg(long, value_enum, default_value = "replace", help_heading = ATTENTION)]
    pub mode: PatchModeArg,
    /// Window radius in tokens, for a patch that does not state it.
    #[arg(long, value_parser = finite, value_name = "R", help_heading = ATTENTION)]
    pub radius: Option<f64>,
    /// Folder to write the portable model to.
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: PathBuf,
    /// Replace the output folder if it exists.
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
}

/// How a patch is applied to a fine-tune.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PatchModeArg {
    /// Use the patch's tensors, as CLEAR does.
    Replace,
    /// W + (student - teacher): keeps what the fine-tune learned.
    Shift,
}
