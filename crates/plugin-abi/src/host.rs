//! What both interfaces share: texts, the host's functions, the plugin itself, and the file that it is opened with.

use crate::dlpack::{DLDataType, DLManagedTensorVersioned};
use std::ffi::c_void;

/// UTF-8 text, not ended by a NUL. Lent: who receives it copies what it keeps.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformText {
    /// First byte; may be null if there is none.
    pub data: *const u8,
    /// How many bytes there are.
    pub length: usize,
}

/// A key and its value.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformPair {
    /// The key.
    pub key: ClearformText,
    /// Its value.
    pub value: ClearformText,
}

/// A message that a person may want to know.
pub const LOG_INFO: u32 = 1;
/// A message that a person should know.
pub const LOG_WARNING: u32 = 2;
/// A message of something that went wrong, and was dealt with.
pub const LOG_ERROR: u32 = 3;

/// What the host lends a plugin until the instance that was opened with it is closed. Its functions are never null, and may
/// be called from any thread.
#[repr(C)]
pub struct ClearformHost {
    /// [`crate::ABI_MAJOR`] of the host.
    pub abi_major: u32,
    /// Bytes of this struct.
    pub struct_size: u32,
    /// First argument of every function here.
    pub context: *mut c_void,
    /// Threads that the host computes with; a plugin should not use more.
    pub threads: u32,
    /// Zero.
    pub reserved: u32,
    /// Memory of `size` bytes, aligned to `alignment`, a power of two; null if there is none. Given back by `release`.
    pub allocate: Option<unsafe extern "C" fn(context: *mut c_void, size: usize, alignment: usize) -> *mut c_void>,
    /// Gives back what `allocate` gave, with the same size and alignment.
    pub release: Option<unsafe extern "C" fn(context: *mut c_void, memory: *mut c_void, size: usize, alignment: usize)>,
    /// A message for the person; `level` is [`LOG_INFO`] and so on.
    pub log: Option<unsafe extern "C" fn(context: *mut c_void, level: u32, message: ClearformText)>,
    /// How far a long call has come, 0 to 1.
    pub progress: Option<unsafe extern "C" fn(context: *mut c_void, done: f64)>,
    /// Why the call that is about to return [`crate::FAILED`] could not be done. The last one counts.
    pub fail: Option<unsafe extern "C" fn(context: *mut c_void, message: ClearformText)>,
}

/// What a plugin exports. It is the plugin's, and lives as long as the process: libraries are never unloaded.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformPlugin {
    /// [`crate::ABI_MAJOR`] that the plugin was built for.
    pub abi_major: u32,
    /// Bytes of this struct.
    pub struct_size: u32,
    /// The interface with its revision, as in the description.
    pub interface: ClearformText,
    /// The interface's table.
    pub table: *const c_void,
}

/// A tensor of a file, not read yet.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformTensorInfo {
    /// Its name in the file.
    pub name: ClearformText,
    /// Extents, outermost first.
    pub shape: *const i64,
    /// How many extents there are.
    pub ndim: i32,
    /// Number format; all zero if DLPack has none for it.
    pub dtype: DLDataType,
}

/// An adapter's file, or files. Lent until `close`; its functions may be called from any thread.
#[repr(C)]
pub struct ClearformFile {
    /// Bytes of this struct.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// First argument of `read`.
    pub context: *mut c_void,
    /// Tensors, sorted by name.
    pub tensors: *const ClearformTensorInfo,
    /// How many there are.
    pub tensor_count: usize,
    /// Free text that the file holds beside its tensors.
    pub metadata: *const ClearformPair,
    /// How many pairs there are.
    pub metadata_count: usize,
    /// The config.json beside the file, or no text.
    pub config: ClearformText,
    /// Reads tensor `index` to the CPU, row-major. The tensor belongs to the plugin, which calls its deleter or gives it
    /// on.
    pub read: Option<
        unsafe extern "C" fn(context: *mut c_void, index: usize, tensor: *mut *mut DLManagedTensorVersioned) -> i32,
    >,
}

impl ClearformText {
    /// No text.
    pub const EMPTY: Self = Self { data: std::ptr::null(), length: 0 };

    /// Lends `text`.
    pub const fn new(text: &str) -> Self {
        Self { data: text.as_ptr(), length: text.len() }
    }

    /// The text, if it is one.
    ///
    /// # Safety
    /// `data` must be null, or valid for `length` bytes for as long as the result is used.
    pub unsafe fn as_str<'a>(&self) -> Option<&'a str> {
        if self.data.is_null() || self.length == 0 {
            return Some("");
        }
        // SAFETY: the caller says so.
        std::str::from_utf8(unsafe { std::slice::from_raw_parts(self.data, self.length) }).ok()
    }
}

// SAFETY: a plugin is made of constants that are never written.
unsafe impl Sync for ClearformPlugin {}
