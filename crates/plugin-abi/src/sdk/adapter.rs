//! [`AdapterPlugin`]: a plugin of `clearform.adapter/1`.

use super::instance::{close, guard, instance, put, write};
use super::{AdapterFile, Result};
use crate::tensor::OwnedTensor;
use crate::{
    ClearformAdapterTable, ClearformEdit, ClearformEditTensors, ClearformHost, ClearformText, EDIT_DECOMPOSED,
    EDIT_DELTA, EDIT_LOW_RANK, EDIT_REPLACE, EDIT_SCALE, WHOLE_PARAMETER,
};
use std::ffi::c_void;

/// What an edit does, with its factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EditOperation {
    /// W + scale · up · down.
    LowRank {
        /// The adapter's own factor, such as alpha / rank.
        scale: f64,
    },
    /// W + scale · value.
    Delta {
        /// The adapter's own factor.
        scale: f64,
    },
    /// The value in place of W.
    Replace,
    /// Each row of W times its number.
    Scale,
}

/// One edit of one parameter.
#[derive(Debug, Clone)]
pub struct ParameterEdit {
    /// What it does.
    pub kind: EditOperation,
    /// Whether it has a magnitude.
    pub decomposed: bool,
    /// The part of the pipeline ("transformer").
    pub component: String,
    /// The parameter, in any layout, with dots or underscores.
    pub parameter: String,
    /// The row at which it begins, where it is not the whole parameter.
    pub first_row: Option<usize>,
    /// Rows that it edits, and elements of a row: 1 for a bias or a norm.
    pub extents: [usize; 2],
    /// Indexes of the file's tensors that it uses up.
    pub sources: Vec<usize>,
}

/// The tensors of an edit, ready to be given: see [`give`](crate::tensor::give) and [`OwnedTensor::into_raw`].
#[derive(Debug, Default)]
pub struct GivenTensors {
    /// (rank, inputs) of a low-rank edit.
    pub down: Option<OwnedTensor>,
    /// (outputs, rank) of a low-rank edit.
    pub up: Option<OwnedTensor>,
    /// Of every other kind.
    pub value: Option<OwnedTensor>,
    /// Norms of the edited weight (DoRA).
    pub magnitude: Option<OwnedTensor>,
}

/// A plugin of `clearform.adapter/1`.
pub trait AdapterPlugin: Send + Sync + Sized {
    /// Opens a file that the plugin's claims fit. Reads no more than it needs to tell the edits.
    ///
    /// # Errors
    /// What is wrong with the file, and what to do.
    fn open(file: AdapterFile) -> Result<Self>;

    /// Every edit.
    fn edits(&self) -> &[ParameterEdit];

    /// The tensors of edit `index`.
    ///
    /// # Errors
    /// They cannot be read, or do not fit together.
    fn tensors(&self, index: usize) -> Result<GivenTensors>;

    /// Why the file's tensor `index` is in no edit; empty without a reason, which the host calls an error.
    fn skipped(&self, index: usize) -> &str;
}

impl ParameterEdit {
    fn describe(&self) -> ClearformEdit {
        let (kind, scale) = match self.kind {
            EditOperation::LowRank { scale } => (EDIT_LOW_RANK, scale),
            EditOperation::Delta { scale } => (EDIT_DELTA, scale),
            EditOperation::Replace => (EDIT_REPLACE, 1.0),
            EditOperation::Scale => (EDIT_SCALE, 1.0),
        };
        ClearformEdit {
            struct_size: size_of::<ClearformEdit>() as u32,
            kind,
            flags: if self.decomposed { EDIT_DECOMPOSED } else { 0 },
            reserved: 0,
            component: ClearformText::new(&self.component),
            parameter: ClearformText::new(&self.parameter),
            first_row: self.first_row.map_or(WHOLE_PARAMETER, |row| row as i64),
            rows: self.extents[0] as u64,
            columns: self.extents[1] as u64,
            scale,
            sources: self.sources.as_ptr(),
            source_count: self.sources.len(),
        }
    }
}

impl ClearformAdapterTable {
    /// The table of `T`.
    pub const fn of<T: AdapterPlugin>() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            reserved: 0,
            open: Some(open_adapter::<T>),
            close: Some(close::<T>),
            edit_count: Some(edit_count::<T>),
            edit: Some(edit::<T>),
            edit_tensors: Some(edit_tensors::<T>),
            skipped: Some(skipped::<T>),
        }
    }
}

// What follows is called by the host alone, which keeps to the comments of the tables: pointers are valid, instances
// come from `open` of the same table, and none is used after `close`. Each SAFETY below rests on that.

unsafe extern "C" fn open_adapter<T: AdapterPlugin>(
    host: *const ClearformHost,
    file: *const crate::ClearformFile,
    out: *mut *mut c_void,
) -> i32 {
    guard(host, || {
        let opened = T::open(AdapterFile { file, host })?;
        // SAFETY: the host's promise.
        unsafe { put(host, opened, out) };
        Ok(())
    })
}

unsafe extern "C" fn edit_count<T: AdapterPlugin>(pointer: *mut c_void) -> usize {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    let mut count = 0;
    guard(instance.host, || {
        count = instance.inner.edits().len();
        Ok(())
    });
    count
}

unsafe extern "C" fn edit<T: AdapterPlugin>(pointer: *mut c_void, index: usize, out: *mut ClearformEdit) -> i32 {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let described = instance.inner.edits().get(index).ok_or("there is no such edit")?.describe();
        // SAFETY: the host's promise.
        unsafe { write(out, described, (*out).struct_size) };
        Ok(())
    })
}

unsafe extern "C" fn edit_tensors<T: AdapterPlugin>(
    pointer: *mut c_void,
    index: usize,
    out: *mut ClearformEditTensors,
) -> i32 {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let GivenTensors { down, up, value, magnitude } = instance.inner.tensors(index)?;
        let raw = |tensor: Option<OwnedTensor>| tensor.map_or(std::ptr::null_mut(), OwnedTensor::into_raw);
        let struct_size = size_of::<ClearformEditTensors>() as u32;
        let (down, up, value, magnitude) = (raw(down), raw(up), raw(value), raw(magnitude));
        let given = ClearformEditTensors { struct_size, reserved: 0, down, up, value, magnitude };
        // SAFETY: the host's promise.
        unsafe { write(out, given, (*out).struct_size) };
        Ok(())
    })
}

unsafe extern "C" fn skipped<T: AdapterPlugin>(pointer: *mut c_void, index: usize) -> ClearformText {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    let mut reason = ClearformText::EMPTY;
    guard(instance.host, || {
        reason = ClearformText::new(instance.inner.skipped(index));
        Ok(())
    });
    reason
}
