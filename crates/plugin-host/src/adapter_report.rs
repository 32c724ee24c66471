//! [`AdapterReport`]: what became of every tensor of an adapter.

use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Unmatched tensors that the printed report lists one by one.
const MAX_LISTED: usize = 8;

/// What became of an adapter's tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct AdapterReport {
    /// Path of the adapter.
    pub adapter: PathBuf,
    /// Number of tensors in its file.
    pub tensors: usize,
    /// Number of tensors that edit the model.
    pub applied: usize,
    /// Number of modules that they edit.
    pub modules: usize,
    /// Whether they change anything: with a strength or an alpha of 0 they do not.
    pub has_effect: bool,
    /// Tensors that are deliberately left out, with reasons.
    pub skipped: BTreeMap<String, String>,
    /// Tensors that could not be applied, with reasons.
    pub unmatched: BTreeMap<String, String>,
    /// Block names of the user's strengths that match no edited parameter.
    pub idle: Vec<String>,
    /// The plugin's messages.
    pub notes: Vec<String>,
}

impl AdapterReport {
    /// The report on the adapter at `adapter`, whose parts have the reports `parts`. Tensors of several parts are named
    /// with their part's folder; a strength has no effect if it has none in any part.
    pub fn of_parts(adapter: &Path, mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let idle = parts.first().map(|part| part.idle.clone()).unwrap_or_default();
        let is_idle = |text: &String| parts.iter().all(|part| part.idle.contains(text));
        let idle = idle.into_iter().filter(is_idle).collect();
        let mut whole = Self { adapter: adapter.to_owned(), idle, ..Self::default() };
        for part in parts {
            let folder = part.adapter.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let named = |(name, reason): (String, String)| (format!("{folder}/{name}"), reason);
            whole.tensors += part.tensors;
            whole.applied += part.applied;
            whole.modules += part.modules;
            whole.has_effect |= part.has_effect;
            whole.skipped.extend(part.skipped.into_iter().map(named));
            whole.unmatched.extend(part.unmatched.into_iter().map(named));
            whole.notes.extend(part.notes);
        }
        whole
    }

    /// Whether every tensor is applied or skipped for a reason, and every strength has an effect.
    pub fn is_complete(&self) -> bool {
        self.unmatched.is_empty() && self.idle.is_empty()
    }
}

impl std::fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { adapter, applied, tensors, modules, .. } = self;
        match self.has_effect || *applied == 0 {
            true => write!(f, "{}: applied {applied} of {tensors} tensors to {modules} modules", adapter.display())?,
            false => write!(f, "{}: has no effect: its strength or alpha is 0 wherever it fits", adapter.display())?,
        }
        let mut names_by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, reason) in &self.skipped {
            names_by_reason.entry(reason).or_default().push(name);
        }
        for (reason, names) in names_by_reason {
            write!(f, "\n  skipped {}, such as {:?}: {reason}", names.len(), names[0])?;
        }
        for (name, reason) in self.unmatched.iter().take(MAX_LISTED) {
            write!(f, "\n  not applied: {name:?}: {reason}")?;
        }
        for text in &self.idle {
            write!(f, "\n  the strength for {text:?} has no effect: no edited parameter has this in its name")?;
        }
        match self.unmatched.len().saturating_sub(MAX_LISTED) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more tensors are not applied"),
        }
    }
}
