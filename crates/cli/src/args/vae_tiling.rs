//! The arguments of decoding in tiles.

use super::headings::DEVICE;
use clap::Args;
use clearform::TilingMode;

/// Whether and how images are decoded in tiles.
#[derive(Debug, Clone, Args)]
pub struct VaeTilingArgs {
    /// Decode the image in tiles: auto (where the whole would take more than about 3 GB of memory), on or off.
    #[arg(long, default_value_t, value_name = "auto|on|off", help_heading = DEVICE)]
    pub vae_tiling: TilingMode,
    /// Width and height of these tiles [default: 768].
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(64..), help_heading = DEVICE)]
    pub vae_tile_size: Option<u32>,
}
