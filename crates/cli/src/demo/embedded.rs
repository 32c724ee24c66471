//! The reference teacher, inside the binary: `assets/mini-flux/base` with its names and reference pictures.

use std::path::Path;

/// Names of the pictures it draws, one a line, in the order of [`REFERENCES`].
pub const NAMES: &str = include_str!("../../../../assets/mini-flux/names.txt");

/// What it was trained to draw, 32 x 32 px each, 16 a row: a PNG.
pub const REFERENCES: &[u8] = include_bytes!("../../../../assets/mini-flux/references.png");

macro_rules! files {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../../../assets/mini-flux/base/", $path)))),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// Writes the pipeline folder to `folder`, as diffusers saved it.
pub fn unpack(folder: &Path) -> std::io::Result<()> {
    for (path, bytes) in FILES {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap_or(folder))?;
        std::fs::write(path, bytes)?;
    }
    Ok(())
}
