//! The arguments of components in files of their own.

use super::headings::INPUT;
use clap::Args;
use std::path::PathBuf;

/// Files of one component each. They have the names of stable-diffusion.cpp's options.
#[derive(Debug, Clone, Args)]
pub struct ComponentFileArgs {
    /// File of the VAE, as ae.safetensors; it takes precedence over that of the model, as the next four do.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub vae: Option<PathBuf>,
    /// File of a tiny autoencoder to decode with in place of the VAE, as taef1_decoder.safetensors: fast, and less exact.
    #[arg(long, alias = "taesd", value_name = "FILE", conflicts_with = "vae", help_heading = INPUT)]
    pub tae: Option<PathBuf>,
    /// File of the CLIP-L text encoder, as clip_l.safetensors.
    #[arg(long, alias = "clip_l", value_name = "FILE", help_heading = INPUT)]
    pub clip_l: Option<PathBuf>,
    /// File of the CLIP-G text encoder, as clip_g.safetensors.
    #[arg(long, alias = "clip_g", value_name = "FILE", help_heading = INPUT)]
    pub clip_g: Option<PathBuf>,
    /// File of the T5 text encoder, as t5xxl_fp16.safetensors or GGUF.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub t5xxl: Option<PathBuf>,
}
