//! [`ComponentFiles`]: components of a pipeline in files of their own, as ComfyUI and stable-diffusion.cpp take them.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Files that hold the weights of one component each, in safetensors or GGUF and in any naming that is known.
/// They have no tokenizers and no scheduler, which come from a diffusers folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ComponentFiles {
    /// The VAE, such as ae.safetensors.
    pub vae: Option<PathBuf>,
    /// A tiny autoencoder in place of the VAE, such as taef1_decoder.safetensors.
    pub tae: Option<PathBuf>,
    /// The text encoder of CLIP-L, such as clip_l.safetensors.
    pub clip_l: Option<PathBuf>,
    /// The text encoder of OpenCLIP bigG, such as clip_g.safetensors.
    pub clip_g: Option<PathBuf>,
    /// The encoder of T5, such as t5xxl_fp16.safetensors.
    pub t5xxl: Option<PathBuf>,
}

impl ComponentFiles {
    /// The files that are given, with what manifests call them.
    pub(crate) fn given(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let all = [
            ("vae", &self.vae),
            ("tae", &self.tae),
            ("clip_l", &self.clip_l),
            ("clip_g", &self.clip_g),
            ("t5xxl", &self.t5xxl),
        ];
        all.into_iter().filter_map(|(called, path)| Some((called, path.as_deref()?)))
    }
}
