//! [`LossLog`]: `losses.jsonl`, the losses of every step as JSON lines. On resume it is cut back to the checkpoint.

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
    /// Opens the log and removes the entries after `step`, since those steps are going to be repeated.
    pub(crate) fn open(path: &Path, step: usize) -> Result<Self> {
        let io = |source| DistillError::Io { path: path.to_owned(), source };
        let text = if path.exists() { std::fs::read_to_string(path).map_err(io)? } else { String::new() };
        // A line that was cut off when the program was killed does not parse and is dropped.
        let lines = text.lines().filter_map(|line| Some((line, serde_json::from_str::<LossEntry>(line).ok()?)));
        let (lines, entries): (Vec<&str>, Vec<LossEntry>) = lines.filter(|(_, entry)| entry.step <= step).unzip();
        let kept: String = lines.iter().flat_map(|line| [line, "\n"]).collect();
        clearform_weights::write_atomically(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok(Self { path: path.to_owned(), file, entries })
    }

    pub(crate) fn add(&mut self, entry: LossEntry) -> Result<()> {
        let io = |source| DistillError::Io { path: self.path.clone(), source };
        let line = serde_json::to_string(&entry).map_err(|error| io(error.into()))? + "\n";
        self.file.write_all(line.as_bytes()).map_err(io)?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entries_after_the_checkpoint_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("losses.jsonl");
        let entry = |step| LossEntry {
            step,
            losses: Losses { total: 0.1, ..Losses::default() },
            norm: 1.0,
            rate: 0.5,
            seconds: 2.0,
            held_out: (step == 2).then_some(0.75),
        };
        let mut log = LossLog::open(&path, 0).unwrap();
        (1..=4).for_each(|step| log.add(entry(step)).unwrap());
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + "{\"step\":5,\"den").unwrap();
        let mut log = LossLog::open(&path, 2).unwrap();
        log.add(entry(3)).unwrap();
        assert_eq!(log.into_entries(), [entry(1), entry(2), entry(3)]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
    }

    /// Lines as versions before the key `denoising` wrote them.
    #[test]
    fn a_log_of_an_earlier_version_is_continued() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("losses.jsonl");
        let old = "{\"step\":1,\"flow\":0.75,\"prediction\":0.5,\"attention\":0.25,\"total\":1.125,\"norm\":2.0,\"rate\":0.001,\"seconds\":3.5}\n\
                   {\"step\":2,\"flow\":0.5,\"prediction\":0.25,\"attention\":0.125,\"total\":0.6875,\"norm\":1.0,\"rate\":0.002,\"seconds\":7.0}\n";
        std::fs::write(&path, old).unwrap();
        let losses = Losses { denoising: 0.75, prediction: 0.5, attention: 0.25, total: 1.125 };
        let first = LossEntry { step: 1, losses, norm: 2.0, rate: 0.001, seconds: 3.5, held_out: None };
        let losses = Losses { denoising: 0.5, prediction: 0.25, attention: 0.125, total: 0.6875 };
        let second = LossEntry { step: 2, losses, norm: 1.0, rate: 0.002, seconds: 7.0, held_out: None };
        let mut log = LossLog::open(&path, 2).unwrap();
        let third = LossEntry { step: 3, ..second };
        log.add(third).unwrap();
        assert_eq!(log.into_entries(), [first, second, third]);
        // Old and new lines side by side are read again.
        assert_eq!(LossLog::open(&path, 3).unwrap().into_entries(), [first, second, third]);
    }
}
