//! [`WeightEdits`]: the edits of several adapters, mapped to the parameters of one model.

use crate::AdapterReport;
use crate::adapter::Adapter;
use crate::edit::{Edit, EditKind};
use crate::strength::Strength;
use clearform_layout::{LayoutParameter, ParameterMap};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// An adapter and how strongly it is applied.
#[derive(Debug, Clone)]
pub struct ScaledAdapter {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// The user's strength, overall and by block.
    pub strength: Strength,
}

/// Edits by component and canonical tensor name, in the order in which they are applied.
#[derive(Debug, Clone, Default)]
pub struct WeightEdits {
    components: BTreeMap<String, BTreeMap<String, Vec<PlacedEdit>>>,
}

/// One edit of one canonical tensor.
#[derive(Debug, Clone)]
pub(crate) struct PlacedEdit {
    pub adapter: Arc<Adapter>,
    /// Index among the adapter's edits.
    pub edit: usize,
    /// The user's strength for this tensor.
    pub strength: f64,
    /// Which rows of the tensor are edited.
    pub rows: Vec<EditedRows>,
    /// Elements of a row of the edit.
    pub columns: usize,
    /// All rows of the parameter, if the edit sets norms: those of columns are taken over all of them.
    pub whole: Arc<[PartOfParameter]>,
}

/// The rows of a parameter that one canonical tensor has.
#[derive(Debug, Clone)]
pub(crate) struct PartOfParameter {
    pub canonical: String,
    pub rows: Vec<EditedRows>,
}

/// Consecutive rows of a canonical tensor that are edited.
#[derive(Debug, Clone)]
pub(crate) struct EditedRows {
    /// Rows of the edit's tensors.
    pub from: Range<usize>,
    /// First of the canonical tensor's rows.
    pub to: usize,
}

/// The components of a pipeline, by folder, with their parameters.
#[derive(Debug, Clone, Default)]
pub struct ComponentParameters {
    components: BTreeMap<String, ParameterMap>,
    /// Why edits of all other components are skipped, if that is intended.
    skip_others: Option<String>,
}

impl ComponentParameters {
    /// Adds the component `name`.
    pub fn with(mut self, name: &str, parameters: ParameterMap) -> Self {
        self.components.insert(name.to_owned(), parameters);
        self
    }

    /// Skips the edits of all other components, for `reason`.
    pub fn skip_others(mut self, reason: &str) -> Self {
        self.skip_others = Some(reason.to_owned());
        self
    }

    /// The parameter that `edit` names, or why there is none.
    fn find(&self, edit: &Edit) -> Result<FoundParameter<'_>, NotPlaced> {
        let is_named = |name: &&String| clearform_layout::glob(&edit.component, name);
        let mut named = self.components.iter().filter(|(name, _)| is_named(name)).peekable();
        if named.peek().is_none() {
            return Err(match &self.skip_others {
                Some(reason) => NotPlaced::Skipped(reason.clone()),
                None => NotPlaced::Unmatched(format!("the model has no component {:?}", edit.component)),
            });
        }
        let found = named.filter_map(|(component, parameters)| {
            let parameter = parameters.find(&edit.parameter)?;
            Some(FoundParameter { component, parameter, parameters })
        });
        only_fitting(edit, &found.collect::<Vec<_>>()).map_err(NotPlaced::Unmatched)
    }
}

/// The one of the parameters with the name in `edit` that it fits, or the only one.
fn only_fitting<'a>(edit: &Edit, found: &[FoundParameter<'a>]) -> Result<FoundParameter<'a>, String> {
    let fits = |found: &&FoundParameter| edited_rows(edit, found.parameter).is_ok();
    let fitting: Vec<&FoundParameter> = found.iter().filter(fits).collect();
    match (fitting.as_slice(), found) {
        ([only], _) => Ok(**only),
        ([], [only, ..]) => Ok(*only),
        ([], []) => Err(format!("the component {:?} has no parameter {:?}", edit.component, edit.parameter)),
        ([first, second, ..], _) => Err(format!(
            "it fits {:?} and {:?} alike: put the file into a folder with the name of one of them, beside its \
             adapter_config.json",
            first.component, second.component
        )),
    }
}

/// The parameter that an edit names.
#[derive(Clone, Copy)]
struct FoundParameter<'a> {
    component: &'a str,
    parameter: &'a LayoutParameter,
    /// All parameters of the component.
    parameters: &'a ParameterMap,
}

impl<'a> FoundParameter<'a> {
    /// The names in every layout of the parameters with rows of `canonical`, itself one of them.
    fn names(&self, canonical: &'a str) -> Vec<&'a str> {
        let mut names: Vec<&str> = self.parameters.names(canonical).collect();
        names.extend([canonical, &self.parameter.name]);
        names
    }

    /// The same names with the component in front, of all canonical tensors.
    fn qualified_names(&self) -> Vec<String> {
        let canonical = self.parameter.segments.iter().map(|segment| segment.canonical.as_str());
        let names = canonical.flat_map(|canonical| self.names(canonical));
        names.map(|name| format!("{}.{name}", self.component)).collect()
    }
}

/// Why an edit is not applied.
enum NotPlaced {
    Skipped(String),
    Unmatched(String),
}

/// What became of an adapter's tensors, by their indexes.
#[derive(Default)]
struct PlacementCount {
    applied: BTreeSet<usize>,
    modules: BTreeSet<String>,
    /// Names of all edited parameters in every layout, with their components in front.
    edited: Vec<String>,
    skipped: BTreeMap<usize, String>,
    unmatched: BTreeMap<usize, String>,
    notes: Vec<String>,
    has_effect: bool,
}

impl PlacementCount {
    fn count(&mut self, edit: &Edit, found: Result<FoundParameter, NotPlaced>) {
        let sources = edit.sources.iter().copied();
        match found {
            Ok(found) => {
                let FoundParameter { component, parameter, .. } = found;
                self.modules.insert(format!("{component}.{}", module(&parameter.name)));
                self.edited.extend(found.qualified_names());
                self.applied.extend(sources);
                self.notes.extend(padding_note(edit, parameter));
            }
            Err(NotPlaced::Skipped(reason)) => self.skipped.extend(sources.map(|index| (index, reason.clone()))),
            Err(NotPlaced::Unmatched(reason)) => self.unmatched.extend(sources.map(|index| (index, reason.clone()))),
        }
    }

    /// A tensor that several edits share counts as applied only if all of them are.
    fn report(mut self, scaled: &ScaledAdapter) -> AdapterReport {
        let adapter = &scaled.adapter;
        let names = adapter.tensor_names();
        for index in 0..names.len() {
            if !self.applied.contains(&index) && !self.skipped.contains_key(&index) {
                self.unmatched.entry(index).or_insert_with(|| "the plugin does not recognise it".to_owned());
            }
        }
        for (index, reason) in &mut self.unmatched {
            if let Some(known) = adapter.refusal(&names[*index]) {
                *reason = known.to_owned();
            }
        }
        self.applied.retain(|index| !self.unmatched.contains_key(index));
        let by_name = |reasons: BTreeMap<usize, String>| {
            reasons.into_iter().map(|(index, reason)| (names[index].clone(), reason)).collect()
        };
        AdapterReport {
            adapter: adapter.path().to_owned(),
            tensors: names.len(),
            applied: self.applied.len(),
            modules: self.modules.len(),
            has_effect: self.has_effect,
            skipped: by_name(self.skipped),
            unmatched: by_name(self.unmatched),
            idle: scaled.strength.unmatched(&self.edited).into_iter().map(str::to_owned).collect(),
            notes: adapter.notes().into_iter().chain(self.notes).collect(),
        }
    }
}

impl WeightEdits {
    /// Maps the edits of `adapters`, in order, to the parameters of `components`, and reports on each adapter.
    pub fn place(adapters: &[ScaledAdapter], components: &ComponentParameters) -> (Self, Vec<AdapterReport>) {
        let mut edits = Self::default();
        let reports = adapters.iter().map(|scaled| edits.place_adapter(scaled, components)).collect();
        (edits, reports)
    }

    /// Checks that no edit has NaN or infinity. Reads all of them.
    ///
    /// # Errors
    /// The first edit that has, or cannot be read.
    pub fn check_finite(&self) -> crate::Result<()> {
        let mut placed = self.components.values().flat_map(BTreeMap::values).flatten();
        placed.try_for_each(|placed| placed.adapter.check_finite(placed.edit))
    }

    /// Edits of the component `name`, by canonical tensor name.
    pub(crate) fn component(&self, name: &str) -> Option<&BTreeMap<String, Vec<PlacedEdit>>> {
        self.components.get(name)
    }

    /// Whether there are edits of the component `name`.
    pub fn affects(&self, name: &str) -> bool {
        self.components.contains_key(name)
    }

    fn place_adapter(&mut self, scaled: &ScaledAdapter, components: &ComponentParameters) -> AdapterReport {
        let adapter = &scaled.adapter;
        let mut count = PlacementCount::default();
        count.skipped.extend(adapter.skipped().iter().cloned());
        for (index, edit) in adapter.edits().iter().enumerate() {
            let found = components.find(edit).and_then(|found| {
                count.has_effect |= self.add(scaled, index, found).map_err(NotPlaced::Unmatched)?;
                Ok(found)
            });
            count.count(edit, found);
        }
        count.report(scaled)
    }

    /// Adds edit `index` to every canonical tensor that contains edited rows of the parameter. Returns whether one of them
    /// may change: those with strength 0 do not.
    fn add(&mut self, scaled: &ScaledAdapter, index: usize, found: FoundParameter) -> Result<bool, String> {
        let edit = &scaled.adapter.edits()[index];
        let mut changes = false;
        let edited = edited_rows(edit, found.parameter)?;
        let whole: Arc<[PartOfParameter]> = if edit.decomposed { whole(found.parameter, &edited) } else { [].into() };
        for (canonical, rows) in canonical_rows(found.parameter, edited) {
            let strength = scaled.strength.factor(found.component, &found.names(canonical));
            changes |= strength != 0.0 && (edit.scale != 0.0 || edit.decomposed);
            let adapter = scaled.adapter.clone();
            let columns = edit.shape[1];
            let placed = PlacedEdit { adapter, edit: index, strength, rows, columns, whole: whole.clone() };
            let edits = self.components.entry(found.component.to_owned()).or_default();
            edits.entry(canonical.to_owned()).or_default().push(placed);
        }
        Ok(changes)
    }
}

/// Where the rows `edited` of `parameter` are in the canonical tensors.
fn canonical_rows(parameter: &LayoutParameter, edited: Range<usize>) -> BTreeMap<&str, Vec<EditedRows>> {
    let mut rows: BTreeMap<&str, Vec<EditedRows>> = BTreeMap::new();
    for segment in &parameter.segments {
        let shared = segment.from.start.max(edited.start)..segment.from.end.min(edited.end);
        if !shared.is_empty() {
            let to = segment.to + shared.start - segment.from.start;
            let from = shared.start - edited.start..shared.end - edited.start;
            rows.entry(&segment.canonical).or_default().push(EditedRows { from, to });
        }
    }
    rows
}

/// Where the rows `edited` of `parameter` are, each of them once: copies of a row count once in a norm.
fn whole(parameter: &LayoutParameter, edited: &Range<usize>) -> Arc<[PartOfParameter]> {
    let mut once = LayoutParameter { segments: Vec::new(), ..parameter.clone() };
    let mut covered = 0;
    for segment in &parameter.segments {
        if segment.from.start >= covered {
            covered = segment.from.end;
            once.segments.push(segment.clone());
        }
    }
    let parts = canonical_rows(&once, edited.clone()).into_iter();
    parts.map(|(canonical, rows)| PartOfParameter { canonical: canonical.to_owned(), rows }).collect()
}

/// A note on an edit that was made for the plain model of the family.
fn padding_note(edit: &Edit, parameter: &LayoutParameter) -> Option<String> {
    let columns = parameter.shape.iter().skip(1).product::<usize>();
    let narrower = parameter.plain_columns.is_some_and(|plain| plain == edit.shape[1]) && plain_edit(edit);
    narrower.then(|| {
        format!(
            "{:?} takes {columns} channels and the adapter has {}: it was made for the plain model, and is padded with \
             zeros for the others",
            parameter.name, edit.shape[1]
        )
    })
}

/// Whether an edit of the plain model has a meaning for a model with further input channels. A norm of rows that were
/// shorter has none.
fn plain_edit(edit: &Edit) -> bool {
    matches!(edit.kind, EditKind::LowRank | EditKind::Delta) && !edit.decomposed && edit.first_row.is_none()
}

/// The rows of `parameter` that `edit` covers. An edit of a whole matrix may also add the columns with which the model takes
/// a control image. One that was made for the plain model of the family may have fewer.
fn edited_rows(edit: &Edit, parameter: &LayoutParameter) -> Result<Range<usize>, String> {
    let rows = parameter.shape.first().copied().unwrap_or(1);
    let columns = parameter.shape.iter().skip(1).product::<usize>();
    let [edit_rows, edit_columns] = edit.shape;
    let first = edit.first_row.unwrap_or(0);
    let rows_fit = match edit.first_row {
        None => edit_rows == rows,
        Some(_) => edit_rows.checked_add(first).is_some_and(|end| end <= rows),
    };
    let is_matrix = parameter.shape.len() == 2 && edit.first_row.is_none();
    let is_widening = is_matrix && matches!(edit.kind, EditKind::LowRank | EditKind::Delta | EditKind::Replace);
    let is_widening = is_widening && parameter.control_columns == Some(edit_columns);
    // A factor applies to its whole row, so the columns of a scaling edit do not matter.
    let columns_fit = edit_columns == columns || edit.kind == EditKind::Scale;
    let is_plain = parameter.plain_columns == Some(edit_columns) && plain_edit(edit);
    if rows_fit && (columns_fit || is_plain || is_widening) {
        return Ok(first..first + edit_rows);
    }
    let widened = parameter.control_columns.map(|columns| format!(" (or {columns} with a control image)"));
    let widened = widened.filter(|_| is_matrix).unwrap_or_default();
    Err(format!(
        "expected {rows} x {columns}{widened} for {:?}, found {edit_rows} x {edit_columns}: the adapter was made for another \
         model",
        parameter.name
    ))
}

/// The module of a parameter.
fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}
