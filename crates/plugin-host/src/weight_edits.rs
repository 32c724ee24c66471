//! [`WeightEdits`]: the edits of several adapters, placed on the parameters of one model, and the account of every tensor of
//! their files.

use crate::adapter::{Adapter, Edit, EditKind};
use crate::strength::Strength;
use clearform_layout::{LayoutParameter, ParameterMap};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// An adapter and how strongly it is applied.
#[derive(Debug, Clone)]
pub struct ScaledAdapter {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// How strongly, as a whole and by block.
    pub strength: Strength,
}

/// Edits by part of the pipeline and canonical name, in the order in which they are applied.
#[derive(Debug, Clone, Default)]
pub struct WeightEdits {
    parts: BTreeMap<String, BTreeMap<String, Vec<PlacedEdit>>>,
}

/// One edit of one canonical tensor.
#[derive(Debug, Clone)]
pub(crate) struct PlacedEdit {
    pub adapter: Arc<Adapter>,
    /// Which of the adapter's edits.
    pub edit: usize,
    /// The person's factor for this tensor.
    pub strength: f64,
    /// Rows of the edit's tensors, and the first row of the canonical tensor that they edit.
    pub pieces: Vec<(Range<usize>, usize)>,
    /// Elements of a row once edited.
    pub columns: usize,
}

/// What became of an adapter's tensors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterReport {
    /// The adapter.
    pub adapter: PathBuf,
    /// Tensors in its file.
    pub tensors: usize,
    /// Those that edit the model.
    pub applied: usize,
    /// Modules that they edit.
    pub modules: usize,
    /// Those that are left out, with reasons.
    pub skipped: BTreeMap<String, String>,
    /// Those that nobody understands, with reasons.
    pub unmatched: BTreeMap<String, String>,
    /// Blocks that a strength was given for, but that it does not edit.
    pub idle: Vec<String>,
    /// What the plugin had to say.
    pub notes: Vec<String>,
}

/// Which parts of the pipeline there are, by folder, and where their parameters lie.
#[derive(Debug, Clone, Default)]
pub struct ComponentParameters {
    parts: BTreeMap<String, ParameterMap>,
    /// Why no other part runs, where that is on purpose.
    alone: Option<String>,
}

impl ComponentParameters {
    /// Adds the part `name`.
    pub fn with(mut self, name: &str, addresses: ParameterMap) -> Self {
        self.parts.insert(name.to_owned(), addresses);
        self
    }

    /// Says why edits of any other part are left out.
    pub fn and_no_other(mut self, reason: &str) -> Self {
        self.alone = Some(reason.to_owned());
        self
    }

    /// Where `edit` lies: a part, and the parameter in it; or why it does not.
    fn find(&self, edit: &Edit) -> Result<(&str, &LayoutParameter), Unplaced> {
        let named = |name: &&String| clearform_layout::glob(&edit.component, name);
        let mut tried = self.parts.iter().filter(|(name, _)| named(name)).peekable();
        if tried.peek().is_none() {
            return Err(match &self.alone {
                Some(reason) => Unplaced::Skipped(reason.clone()),
                None => Unplaced::Unmatched(format!("the model has no part {:?}", edit.component)),
            });
        }
        let found = tried.find_map(|(name, addresses)| Some((name.as_str(), addresses.find(&edit.parameter)?)));
        found.ok_or_else(|| Unplaced::Unmatched(format!("{} has no parameter {:?}", edit.component, edit.parameter)))
    }
}

/// What became of an adapter's tensors, by their indexes.
#[derive(Default)]
struct PlacementCount {
    applied: BTreeSet<usize>,
    modules: BTreeSet<String>,
    /// Every name, in some layout, of what is edited, with its part in front.
    edited: Vec<String>,
    skipped: BTreeMap<usize, String>,
    unmatched: BTreeMap<usize, String>,
}

impl PlacementCount {
    fn count(&mut self, edit: &Edit, found: Result<(&str, &LayoutParameter), Unplaced>) {
        let sources = edit.sources.iter().copied();
        match found {
            Ok((part, parameter)) => {
                self.modules.insert(format!("{part}.{}", module(&parameter.name)));
                let canonical = parameter.segments.iter().map(|segment| &segment.canonical);
                self.edited.extend(canonical.chain([&parameter.name]).map(|name| format!("{part}.{name}")));
                self.applied.extend(sources);
            }
            Err(Unplaced::Skipped(reason)) => self.skipped.extend(sources.map(|index| (index, reason.clone()))),
            Err(Unplaced::Unmatched(reason)) => self.unmatched.extend(sources.map(|index| (index, reason.clone()))),
        }
    }

    /// A tensor that serves several edits is applied if it meets something in each.
    fn report(mut self, scaled: &ScaledAdapter) -> AdapterReport {
        let (adapter, names) = (&scaled.adapter, scaled.adapter.tensor_names());
        for index in 0..names.len() {
            if !self.applied.contains(&index) && !self.skipped.contains_key(&index) {
                self.unmatched.entry(index).or_insert_with(|| "the plugin does not know it".to_owned());
            }
        }
        self.applied.retain(|index| !self.unmatched.contains_key(index));
        let named =
            |told: BTreeMap<usize, String>| told.into_iter().map(|(index, reason)| (names[index].clone(), reason));
        AdapterReport {
            adapter: adapter.path().to_owned(),
            tensors: names.len(),
            applied: self.applied.len(),
            modules: self.modules.len(),
            skipped: named(self.skipped).collect(),
            unmatched: named(self.unmatched).collect(),
            idle: scaled.strength.idle(&self.edited).into_iter().map(str::to_owned).collect(),
            notes: adapter.notes(),
        }
    }
}

/// Why an edit lies nowhere.
enum Unplaced {
    Skipped(String),
    Unmatched(String),
}

impl WeightEdits {
    /// Places the edits of `applied`, one adapter after the other, on `parts`; and reports on each adapter.
    pub fn place(applied: &[ScaledAdapter], parts: &ComponentParameters) -> (Self, Vec<AdapterReport>) {
        let mut edits = Self::default();
        let reports = applied.iter().map(|scaled| edits.place_one(scaled, parts)).collect();
        (edits, reports)
    }

    /// Edits of the part `name`, by canonical name.
    pub(crate) fn of(&self, part: &str) -> Option<&BTreeMap<String, Vec<PlacedEdit>>> {
        self.parts.get(part)
    }

    /// Whether anything edits the part `name`.
    pub fn touch(&self, part: &str) -> bool {
        self.parts.contains_key(part)
    }

    fn place_one(&mut self, scaled: &ScaledAdapter, parts: &ComponentParameters) -> AdapterReport {
        let adapter = &scaled.adapter;
        let mut placed = PlacementCount::default();
        placed.skipped.extend(adapter.skipped().iter().cloned());
        for (index, edit) in adapter.edits().iter().enumerate() {
            let found = parts.find(edit).and_then(|(part, parameter)| {
                self.add(scaled, index, part, parameter).map_err(Unplaced::Unmatched)?;
                Ok((part, parameter))
            });
            placed.count(edit, found);
        }
        placed.report(scaled)
    }

    /// Adds edit `index` to every canonical tensor that rows of `parameter` lie in.
    fn add(
        &mut self,
        scaled: &ScaledAdapter,
        index: usize,
        part: &str,
        parameter: &LayoutParameter,
    ) -> Result<(), String> {
        let edit = &scaled.adapter.edits()[index];
        let [begin, end] = rows_within(edit, parameter)?;
        let mut pieces: BTreeMap<&str, Vec<(Range<usize>, usize)>> = BTreeMap::new();
        for segment in &parameter.segments {
            let shared = segment.from.start.max(begin)..segment.from.end.min(end);
            if !shared.is_empty() {
                let to = segment.to + shared.start - segment.from.start;
                let rows = shared.start - begin..shared.end - begin;
                pieces.entry(&segment.canonical).or_default().push((rows, to));
            }
        }
        for (canonical, pieces) in pieces {
            let strength = scaled.strength.of(part, &[canonical, &parameter.name]);
            let change =
                PlacedEdit { adapter: scaled.adapter.clone(), edit: index, strength, pieces, columns: edit.extents[1] };
            self.parts.entry(part.to_owned()).or_default().entry(canonical.to_owned()).or_default().push(change);
        }
        Ok(())
    }
}

/// The rows of `parameter` that `edit` edits. It may widen rows, which the model's sizes judge afterwards; nothing else.
fn rows_within(edit: &Edit, parameter: &LayoutParameter) -> Result<[usize; 2], String> {
    let rows = parameter.shape.first().copied().unwrap_or(1);
    let columns = parameter.shape.iter().skip(1).product::<usize>();
    let begin = edit.first_row.unwrap_or(0);
    let fits = match edit.first_row {
        None => edit.extents[0] == rows,
        Some(_) => edit.extents[0].checked_add(begin).is_some_and(|end| end <= rows),
    };
    let widens = parameter.shape.len() == 2 && edit.extents[1] > columns && edit.first_row.is_none();
    let widens = widens && matches!(edit.kind, EditKind::LowRank | EditKind::Delta | EditKind::Replace);
    let same = edit.extents[1] == columns || edit.kind == EditKind::Scale;
    if fits && (same || widens) {
        return Ok([begin, begin + edit.extents[0]]);
    }
    let Edit { extents: [found_rows, found_columns], .. } = edit;
    Err(format!(
        "it is for {found_rows} x {found_columns}, but {:?} has {rows} x {columns}: it was made for another model",
        parameter.name
    ))
}

/// The module of a parameter.
fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}

impl AdapterReport {
    /// Whether every tensor is applied, or left out for a reason, and every strength met something.
    pub fn is_whole(&self) -> bool {
        self.unmatched.is_empty() && self.idle.is_empty()
    }
}

impl std::fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const MOST: usize = 8;
        let Self { adapter, applied, tensors, modules, .. } = self;
        write!(f, "{}: applied {applied} of {tensors} tensors to {modules} modules", adapter.display())?;
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        self.skipped.iter().for_each(|(name, reason)| reasons.entry(reason).or_default().push(name));
        for (reason, names) in reasons {
            write!(f, "\n  {} left out, such as {:?}: {reason}", names.len(), names[0])?;
        }
        for (name, reason) in self.unmatched.iter().take(MOST) {
            write!(f, "\n  not applied: {name:?}: {reason}")?;
        }
        for text in &self.idle {
            write!(f, "\n  a strength is given for {text:?}, which no edited parameter is called")?;
        }
        match self.unmatched.len().saturating_sub(MOST) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
