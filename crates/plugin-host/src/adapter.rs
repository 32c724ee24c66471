//! [`Adapter`]: an adapter file opened by a plugin of `clearform.adapter/1`, as a list of edits. Applying the edits to
//! a model is the task of [`WeightEdits`](crate::WeightEdits) and [`PatchedSource`](crate::PatchedSource).

use crate::adapter_config::{AdapterConfig, component_of, unread_parts};
use crate::edit::{Edit, EditKind, EditValues};
use crate::file::PluginFile;
use crate::loaded_plugin::LoadedPlugin;
use crate::tensors::receive;
use crate::{Description, Plugin, PluginError, Result};
use candle_core::Tensor;
use clearform_plugin_abi::{ADAPTER_INTERFACE, ClearformAdapterTable, ClearformEdit, ClearformEditTensors, OK};
use clearform_weights::{Checkpoint, is_finite};
use std::collections::BTreeSet;
use std::ffi::c_void;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Far more edits than any adapter has: a larger count is a bug in the plugin.
const MAX_EDITS: usize = 1 << 20;

const WRONG_TENSORS: &str = "the plugin returned the wrong tensors for this kind of edit";

/// An adapter file that a plugin has opened.
pub struct Adapter {
    description: Description,
    plugin: LoadedPlugin,
    table: ClearformAdapterTable,
    instance: *mut c_void,
    /// Borrowed by the instance, which `drop` closes before this is dropped.
    file: PluginFile,
    /// What the user should know about its files.
    file_notes: Vec<String>,
    edits: Vec<Edit>,
    skipped: Vec<(usize, String)>,
    /// The values of one edit: those of a fused layer are needed once for each canonical tensor that it covers.
    cached_values: Mutex<Option<(usize, EditValuesAndNorms)>>,
}

/// Tensors of an edit, and the norms that it sets (DoRA).
type EditValuesAndNorms = (EditValues, Option<Tensor>);

type DescribeEdit = unsafe extern "C" fn(*mut c_void, usize, *mut ClearformEdit) -> i32;

// SAFETY: the interface allows an instance to be used from any thread.
unsafe impl Send for Adapter {}
// SAFETY: as above.
unsafe impl Sync for Adapter {}

impl Adapter {
    /// Loads `plugin` and lets it open `file`.
    ///
    /// # Errors
    /// The plugin violates the plugin interface, or rejects the file.
    pub fn open(plugin: &Plugin, file: Arc<Checkpoint>) -> Result<Self> {
        let description = plugin.description.clone();
        let plugin = LoadedPlugin::load(plugin, ADAPTER_INTERFACE)?;
        // SAFETY: this is the table of the plugin's interface.
        let table: ClearformAdapterTable = unsafe { plugin.table() }?;
        let open = plugin.function("open", table.open)?;
        plugin.function("close", table.close)?;
        let AdapterConfig { text, note } = AdapterConfig::of(&file)?;
        let config = text.or_else(|| file.config().map(ToString::to_string)).unwrap_or_default();
        let file_notes = note.into_iter().chain(unread_parts(file.path())).collect();
        let file = PluginFile::new(file, config)?;
        let mut instance = std::ptr::null_mut();
        // SAFETY: host and file outlive the instance.
        let status = unsafe { open(plugin.host(), file.table(), &raw mut instance) };
        plugin.check_status(status).map_err(|reason| {
            let reason = file.explain(reason);
            PluginError::BadAdapter { adapter: file.path().to_owned(), reason }
        })?;
        let cached_values = Mutex::default();
        let (edits, skipped) = (Vec::new(), Vec::new());
        let mut adapter =
            Self { description, plugin, table, instance, file, file_notes, edits, skipped, cached_values };
        adapter.edits = adapter.read_edits()?;
        if let Some(component) = component_of(adapter.path()) {
            adapter.edits.iter_mut().for_each(|edit| edit.set_component(&component));
        }
        adapter.skipped = adapter.read_skipped()?;
        Ok(adapter)
    }

    /// All edits.
    pub fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// Indexes of tensors that the plugin deliberately skips, with its reasons.
    pub fn skipped(&self) -> &[(usize, String)] {
        &self.skipped
    }

    /// Names of the file's tensors, in the order of their indexes.
    pub fn tensor_names(&self) -> &[String] {
        self.file.names()
    }

    /// The adapter's file or folder.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What the user should know about its files, and the plugin's messages since the last call.
    pub fn notes(&self) -> Vec<String> {
        self.file_notes.iter().cloned().chain(self.plugin.notes()).collect()
    }

    /// What the tensor `name` of the file is, if the plugin knows it as a kind that it does not apply.
    pub(crate) fn refusal(&self, name: &str) -> Option<&str> {
        self.description.refusal(name)
    }

    /// The tensors of edit `index`, checked against its shape, and its magnitude.
    pub(crate) fn values(&self, index: usize) -> Result<EditValuesAndNorms> {
        let mut cached = self.cached_values.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cached {
            Some((known, values)) if *known == index => Ok(values.clone()),
            _ => {
                let values = self.read_values(index)?;
                *cached = Some((index, values.clone()));
                Ok(values)
            }
        }
    }

    /// Checks that no tensor of edit `index` has NaN or infinity.
    pub(crate) fn check_finite(&self, index: usize) -> Result<()> {
        let (values, magnitude) = self.values(index)?;
        let tensors = match values {
            EditValues::LowRank { down, up } => vec![down, up],
            EditValues::Value(value) => vec![value],
        };
        for tensor in tensors.iter().chain(&magnitude) {
            if !is_finite(tensor)? {
                return Err(
                    self.edit_error(&self.edits[index], "its tensors have NaN or infinity: the file is damaged")
                );
            }
        }
        Ok(())
    }

    fn read_values(&self, index: usize) -> Result<EditValuesAndNorms> {
        let edit = &self.edits[index];
        let [down, up, value, magnitude] = self.read_tensors(index)?;
        let values = match (edit.kind, down, up, value) {
            (EditKind::LowRank, Some(down), Some(up), None) => EditValues::LowRank { down, up },
            (EditKind::LowRank, ..) => return Err(self.edit_error(edit, WRONG_TENSORS)),
            (_, None, None, Some(value)) => EditValues::Value(value),
            _ => return Err(self.edit_error(edit, WRONG_TENSORS)),
        };
        if magnitude.is_some() != edit.decomposed {
            return Err(self.edit_error(edit, WRONG_TENSORS));
        }
        values.check(edit).map_err(|reason| self.edit_error(edit, &reason))?;
        Ok((values, magnitude))
    }

    /// Down, up, value and magnitude of edit `index`, where the plugin returns them.
    fn read_tensors(&self, index: usize) -> Result<[Option<Tensor>; 4]> {
        let edit = &self.edits[index];
        let edit_tensors = self.plugin.function("edit_tensors", self.table.edit_tensors)?;
        let mut raw = ClearformEditTensors::EMPTY;
        // SAFETY: the instance is open, and the struct is ours.
        let status = unsafe { edit_tensors(self.instance, index, &raw mut raw) };
        // All tensors are received before the status is checked: the host owns them also if the call failed.
        // SAFETY: each is null, or a tensor that the host owns.
        let received = [raw.down, raw.up, raw.value, raw.magnitude].map(|tensor| unsafe { receive(tensor) });
        self.plugin.check_status(status).map_err(|reason| self.edit_error(edit, &self.file.explain(reason)))?;
        let mut tensors = [const { None }; 4];
        for (tensor, received) in tensors.iter_mut().zip(received) {
            *tensor = received.transpose().map_err(|error| self.edit_error(edit, &error.to_string()))?;
        }
        Ok(tensors)
    }

    /// An error about one edit.
    pub(crate) fn edit_error(&self, edit: &Edit, reason: &str) -> PluginError {
        let reason = format!("edit of {:?}: {reason}", edit.qualified_name());
        PluginError::BadAdapter { adapter: self.path().to_owned(), reason }
    }

    fn read_edits(&self) -> Result<Vec<Edit>> {
        let edit_count = self.plugin.function("edit_count", self.table.edit_count)?;
        let describe = self.plugin.function("edit", self.table.edit)?;
        self.plugin.function("edit_tensors", self.table.edit_tensors)?;
        // SAFETY: the instance is open.
        let count = unsafe { edit_count(self.instance) };
        self.plugin.check_status(OK).map_err(|reason| self.plugin.error(format!("edit_count: {reason}")))?;
        if count > MAX_EDITS {
            return Err(self.plugin.error(format!("it reports {count} edits, more than the limit of {MAX_EDITS}")));
        }
        (0..count).map(|index| self.read_edit(describe, index)).collect()
    }

    fn read_edit(&self, describe: DescribeEdit, index: usize) -> Result<Edit> {
        let mut raw = ClearformEdit::EMPTY;
        // SAFETY: the instance is open, and the struct is ours.
        let status = unsafe { describe(self.instance, index, &raw mut raw) };
        self.plugin.check_status(status).map_err(|reason| self.plugin.error(format!("edit {index}: {reason}")))?;
        // SAFETY: the plugin's pointers are valid until close.
        let edit = unsafe { Edit::from_raw(&raw, self.file.names().len()) };
        edit.map_err(|reason| self.plugin.error(format!("edit {index}: {reason}")))
    }

    fn read_skipped(&self) -> Result<Vec<(usize, String)>> {
        let skipped = self.plugin.function("skipped", self.table.skipped)?;
        let used: BTreeSet<usize> = self.edits.iter().flat_map(|edit| edit.sources.iter().copied()).collect();
        let mut reasons = Vec::new();
        for index in (0..self.file.names().len()).filter(|index| !used.contains(index)) {
            // SAFETY: the instance is open, and the text is valid until close.
            let reason = unsafe { skipped(self.instance, index).as_str() }.unwrap_or_default();
            if !reason.is_empty() {
                reasons.push((index, reason.to_owned()));
            }
        }
        self.plugin.check_status(OK).map_err(|reason| self.plugin.error(format!("skipped tensors: {reason}")))?;
        Ok(reasons)
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        if let Some(close) = self.table.close {
            // SAFETY: the instance is open, and not used after this.
            unsafe { close(self.instance) }
        }
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("path", &self.path()).field("edits", &self.edits.len()).finish_non_exhaustive()
    }
}
