//! [`AdapterPlugin`]: an adapter file, opened by a plugin of `clearform.adapter/1`: its edits, and what became of each tensor.
//! What edits do to a model it does not know.

use crate::file::LentFile;
use crate::library::Library;
use crate::tensors::receive;
use crate::{Plugin, PluginError, Result};
use candle_core::Tensor;
use clearform_plugin_abi::{
    ADAPTER_INTERFACE, ClearformAdapterTable, ClearformEdit as RawEdit, ClearformEditTensors, EDIT_DECOMPOSED,
    EDIT_DELTA, EDIT_LOW_RANK, EDIT_REPLACE, EDIT_SCALE, OK, WHOLE_PARAMETER,
};
use clearform_weights::Checkpoint;
use std::ffi::c_void;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// More edits than any adapter has: a plugin that says so is wrong.
const MOST_EDITS: usize = 1 << 20;

/// What an edit does to a weight W.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EditKind {
    /// W + scale · up · down.
    LowRank,
    /// W + scale · value.
    Delta,
    /// The value in place of W.
    Replace,
    /// Each row of W times its number.
    Scale,
}

/// One edit, as the plugin tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// What it does.
    pub kind: EditKind,
    /// Whether the edited weight shall have norms of the adapter's own.
    pub decomposed: bool,
    /// The part of the pipeline; a `*` at its end stands for any text.
    pub component: String,
    /// The parameter, in any layout.
    pub parameter: String,
    /// Its first row; the whole parameter without it.
    pub first_row: Option<usize>,
    /// Rows it edits, and elements of a row.
    pub extents: [usize; 2],
    /// The adapter's own factor.
    pub scale: f64,
    /// Indexes of the file's tensors that it uses up.
    pub sources: Vec<usize>,
}

/// Tensors of an edit, on the CPU.
#[derive(Debug, Clone)]
pub(crate) enum EditValues {
    /// Factors.
    LowRank { down: Tensor, up: Tensor },
    /// A value for each element or row.
    Value(Tensor),
}

const OTHER_TENSORS: &str = "the plugin gave other tensors than such an edit has";

/// An open adapter.
pub struct Adapter {
    library: Library,
    table: ClearformAdapterTable,
    instance: *mut c_void,
    /// Lent to the instance, which is closed first.
    file: LentFile,
    edits: Vec<Edit>,
    skipped: Vec<(usize, String)>,
    /// The last edit whose tensors were asked for: a fused layer's are wanted once for each of its parts.
    last: Mutex<Option<(usize, EditValuesAndNorms)>>,
}

/// Tensors of an edit, and the norms that the edited weight shall have.
type EditValuesAndNorms = (EditValues, Option<Tensor>);

// SAFETY: the table's comments let any thread call an instance.
unsafe impl Send for Adapter {}
// SAFETY: as above.
unsafe impl Sync for Adapter {}

impl Adapter {
    /// Loads `plugin` and lets it open `file`.
    ///
    /// # Errors
    /// The plugin does not keep to the boundary, or refuses the file.
    pub fn open(plugin: &Plugin, file: Arc<Checkpoint>) -> Result<Self> {
        let library = Library::load(plugin, ADAPTER_INTERFACE)?;
        // SAFETY: the library's interface is this one.
        let table: ClearformAdapterTable = unsafe { library.table() }?;
        let open = library.function("open", table.open)?;
        library.function("close", table.close)?;
        let file = LentFile::new(file);
        let mut instance = std::ptr::null_mut();
        // SAFETY: host and file stand until close.
        let status = unsafe { open(library.host(), file.table(), &raw mut instance) };
        let bad = |reason| PluginError::BadAdapter { adapter: file.path().to_owned(), reason };
        library.outcome(status).map_err(|reason| bad(file.explain(reason)))?;
        let (edits, skipped, last) = (Vec::new(), Vec::new(), Mutex::default());
        let mut adapter = Self { library, table, instance, file, edits, skipped, last };
        adapter.edits = adapter.read_edits()?;
        adapter.skipped = adapter.read_skipped()?;
        Ok(adapter)
    }

    /// Every edit.
    pub fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// Indexes of tensors that the plugin leaves out, with its reasons.
    pub fn skipped(&self) -> &[(usize, String)] {
        &self.skipped
    }

    /// Names of the file's tensors; an index counts them.
    pub fn tensor_names(&self) -> &[String] {
        self.file.names()
    }

    /// The adapter's file or folder.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What the plugin has to say since the last time.
    pub fn notes(&self) -> Vec<String> {
        self.library.notes()
    }

    /// The tensors of edit `index`, which have the extents that it told, and its magnitude.
    pub(crate) fn values(&self, index: usize) -> Result<EditValuesAndNorms> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((known, values)) if *known == index => Ok(values.clone()),
            _ => {
                let values = self.read_values(index)?;
                *last = Some((index, values.clone()));
                Ok(values)
            }
        }
    }

    fn read_values(&self, index: usize) -> Result<EditValuesAndNorms> {
        let edit = &self.edits[index];
        let function = self.library.function("edit_tensors", self.table.edit_tensors)?;
        let mut raw = ClearformEditTensors::EMPTY;
        // SAFETY: the instance is open, and the struct is ours.
        let status = unsafe { function(self.instance, index, &raw mut raw) };
        // What was given is ours now, whatever the outcome.
        // SAFETY: each is null, or a tensor that the plugin gave away.
        let [down, up, value, magnitude] =
            [raw.down, raw.up, raw.value, raw.magnitude].map(|tensor| unsafe { receive(tensor) });
        self.library.outcome(status).map_err(|reason| self.bad(edit, &self.file.explain(reason)))?;
        let whole =
            |tensor: Option<Result<Tensor>>| tensor.transpose().map_err(|error| self.bad(edit, &error.to_string()));
        let (down, up, value, magnitude) = (whole(down)?, whole(up)?, whole(value)?, whole(magnitude)?);
        let values = match (edit.kind, down, up, value) {
            (EditKind::LowRank, Some(down), Some(up), None) => EditValues::LowRank { down, up },
            (EditKind::LowRank, ..) => return Err(self.bad(edit, OTHER_TENSORS)),
            (_, None, None, Some(value)) => EditValues::Value(value),
            _ => return Err(self.bad(edit, OTHER_TENSORS)),
        };
        if magnitude.is_some() != edit.decomposed {
            return Err(self.bad(edit, OTHER_TENSORS));
        }
        values.check(edit).map_err(|reason| self.bad(edit, &reason))?;
        Ok((values, magnitude))
    }

    pub(crate) fn bad(&self, edit: &Edit, reason: &str) -> PluginError {
        let reason = format!("edit of {:?}: {reason}", format!("{}.{}", edit.component, edit.parameter));
        PluginError::BadAdapter { adapter: self.path().to_owned(), reason }
    }

    fn read_edits(&self) -> Result<Vec<Edit>> {
        let count = self.library.function("edit_count", self.table.edit_count)?;
        let describe = self.library.function("edit", self.table.edit)?;
        self.library.function("edit_tensors", self.table.edit_tensors)?;
        // SAFETY: the instance is open.
        let count = unsafe { count(self.instance) };
        self.library.outcome(OK).map_err(|reason| self.library.bad(format!("its edits: {reason}")))?;
        if count > MOST_EDITS {
            return Err(self.library.bad(format!("it tells of {count} edits, more than any adapter has")));
        }
        (0..count).map(|index| self.read_edit(describe, index)).collect()
    }

    fn read_edit(
        &self,
        describe: unsafe extern "C" fn(*mut c_void, usize, *mut RawEdit) -> i32,
        index: usize,
    ) -> Result<Edit> {
        let mut raw = RawEdit::EMPTY;
        // SAFETY: the instance is open, and the struct is ours.
        let status = unsafe { describe(self.instance, index, &raw mut raw) };
        self.library.outcome(status).map_err(|reason| self.library.bad(format!("edit {index}: {reason}")))?;
        // SAFETY: texts and array are the plugin's, and stand until close.
        let read = unsafe { Edit::read(&raw, self.file.names().len()) };
        read.map_err(|reason| self.library.bad(format!("edit {index}: {reason}")))
    }

    fn read_skipped(&self) -> Result<Vec<(usize, String)>> {
        let function = self.library.function("skipped", self.table.skipped)?;
        let used: std::collections::BTreeSet<usize> =
            self.edits.iter().flat_map(|edit| edit.sources.iter().copied()).collect();
        let rest = (0..self.file.names().len()).filter(|index| !used.contains(index));
        // SAFETY: the instance is open, and the text stands until close.
        let reason = |index| unsafe { function(self.instance, index).as_str() }.unwrap_or_default().to_owned();
        let told: Vec<_> = rest.map(|index| (index, reason(index))).filter(|(_, reason)| !reason.is_empty()).collect();
        self.library.outcome(OK).map_err(|reason| self.library.bad(format!("what it leaves out: {reason}")))?;
        Ok(told)
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        if let Some(close) = self.table.close {
            // SAFETY: the instance is open, and nobody has it after this.
            unsafe { close(self.instance) }
        }
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("path", &self.path()).field("edits", &self.edits.len()).finish_non_exhaustive()
    }
}

impl Edit {
    /// # Safety
    /// Texts and array of `raw` are valid.
    unsafe fn read(raw: &RawEdit, tensors: usize) -> std::result::Result<Self, String> {
        // SAFETY: the caller says so.
        let (component, parameter) = unsafe { (raw.component.as_str(), raw.parameter.as_str()) };
        let (Some(component), Some(parameter)) = (component, parameter) else {
            return Err("its names are no UTF-8".to_owned());
        };
        if raw.flags & !EDIT_DECOMPOSED != 0 {
            return Err(format!("its flags {:#x} are not known", raw.flags));
        }
        if !raw.scale.is_finite() {
            return Err(format!("its scale is {}", raw.scale));
        }
        Ok(Self {
            kind: EditKind::read(raw.kind)?,
            decomposed: raw.flags & EDIT_DECOMPOSED != 0,
            component: component.to_owned(),
            parameter: parameter.to_owned(),
            first_row: first_row(raw.first_row)?,
            extents: [raw.rows as usize, raw.columns as usize],
            scale: raw.scale,
            // SAFETY: as above.
            sources: unsafe { sources(raw, tensors) }?,
        })
    }
}

impl EditKind {
    fn read(kind: u32) -> std::result::Result<Self, String> {
        match kind {
            EDIT_LOW_RANK => Ok(Self::LowRank),
            EDIT_DELTA => Ok(Self::Delta),
            EDIT_REPLACE => Ok(Self::Replace),
            EDIT_SCALE => Ok(Self::Scale),
            other => Err(format!("kind {other} is not known")),
        }
    }
}

fn first_row(row: i64) -> std::result::Result<Option<usize>, String> {
    match row {
        WHOLE_PARAMETER => Ok(None),
        row => usize::try_from(row).map(Some).map_err(|_| format!("its first row is {row}")),
    }
}

/// # Safety
/// The array of `raw` is valid.
unsafe fn sources(raw: &RawEdit, tensors: usize) -> std::result::Result<Vec<usize>, String> {
    if raw.source_count > tensors || (raw.source_count > 0 && raw.sources.is_null()) {
        return Err(format!("it is made of {} tensors, but the file has {tensors}", raw.source_count));
    }
    let sources: Vec<usize> = match raw.source_count {
        0 => Vec::new(),
        // SAFETY: the caller says so; it is not null, and no longer than the file has tensors.
        count => unsafe { std::slice::from_raw_parts(raw.sources, count) }.to_vec(),
    };
    match sources.iter().find(|index| **index >= tensors) {
        Some(index) => Err(format!("it is made of tensor {index}, but the file has {tensors}")),
        None => Ok(sources),
    }
}

impl EditValues {
    /// Whether the tensors have the extents that `edit` told.
    fn check(&self, edit: &Edit) -> std::result::Result<(), String> {
        let [rows, columns] = edit.extents;
        let fits = match self {
            Self::LowRank { down, up } => {
                let rank = down.dims().first().copied().unwrap_or(0);
                rank > 0
                    && up.rank() >= 2
                    && down.rank() >= 2
                    && up.dims()[0] == rows
                    && Some(up.elem_count()) == rows.checked_mul(rank)
                    && Some(down.elem_count()) == rank.checked_mul(columns)
            }
            Self::Value(value) if edit.kind == EditKind::Scale => value.elem_count() == rows,
            Self::Value(value) => Some(value.elem_count()) == rows.checked_mul(columns),
        };
        if fits {
            return Ok(());
        }
        let shapes: Vec<&[usize]> = match self {
            Self::LowRank { down, up } => vec![down.dims(), up.dims()],
            Self::Value(value) => vec![value.dims()],
        };
        Err(format!("it told of {rows} x {columns}, but its tensors are {shapes:?}"))
    }
}
