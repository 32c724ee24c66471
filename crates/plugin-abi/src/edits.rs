//! The interface `clearform.adapter/1`: an adapter file becomes a list of edits of parameters.
//!
//! A plugin names parameters as any layout of the model's family does, with dots or with underscores in their place; the
//! host finds where their rows lie in the model. So a plugin needs to know no family.

use crate::dlpack::DLManagedTensorVersioned;
use crate::{ClearformFile, ClearformHost, ClearformText};
use std::ffi::c_void;

/// W + scale · up · down, of factors up (outputs, rank) and down (rank, inputs).
pub const EDIT_LOW_RANK: u32 = 1;
/// W + scale · value, of a value shaped as the parameter.
pub const EDIT_DELTA: u32 = 2;
/// The value in place of the parameter, which may have another number of columns.
pub const EDIT_REPLACE: u32 = 3;
/// Each row of W times its number in value (rows).
pub const EDIT_SCALE: u32 = 4;

/// A flag: the edit has a magnitude.
pub const EDIT_DECOMPOSED: u32 = 1;

/// [`ClearformEdit::first_row`] of an edit of the whole parameter.
pub const WHOLE_PARAMETER: i64 = -1;

/// One edit of one parameter. The host makes it empty and writes `struct_size`; the plugin fills in the rest. Texts and
/// arrays in it are the plugin's, and stand until `close`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformEdit {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// [`EDIT_LOW_RANK`] and so on.
    pub kind: u32,
    /// [`EDIT_DECOMPOSED`], or zero.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The part of the pipeline, by its folder: `transformer`, `text_encoder`, `text_encoder_2`, `vae`. A `*` at the end
    /// stands for any, of which the first that has the parameter is meant.
    pub component: ClearformText,
    /// The parameter within the part, in any layout.
    pub parameter: ClearformText,
    /// The row at which the edit begins, or [`WHOLE_PARAMETER`].
    pub first_row: i64,
    /// Rows that it edits, which its tensors have.
    pub rows: u64,
    /// Elements of a row; 1 for a bias or a norm.
    pub columns: u64,
    /// The adapter's own factor, such as alpha / rank. The person's strength comes on top.
    pub scale: f64,
    /// Indexes of the file's tensors that this edit uses up.
    pub sources: *const usize,
    /// How many there are.
    pub source_count: usize,
}

/// The tensors of an edit, on the CPU. The host makes it empty and writes `struct_size`; the plugin fills in those that the
/// edit has, and all of them belong to the host then.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformEditTensors {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// (rank, inputs) of [`EDIT_LOW_RANK`].
    pub down: *mut DLManagedTensorVersioned,
    /// (outputs, rank) of [`EDIT_LOW_RANK`].
    pub up: *mut DLManagedTensorVersioned,
    /// Of every other kind.
    pub value: *mut DLManagedTensorVersioned,
    /// The norms that rows of the edited weight shall have, (outputs) or (outputs, 1), or its columns, (1, inputs): weight
    /// decomposition (DoRA, arXiv 2402.09353, eq. 5). Null without.
    pub magnitude: *mut DLManagedTensorVersioned,
}

impl ClearformEdit {
    /// As the host hands it to a plugin.
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
    /// As the host hands it to a plugin.
    pub const EMPTY: Self = Self {
        struct_size: size_of::<Self>() as u32,
        reserved: 0,
        down: std::ptr::null_mut(),
        up: std::ptr::null_mut(),
        value: std::ptr::null_mut(),
        magnitude: std::ptr::null_mut(),
    };
}

/// The table of `clearform.adapter/1`. Every function must be there. An instance is used from any thread, perhaps from
/// several at once; `close` comes alone and last. What has no status, but fails, tells [`ClearformHost::fail`] why.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformAdapterTable {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// Opens a file that the plugin's claims fit. `host` and `file` are lent until `close`. Writes an instance
    /// of the plugin's own.
    pub open: Option<
        unsafe extern "C" fn(host: *const ClearformHost, file: *const ClearformFile, instance: *mut *mut c_void) -> i32,
    >,
    /// Frees an instance. Tensors that the host has of it stay valid.
    pub close: Option<unsafe extern "C" fn(instance: *mut c_void)>,
    /// How many edits there are.
    pub edit_count: Option<unsafe extern "C" fn(instance: *mut c_void) -> usize>,
    /// Describes edit `index`; computes nothing.
    pub edit: Option<unsafe extern "C" fn(instance: *mut c_void, index: usize, edit: *mut ClearformEdit) -> i32>,
    /// Gives the tensors of edit `index`, as often as they are asked for: the host keeps no large ones.
    pub edit_tensors:
        Option<unsafe extern "C" fn(instance: *mut c_void, index: usize, tensors: *mut ClearformEditTensors) -> i32>,
    /// Why tensor `index` of the file is in no edit; no text if there is no reason, which the host calls an error. The
    /// text stands until `close`.
    pub skipped: Option<unsafe extern "C" fn(instance: *mut c_void, index: usize) -> ClearformText>,
}
