//! [`SampleFiles`]: the files of a sample set, and what is in which.

use crate::{DistillError, Result, SampleSettings};
use clearform_models::Prompt;
use clearform_weights::{Checkpoint, TensorSource as _, WeightsError};
use std::path::{Path, PathBuf};

/// A sample of a set, with its own prompt or the unconditional one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SampleIndex {
    /// Its index in the set.
    pub sample: usize,
    /// Whether the unconditional prompt replaces its own.
    pub unconditional: bool,
}

impl SampleIndex {
    /// A sample with its own prompt.
    pub fn conditional(sample: usize) -> Self {
        Self { sample, unconditional: false }
    }
}

/// The folder of a set and its settings.
#[derive(Debug)]
pub(crate) struct SampleFiles {
    pub folder: PathBuf,
    pub settings: SampleSettings,
}

impl SampleFiles {
    /// All prompts that are encoded: those of samples, and last the unconditional one if there is one.
    pub fn prompts(&self) -> Vec<Prompt> {
        let unconditional = self.settings.classifier_free.iter().map(|guidance| guidance.unconditional.clone());
        self.settings.prompts[..self.used_prompts()].iter().cloned().chain(unconditional).collect()
    }

    /// With fewer samples than prompts, the last prompts are not used.
    pub fn used_prompts(&self) -> usize {
        self.settings.prompts.len().min(self.settings.count)
    }

    /// Every file of a complete set, those that training reads most first.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let batches = (0..self.settings.count.div_ceil(self.settings.batch)).map(|batch| self.batch_path(batch));
        let prompts = (0..self.prompts().len()).map(|prompt| self.prompt_path(prompt));
        std::iter::once(self.ids_path()).chain(batches).chain(prompts)
    }

    /// The file of a sample's latents, and its row there.
    pub fn place_of(&self, sample: usize) -> (PathBuf, usize) {
        (self.batch_path(sample / self.settings.batch), sample % self.settings.batch)
    }

    /// The index of a sample's prompt in [`Self::prompts`].
    pub fn prompt_of(&self, index: SampleIndex) -> usize {
        if index.unconditional { self.used_prompts() } else { index.sample % self.settings.prompts.len() }
    }

    /// The file that holds the embeddings of prompt number `prompt`.
    pub fn prompt_path(&self, prompt: usize) -> PathBuf {
        self.folder.join(format!("prompt-{prompt:05}.safetensors"))
    }

    /// The file that holds the latents of batch number `batch`.
    pub fn batch_path(&self, batch: usize) -> PathBuf {
        self.folder.join(format!("batch-{batch:05}.safetensors"))
    }

    /// Refuses latents of another shape than `sample`, that of one sample. Reads headers only.
    ///
    /// # Errors
    /// A file cannot be read, or holds others.
    pub fn check_latents(&self, sample: &[usize]) -> Result<()> {
        let SampleSettings { count, batch, size: [width, height], .. } = self.settings;
        for (index, first) in (0..count).step_by(batch).enumerate() {
            let path = self.batch_path(index);
            let expected = [&[batch.min(count - first)], sample].concat();
            let found = open(&path)?.info("latents").map(|info| info.shape).unwrap_or_default();
            if found != expected {
                let reason = format!(
                    "expected \"latents\" {expected:?} of images of {width} x {height} px, found {found:?}; delete this file \
                     and rerun with --resume, or choose another folder"
                );
                return Err(bad(&path, reason));
            }
        }
        Ok(())
    }

    /// The file that holds the position ids, which all samples share.
    pub fn ids_path(&self) -> PathBuf {
        self.folder.join("ids.safetensors")
    }
}

/// Opens a file of a sample set or a training state. Sample sets are checked against their settings, so a file that cannot
/// be read was cut or changed, and deleting it is the way on.
///
/// # Errors
/// The file cannot be read; the message says what to delete.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    let advice = |error: WeightsError| {
        let text = error.to_string();
        let reason = text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text);
        // It was not downloaded.
        let reason = reason.trim_end_matches("download it again").trim_end_matches([':', ',', ' ']);
        bad(path, format!("{reason}; delete this file and rerun with --resume"))
    };
    Checkpoint::open(path).map_err(advice)
}

/// An error about the file at `path`.
pub(crate) fn bad(path: &Path, reason: String) -> DistillError {
    DistillError::BadFile { path: path.to_owned(), reason }
}
