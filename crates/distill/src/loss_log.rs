//! [`LossLog`]: the losses of every step as JSON lines, cut back to the checkpoint on resume.

use crate::{DistillError, Losses, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One step, as one line.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossEntry {
    /// Steps done, from 1 on.
    pub step: usize,
    /// Losses, the mean over the step's batches.
    #[serde(flatten)]
    pub losses: Losses,
    /// Norm of all gradients together, before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Seconds of training so far, all sittings together.
    pub seconds: f64,
}

#[derive(Debug)]
pub(crate) struct LossLog {
    path: PathBuf,
    file: File,
    entries: Vec<LossEntry>,
}

impl LossLog {
    /// Opens the journal and forgets what came after `step`: those steps will be done again.
    pub(crate) fn open(path: &Path, step: usize) -> Result<Self> {
        let io = |source| DistillError::Io { path: path.to_owned(), source };
        let text = if path.exists() { std::fs::read_to_string(path).map_err(io)? } else { String::new() };
        // A line that was being written when the program was killed is no entry.
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

    pub(crate) fn into_entries(self) -> Vec<LossEntry> {
        self.entries
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn forgets_what_came_after_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("losses.jsonl");
        let entry = |step| LossEntry {
            step,
            losses: Losses { total: 0.1, ..Losses::default() },
            norm: 1.0,
            rate: 0.5,
            seconds: 2.0,
        };
        let mut journal = LossLog::open(&path, 0).unwrap();
        (1..=4).for_each(|step| journal.add(entry(step)).unwrap());
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + "{\"step\":5,\"fl").unwrap();
        let mut journal = LossLog::open(&path, 2).unwrap();
        journal.add(entry(3)).unwrap();
        assert_eq!(journal.into_entries(), [entry(1), entry(2), entry(3)]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
    }
}
