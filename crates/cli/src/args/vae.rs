//! The arguments of decoding.

use super::headings::DEVICE;
use clap::Args;
use clearform::{TilingMode, VaePrecision};

/// How images are decoded.
#[derive(Debug, Clone, Args)]
pub struct VaeArgs {
    /// Decode the image in tiles: auto (where the whole would take more than about 3 GB of memory), on or off.
    #[arg(long, default_value_t, value_name = "auto|on|off", help_heading = DEVICE)]
    pub vae_tiling: TilingMode,
    /// Width and height of these tiles [default: 768].
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(64..), help_heading = DEVICE)]
    pub vae_tile_size: Option<u32>,
    /// What the VAE's convolutions multiply: f32, or bf16, which is faster on CPUs with AMX or AMD's AVX-512 BF16 and changes
    /// pixels by about 1 of 255.
    #[arg(long, default_value_t, value_name = "f32|bf16", help_heading = DEVICE)]
    pub vae_precision: VaePrecision,
}
