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
    /// Elements of a row after the edit.
    pub columns: usize,
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

    /// The component and the parameter that `edit` names, or why there is none.
    fn find(&self, edit: &Edit) -> Result<(&str, &LayoutParameter), NotPlaced> {
        let is_named = |name: &&String| clearform_layout::glob(&edit.component, name);
        let mut named = self.components.iter().filter(|(name, _)| is_named(name)).peekable();
        if named.peek().is_none() {
            return Err(match &self.skip_others {
                Some(reason) => NotPlaced::Skipped(reason.clone()),
                None => NotPlaced::Unmatched(format!("the model has no component {:?}", edit.component)),
            });
        }
        let found = named.find_map(|(name, parameters)| Some((name.as_str(), parameters.find(&edit.parameter)?)));
        let unknown = || format!("the component {:?} has no parameter {:?}", edit.component, edit.parameter);
        found.ok_or_else(|| NotPlaced::Unmatched(unknown()))
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
}

impl PlacementCount {
    fn count(&mut self, edit: &Edit, found: Result<(&str, &LayoutParameter), NotPlaced>) {
        let sources = edit.sources.iter().copied();
        match found {
            Ok((component, parameter)) => {
                self.modules.insert(format!("{component}.{}", module(&parameter.name)));
                let canonical = parameter.segments.iter().map(|segment| &segment.canonical);
                self.edited.extend(canonical.chain([&parameter.name]).map(|name| format!("{component}.{name}")));
                self.applied.extend(sources);
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
        self.applied.retain(|index| !self.unmatched.contains_key(index));
        let by_name = |reasons: BTreeMap<usize, String>| {
            reasons.into_iter().map(|(index, reason)| (names[index].clone(), reason)).collect()
        };
        AdapterReport {
            adapter: adapter.path().to_owned(),
            tensors: names.len(),
            applied: self.applied.len(),
            modules: self.modules.len(),
            skipped: by_name(self.skipped),
            unmatched: by_name(self.unmatched),
            idle: scaled.strength.unmatched(&self.edited).into_iter().map(str::to_owned).collect(),
            notes: adapter.notes(),
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
            let found = components.find(edit).and_then(|(component, parameter)| {
                self.add(scaled, index, component, parameter).map_err(NotPlaced::Unmatched)?;
                Ok((component, parameter))
            });
            count.count(edit, found);
        }
        count.report(scaled)
    }

    /// Adds edit `index` to every canonical tensor that contains edited rows of `parameter`.
    fn add(
        &mut self,
        scaled: &ScaledAdapter,
        index: usize,
        component: &str,
        parameter: &LayoutParameter,
    ) -> Result<(), String> {
        let edit = &scaled.adapter.edits()[index];
        for (canonical, rows) in canonical_rows(parameter, edited_rows(edit, parameter)?) {
            let strength = scaled.strength.factor(component, &[canonical, &parameter.name]);
            let adapter = scaled.adapter.clone();
            let placed = PlacedEdit { adapter, edit: index, strength, rows, columns: edit.shape[1] };
            let edits = self.components.entry(component.to_owned()).or_default();
            edits.entry(canonical.to_owned()).or_default().push(placed);
        }
        Ok(())
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

/// The rows of `parameter` that `edit` covers. An edit of a whole matrix may also add columns; whether the model
/// accepts the new size is checked later.
fn edited_rows(edit: &Edit, parameter: &LayoutParameter) -> Result<Range<usize>, String> {
    let rows = parameter.shape.first().copied().unwrap_or(1);
    let columns = parameter.shape.iter().skip(1).product::<usize>();
    let [edit_rows, edit_columns] = edit.shape;
    let first = edit.first_row.unwrap_or(0);
    let rows_fit = match edit.first_row {
        None => edit_rows == rows,
        Some(_) => edit_rows.checked_add(first).is_some_and(|end| end <= rows),
    };
    let can_widen = parameter.shape.len() == 2 && edit.first_row.is_none();
    let can_widen = can_widen && matches!(edit.kind, EditKind::LowRank | EditKind::Delta | EditKind::Replace);
    // A factor applies to its whole row, so the columns of a scaling edit do not matter.
    let columns_fit = edit_columns == columns || edit.kind == EditKind::Scale;
    if rows_fit && (columns_fit || (can_widen && edit_columns > columns)) {
        return Ok(first..first + edit_rows);
    }
    Err(format!(
        "expected {rows} x {columns} for {:?}, found {edit_rows} x {edit_columns}: the adapter was made for another \
         model",
        parameter.name
    ))
}

/// The module of a parameter.
fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}
