//! Interface `clearform.adapter/1`: the plugin turns an adapter file into a list of parameter edits.
//!
//! A plugin names a parameter as any known layout of the model's family does, with dots or with underscores. The host
//! maps that name to the model's own tensors and rows, so a plugin needs no knowledge of model families. W is the
//! weight that is edited.

use crate::dlpack::DLManagedTensorVersioned;
use crate::host::{ClearformFile, ClearformHost, ClearformText};
use std::ffi::c_void;

/// W + scale · up · down, with the low-rank factors up (outputs, rank) and down (rank, inputs).
pub const EDIT_LOW_RANK: u32 = 1;
/// W + scale · value; `value` has the parameter's shape.
pub const EDIT_DELTA: u32 = 2;
/// `value` replaces W. It may have more columns.
pub const EDIT_REPLACE: u32 = 3;
/// Each row of W times its factor in `value` (rows).
pub const EDIT_SCALE: u32 = 4;

/// Flag: the edit has a magnitude (DoRA).
pub const EDIT_DECOMPOSED: u32 = 1;

/// [`ClearformEdit::first_row`] of an edit that covers the whole parameter.
pub const WHOLE_PARAMETER: i64 = -1;

/// One edit of one parameter. The host zeroes it and sets `struct_size`; the plugin fills in the rest. Its pointers are
/// owned by the plugin and stay valid until `close`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformEdit {
    /// Size of this struct in bytes. Set by the host.
    pub struct_size: u32,
    /// [`EDIT_LOW_RANK`] and so on.
    pub kind: u32,
    /// [`EDIT_DECOMPOSED`], or zero.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// Component of the pipeline, by its folder: `transformer`, `text_encoder`, `text_encoder_2`, `vae`. A trailing `*`
    /// matches any ending; the first component that has the parameter is used.
    pub component: ClearformText,
    /// Name of the parameter within the component, in any layout.
    pub parameter: ClearformText,
    /// First row that is edited, or [`WHOLE_PARAMETER`].
    pub first_row: i64,
    /// Number of edited rows; the edit's tensors have as many.
    pub rows: u64,
    /// Elements in a row; 1 for a bias or a norm.
    pub columns: u64,
    /// The adapter's own scale, such as alpha / rank. The host applies the user's strength on top.
    pub scale: f64,
    /// Indexes of the file's tensors that this edit is made from.
    pub sources: *const usize,
    /// Number of indexes.
    pub source_count: usize,
}

/// The tensors of an edit, on the CPU. The host zeroes it and sets `struct_size`; the plugin fills in those that the
/// edit has. The host then owns them and calls their deleters, also if the call fails.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformEditTensors {
    /// Size of this struct in bytes. Set by the host.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// (rank, inputs); only for [`EDIT_LOW_RANK`].
    pub down: *mut DLManagedTensorVersioned,
    /// (outputs, rank); only for [`EDIT_LOW_RANK`].
    pub up: *mut DLManagedTensorVersioned,
    /// For every other kind.
    pub value: *mut DLManagedTensorVersioned,
    /// Norms of the edited weight: of its rows, (outputs) or (outputs, 1), or of its columns, (1, inputs). Weight
    /// decomposition (DoRA, arXiv 2402.09353, eq. 5). Null without [`EDIT_DECOMPOSED`].
    pub magnitude: *mut DLManagedTensorVersioned,
}

impl ClearformEdit {
    /// An empty struct, as the host passes it to a plugin.
    pub const EMPTY: Self = Self {
        struct_size: size_of::<Self>() as u32,
        kind: 0,
        flags: 0,
        reserved: 0,
        component: ClearformText::EMPTY,
        parameter: ClearformText::EMPTY,
        first_row: WHOLE_PARAMETER,
        rows: 0,
        columns: 0,
        scale: 0.0,
        sources: std::ptr::null(),
        source_count: 0,
    };
}

impl ClearformEditTensors {
    /// An empty struct, as the host passes it to a plugin.
    pub const EMPTY: Self = Self {
        struct_size: size_of::<Self>() as u32,
        reserved: 0,
        down: std::ptr::null_mut(),
        up: std::ptr::null_mut(),
        value: std::ptr::null_mut(),
        magnitude: std::ptr::null_mut(),
    };
}

/// The function table of `clearform.adapter/1`. No function may be null. The host may use an instance from any thread,
/// and from several at once; `close` is the last call and runs alone. A function without a status reports a failure
/// with [`ClearformHost::fail`].
#[repr(C)]
#[derive(Debug)]
pub struct ClearformAdapterTable {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Opens a file that matches the plugin's claims. `host` and `file` are borrowed until `close`. Stores a new
    /// instance in `instance` if it succeeds; the plugin frees it in `close`.
    pub open: Option<
        unsafe extern "C" fn(host: *const ClearformHost, file: *const ClearformFile, instance: *mut *mut c_void) -> i32,
    >,
    /// Frees an instance. Tensors that the host received from it stay valid.
    pub close: Option<unsafe extern "C" fn(instance: *mut c_void)>,
    /// Number of edits.
    pub edit_count: Option<unsafe extern "C" fn(instance: *mut c_void) -> usize>,
    /// Describes edit `index` without computing its tensors. `edit` is borrowed for the call.
    pub edit: Option<unsafe extern "C" fn(instance: *mut c_void, index: usize, edit: *mut ClearformEdit) -> i32>,
    /// Returns the tensors of edit `index`. The host may ask for them several times rather than keep large tensors.
    /// `tensors` is borrowed for the call.
    pub edit_tensors:
        Option<unsafe extern "C" fn(instance: *mut c_void, index: usize, tensors: *mut ClearformEditTensors) -> i32>,
    /// Why tensor `index` of the file is deliberately in no edit. Empty if there is no reason: the host then reports
    /// the tensor as not understood. The text stays valid until `close`.
    pub skipped: Option<unsafe extern "C" fn(instance: *mut c_void, index: usize) -> ClearformText>,
}
