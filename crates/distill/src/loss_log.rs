//! [`LossLog`]: the losses of every step. They are kept in the training state; `losses.jsonl` shows them while it runs.

use crate::{DistillError, Losses, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One step, which is one line of the file.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossEntry {
    /// Steps done, from 1 on.
    pub step: usize,
    /// Losses, averaged over the step's batches.
    #[serde(flatten)]
    pub losses: Losses,
    /// Common norm of all gradients, before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Seconds of training so far, over all runs.
    pub seconds: f64,
    /// What is left of the error before training on samples that are not trained on, as a share of it; only at some steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
}

#[derive(Debug)]
pub(crate) struct LossLog {
    path: PathBuf,
    file: File,
    entries: Vec<LossEntry>,
}

impl LossLog {
    /// Writes `entries` to `path`, over what is there; further ones are added to both.
    pub(crate) fn create(path: &Path, entries: Vec<LossEntry>) -> Result<Self> {
        let io = |source| DistillError::Io { path: path.to_owned(), source };
        clearform_weights::write_atomically(path, to_lines(&entries).map_err(io)?.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok(Self { path: path.to_owned(), file, entries })
    }

    pub(crate) fn add(&mut self, entry: LossEntry) -> Result<()> {
        let io = |source| DistillError::Io { path: self.path.clone(), source };
        self.file.write_all(to_lines(&[entry]).map_err(io)?.as_bytes()).map_err(io)?;
        self.entries.push(entry);
        Ok(())
    }

    pub(crate) fn entries(&self) -> &[LossEntry] {
        &self.entries
    }

    pub(crate) fn into_entries(self) -> Vec<LossEntry> {
        self.entries
    }
}

/// The entries as JSON, one in each line.
pub(crate) fn to_lines(entries: &[LossEntry]) -> std::io::Result<String> {
    entries.iter().map(|entry| Ok(serde_json::to_string(entry)? + "\n")).collect()
}

/// The entries in `text` up to `step`. A line that was cut off when the program was killed does not parse and is dropped.
pub(crate) fn from_lines(text: &str, step: usize) -> Vec<LossEntry> {
    let entries = text.lines().filter_map(|line| serde_json::from_str::<LossEntry>(line).ok());
    entries.filter(|entry| entry.step <= step).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn entry(step: usize) -> LossEntry {
        let losses = Losses { total: 0.1, ..Losses::default() };
        LossEntry { step, losses, norm: 1.0, rate: 0.5, seconds: 2.0, held_out: (step == 2).then_some(0.75) }
    }

    #[test]
    fn the_file_shows_the_entries_and_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("losses.jsonl");
        std::fs::write(&path, "of a step that is going to be repeated").unwrap();
        let mut log = LossLog::create(&path, vec![entry(1), entry(2)]).unwrap();
        log.add(entry(3)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(from_lines(&text, 3), [entry(1), entry(2), entry(3)]);
        assert_eq!(log.into_entries(), from_lines(&text, 3));
    }

    #[test]
    fn entries_after_the_checkpoint_and_cut_lines_are_dropped() {
        let text = to_lines(&[entry(1), entry(2), entry(3)]).unwrap() + "{\"step\":2,\"den";
        assert_eq!(from_lines(&text, 2), [entry(1), entry(2)]);
    }

    /// Lines as versions before the key `denoising` wrote them.
    #[test]
    fn a_log_of_an_earlier_version_is_read() {
        let old = "{\"step\":1,\"flow\":0.75,\"prediction\":0.5,\"attention\":0.25,\"total\":1.125,\"norm\":2.0,\"rate\":0.001,\"seconds\":3.5}\n\
                   {\"step\":2,\"flow\":0.5,\"prediction\":0.25,\"attention\":0.125,\"total\":0.6875,\"norm\":1.0,\"rate\":0.002,\"seconds\":7.0}\n";
        let losses = Losses { denoising: 0.75, prediction: 0.5, attention: 0.25, total: 1.125 };
        let first = LossEntry { step: 1, losses, norm: 2.0, rate: 0.001, seconds: 3.5, held_out: None };
        let losses = Losses { denoising: 0.5, prediction: 0.25, attention: 0.125, total: 0.6875 };
        let second = LossEntry { step: 2, losses, norm: 1.0, rate: 0.002, seconds: 7.0, held_out: None };
        assert_eq!(from_lines(old, 2), [first, second]);
        assert_eq!(from_lines(&to_lines(&[first, second]).unwrap(), 2), [first, second]);
    }
}
