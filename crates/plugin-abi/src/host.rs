//! Structs that both interfaces share: texts, the host's functions, the exported plugin, and an adapter's file.

use crate::dlpack::{DLDataType, DLManagedTensorVersioned};
use std::ffi::c_void;

/// UTF-8 text without a terminating NUL. Always borrowed: the receiver copies what it keeps.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformText {
    /// First byte; may be null if `length` is 0.
    pub data: *const u8,
    /// Number of bytes.
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

/// Level of a message for information.
pub const LOG_INFO: u32 = 1;
/// Level of a warning.
pub const LOG_WARNING: u32 = 2;
/// Level of an error that the plugin recovered from; others are reported with [`ClearformHost::fail`].
pub const LOG_ERROR: u32 = 3;

/// The host's functions. Borrowed by an instance until it is closed. They are never null, and may be called from any
/// thread.
#[repr(C)]
pub struct ClearformHost {
    /// [`crate::ABI_MAJOR`] of the host.
    pub abi_major: u32,
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// First argument of every function here.
    pub context: *mut c_void,
    /// Number of threads the host uses; a plugin should not use more.
    pub threads: u32,
    /// Zero.
    pub reserved: u32,
    /// Allocates `size` bytes, aligned to `alignment` (a power of two); null if that fails. Free with `release`.
    pub allocate: Option<unsafe extern "C" fn(context: *mut c_void, size: usize, alignment: usize) -> *mut c_void>,
    /// Frees memory from `allocate`; pass the same size and alignment.
    pub release: Option<unsafe extern "C" fn(context: *mut c_void, memory: *mut c_void, size: usize, alignment: usize)>,
    /// Shows a message to the user; `level` is [`LOG_INFO`] and so on.
    pub log: Option<unsafe extern "C" fn(context: *mut c_void, level: u32, message: ClearformText)>,
    /// Reports the progress of a long call, 0 to 1.
    pub progress: Option<unsafe extern "C" fn(context: *mut c_void, done: f64)>,
    /// Sets the error message of the current call, which then returns [`crate::FAILED`]. A later message replaces an
    /// earlier one.
    pub fail: Option<unsafe extern "C" fn(context: *mut c_void, message: ClearformText)>,
}

/// What a plugin exports. Owned by the plugin and valid as long as the process: libraries are never unloaded.
#[repr(C)]
#[derive(Debug)]
pub struct ClearformPlugin {
    /// [`crate::ABI_MAJOR`] that the plugin was built with.
    pub abi_major: u32,
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Id of the interface, as in the description.
    pub interface: ClearformText,
    /// The interface's table.
    pub table: *const c_void,
}

/// Describes a tensor of a file.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ClearformTensorInfo {
    /// Name in the file.
    pub name: ClearformText,
    /// Size of each dimension, outermost first.
    pub shape: *const i64,
    /// Number of dimensions.
    pub ndim: i32,
    /// Type of the elements; all zero if DLPack has no such type.
    pub dtype: DLDataType,
}

/// An adapter's file, or its files. Borrowed by an instance, with everything it points to, until the instance is
/// closed. Its functions may be called from any thread.
#[repr(C)]
pub struct ClearformFile {
    /// Size of this struct in bytes.
    pub struct_size: u32,
    /// Zero.
    pub reserved: u32,
    /// First argument of `read`.
    pub context: *mut c_void,
    /// Sorted by name.
    pub tensors: *const ClearformTensorInfo,
    /// Number of tensors.
    pub tensor_count: usize,
    /// Metadata of the file.
    pub metadata: *const ClearformPair,
    /// Number of pairs.
    pub metadata_count: usize,
    /// The config.json next to the file; of an adapter, peft's adapter_config.json if there is one. Else empty.
    pub config: ClearformText,
    /// Reads tensor `index` into CPU memory, row-major, and stores it in `tensor` if it succeeds. The plugin owns the
    /// tensor: it calls the deleter, or passes the tensor on to the host.
    pub read: Option<
        unsafe extern "C" fn(context: *mut c_void, index: usize, tensor: *mut *mut DLManagedTensorVersioned) -> i32,
    >,
}

impl ClearformText {
    /// The empty text.
    pub const EMPTY: Self = Self { data: std::ptr::null(), length: 0 };

    /// Borrows `text`.
    pub const fn new(text: &str) -> Self {
        Self { data: text.as_ptr(), length: text.len() }
    }

    /// The text; `None` if it is not UTF-8.
    ///
    /// # Safety
    /// `data` must be null, or valid for `length` bytes for as long as the result is used.
    pub unsafe fn as_str<'a>(&self) -> Option<&'a str> {
        if self.data.is_null() || self.length == 0 {
            return Some("");
        }
        // SAFETY: guaranteed by the caller.
        std::str::from_utf8(unsafe { std::slice::from_raw_parts(self.data, self.length) }).ok()
    }
}

// SAFETY: a plugin consists of constants that are never written.
unsafe impl Sync for ClearformPlugin {}
