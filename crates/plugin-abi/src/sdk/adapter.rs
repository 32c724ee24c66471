//! [`AdapterPlugin`]: a plugin for `clearform.adapter/1`.

use super::Result;
use super::file::AdapterFile;
use super::instance::{close, copy_to_host, guard, instance, store_instance};
use crate::tensor::OwnedTensor;
use crate::{
    ClearformAdapterTable, ClearformEdit, ClearformEditTensors, ClearformFile, ClearformHost, ClearformText,
    EDIT_DECOMPOSED, EDIT_DELTA, EDIT_LOW_RANK, EDIT_REPLACE, EDIT_SCALE, WHOLE_PARAMETER,
};
use std::ffi::c_void;

/// What an edit does to a weight W.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EditOperation {
    /// W + scale · up · down.
    LowRank {
        /// The adapter's own scale, such as alpha / rank.
        scale: f64,
    },
    /// W + scale · value.
    Delta {
        /// The adapter's own scale.
        scale: f64,
    },
    /// `value` replaces W.
    Replace,
    /// Each row of W times its factor in `value`.
    Scale,
}

/// One edit of one parameter.
#[derive(Debug, Clone)]
pub struct ParameterEdit {
    /// What the edit does.
    pub operation: EditOperation,
    /// Whether the edit has a magnitude (DoRA).
    pub decomposed: bool,
    /// Component of the pipeline, such as "transformer". A trailing `*` matches any ending.
    pub component: String,
    /// Name of the parameter, in any layout, with dots or underscores.
    pub parameter: String,
    /// First row that is edited; `None` for the whole parameter.
    pub first_row: Option<usize>,
    /// Number of edited rows, and of elements in a row: 1 for a bias or a norm.
    pub shape: [usize; 2],
    /// Indexes of the file's tensors that the edit is made from.
    pub sources: Vec<usize>,
}

/// The tensors of an edit.
#[derive(Debug, Default)]
pub struct EditTensors {
    /// (rank, inputs) of a low-rank edit.
    pub down: Option<OwnedTensor>,
    /// (outputs, rank) of a low-rank edit.
    pub up: Option<OwnedTensor>,
    /// For every other kind of edit.
    pub value: Option<OwnedTensor>,
    /// Norms of the edited weight (DoRA).
    pub magnitude: Option<OwnedTensor>,
}

/// A plugin for `clearform.adapter/1`: an adapter file as a list of edits.
pub trait AdapterPlugin: Send + Sync + Sized {
    /// Opens a file that matches the plugin's claims. It should read no more than it needs to list the edits.
    ///
    /// # Errors
    /// What is wrong with the file, and what to do about it.
    fn open(file: AdapterFile) -> Result<Self>;

    /// All edits.
    fn edits(&self) -> &[ParameterEdit];

    /// The tensors of edit `index`. The host may ask for them several times.
    ///
    /// # Errors
    /// They cannot be read, or do not fit together.
    fn tensors(&self, index: usize) -> Result<EditTensors>;

    /// Why tensor `index` of the file is deliberately in no edit. Empty if there is no reason: the host then reports
    /// the tensor as not understood.
    fn skipped(&self, index: usize) -> &str;
}

impl ParameterEdit {
    fn to_c(&self) -> ClearformEdit {
        let (kind, scale) = self.operation.kind_and_scale();
        ClearformEdit {
            kind,
            flags: if self.decomposed { EDIT_DECOMPOSED } else { 0 },
            component: ClearformText::new(&self.component),
            parameter: ClearformText::new(&self.parameter),
            first_row: self.first_row.map_or(WHOLE_PARAMETER, |row| row as i64),
            rows: self.shape[0] as u64,
            columns: self.shape[1] as u64,
            scale,
            sources: self.sources.as_ptr(),
            source_count: self.sources.len(),
            ..ClearformEdit::EMPTY
        }
    }
}

impl EditOperation {
    fn kind_and_scale(self) -> (u32, f64) {
        match self {
            Self::LowRank { scale } => (EDIT_LOW_RANK, scale),
            Self::Delta { scale } => (EDIT_DELTA, scale),
            Self::Replace => (EDIT_REPLACE, 1.0),
            Self::Scale => (EDIT_SCALE, 1.0),
        }
    }
}

impl EditTensors {
    fn into_c(self) -> ClearformEditTensors {
        ClearformEditTensors {
            down: pointer_or_null(self.down),
            up: pointer_or_null(self.up),
            value: pointer_or_null(self.value),
            magnitude: pointer_or_null(self.magnitude),
            ..ClearformEditTensors::EMPTY
        }
    }
}

fn pointer_or_null(tensor: Option<OwnedTensor>) -> *mut crate::dlpack::DLManagedTensorVersioned {
    tensor.map_or(std::ptr::null_mut(), OwnedTensor::into_raw)
}

impl ClearformAdapterTable {
    /// The table of the plugin `T`.
    pub const fn of<T: AdapterPlugin>() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            reserved: 0,
            open: Some(open::<T>),
            close: Some(close::<T>),
            edit_count: Some(edit_count::<T>),
            edit: Some(edit::<T>),
            edit_tensors: Some(edit_tensors::<T>),
            skipped: Some(skipped::<T>),
        }
    }
}

// Only the host calls the functions below, and it follows the comments of the tables: pointers are valid, instances
// come from `open` of the same table, and none is used after `close`. The SAFETY comments refer to this as the host's
// contract.

unsafe extern "C" fn open<T: AdapterPlugin>(
    host: *const ClearformHost,
    file: *const ClearformFile,
    out: *mut *mut c_void,
) -> i32 {
    guard(host, || {
        let plugin = T::open(AdapterFile { file, host })?;
        // SAFETY: the host's contract.
        unsafe { store_instance(host, plugin, out) };
        Ok(())
    })
}

unsafe extern "C" fn edit_count<T: AdapterPlugin>(pointer: *mut c_void) -> usize {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    let mut count = 0;
    guard(instance.host, || {
        count = instance.plugin.edits().len();
        Ok(())
    });
    count
}

unsafe extern "C" fn edit<T: AdapterPlugin>(pointer: *mut c_void, index: usize, out: *mut ClearformEdit) -> i32 {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let edit = instance.plugin.edits().get(index).ok_or_else(|| format!("there is no edit {index}"))?;
        // SAFETY: the host's contract.
        unsafe { copy_to_host(out, edit.to_c(), (*out).struct_size) };
        Ok(())
    })
}

unsafe extern "C" fn edit_tensors<T: AdapterPlugin>(
    pointer: *mut c_void,
    index: usize,
    out: *mut ClearformEditTensors,
) -> i32 {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let tensors = instance.plugin.tensors(index)?.into_c();
        // SAFETY: the host's contract.
        unsafe { copy_to_host(out, tensors, (*out).struct_size) };
        Ok(())
    })
}

unsafe extern "C" fn skipped<T: AdapterPlugin>(pointer: *mut c_void, index: usize) -> ClearformText {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    let mut reason = ClearformText::EMPTY;
    guard(instance.host, || {
        reason = ClearformText::new(instance.plugin.skipped(index));
        Ok(())
    });
    reason
}
