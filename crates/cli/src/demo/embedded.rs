//! The demo's model, inside the binary: `assets/mini-flux/base`, its prompts and training images, and a fine-tune, a
//! LoRA and a ControlNet that were trained for it.

use std::path::Path;

/// The prompts that the model was trained on, one per line, in the order of [`REFERENCES`].
pub const NAMES: &str = include_str!("../../../../assets/mini-flux/names.txt");

/// Its training images, 32 x 32 px each, 16 per row: a PNG.
pub const REFERENCES: &[u8] = include_bytes!("../../../../assets/mini-flux/references.png");

macro_rules! files {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../../../assets/mini-flux/", $path)))),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "base/model_index.json",
    "base/scheduler/scheduler_config.json",
    "base/text_encoder/config.json",
    "base/text_encoder/model.safetensors",
    "base/text_encoder_2/config.json",
    "base/text_encoder_2/model.safetensors",
    "base/tokenizer/merges.txt",
    "base/tokenizer/special_tokens_map.json",
    "base/tokenizer/tokenizer_config.json",
    "base/tokenizer/vocab.json",
    "base/tokenizer_2/special_tokens_map.json",
    "base/tokenizer_2/spiece.model",
    "base/tokenizer_2/tokenizer.json",
    "base/tokenizer_2/tokenizer_config.json",
    "base/transformer/config.json",
    "base/transformer/diffusion_pytorch_model.safetensors",
    "base/vae/config.json",
    "base/vae/diffusion_pytorch_model.safetensors",
    "controlnet/config.json",
    "controlnet/diffusion_pytorch_model.safetensors",
    "lora/pytorch_lora_weights.safetensors",
    "variants/pencil/transformer/config.json",
    "variants/pencil/transformer/diffusion_pytorch_model.safetensors",
];

/// Writes all files to `folder`, as diffusers saved them.
pub fn unpack(folder: &Path) -> std::io::Result<()> {
    for (path, bytes) in FILES {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap_or(folder))?;
        std::fs::write(path, bytes)?;
    }
    Ok(())
}
