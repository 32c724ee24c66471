//! [`AdapterFile`]: the file that a plugin opens.

use super::Result;
use crate::tensor::{ElementType, OwnedTensor};
use crate::{ClearformFile, ClearformHost, ClearformTensorInfo, ClearformText, OK};

/// An adapter's file. It is open as long as the plugin's instance: keep it in the instance, and nowhere that outlives
/// it.
pub struct AdapterFile {
    pub(super) file: *const ClearformFile,
    pub(super) host: *const ClearformHost,
}

/// Name, shape and type of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileTensor {
    /// Name in the file.
    pub name: String,
    /// Size of each dimension, outermost first.
    pub shape: Vec<usize>,
    /// Type of the elements; `None` if the plugin interface does not support it.
    pub element: Option<ElementType>,
}

impl AdapterFile {
    /// Describes every tensor, sorted by name.
    pub fn tensors(&self) -> Vec<FileTensor> {
        let file = self.table();
        // SAFETY: the file is valid until close, which drops `self`, and its arrays have the stated lengths.
        let infos = unsafe { slice(file.tensors, file.tensor_count) };
        // SAFETY: as above.
        infos.iter().map(|info| unsafe { FileTensor::new(info) }).collect()
    }

    /// Reads the tensor at `index` in [`Self::tensors`].
    ///
    /// # Errors
    /// The host cannot read it.
    pub fn read(&self, index: usize) -> Result<OwnedTensor> {
        let file = self.table();
        let read = file.read.ok_or("the host's function \"read\" is null")?;
        let mut tensor = std::ptr::null_mut();
        // SAFETY: the host provides the function and its context.
        match unsafe { read(file.context, index, &raw mut tensor) } {
            // SAFETY: on success, the plugin owns the tensor.
            OK => unsafe { OwnedTensor::from_raw(tensor) }.map_err(|reason| format!("tensor {index}: {reason}")),
            _ => Err(format!("tensor {index} of the file cannot be read")),
        }
    }

    /// The metadata stored under `key`.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let file = self.table();
        // SAFETY: as in `tensors`.
        let pairs = unsafe { slice(file.metadata, file.metadata_count) };
        // SAFETY: the texts are valid as long as the file is.
        let found = pairs.iter().find(|pair| unsafe { pair.key.as_str() } == Some(key))?;
        // SAFETY: as above.
        unsafe { found.value.as_str() }.map(str::to_owned)
    }

    /// The config.json next to the file; of an adapter, peft's adapter_config.json if there is one.
    pub fn config(&self) -> Option<String> {
        // SAFETY: the text is valid as long as the file is.
        unsafe { self.table().config.as_str() }.filter(|text| !text.is_empty()).map(str::to_owned)
    }

    /// Number of threads the host uses.
    pub fn threads(&self) -> usize {
        // SAFETY: the host is valid until close, which drops `self`.
        unsafe { (*self.host).threads as usize }
    }

    /// Shows a message to the user; `level` is [`LOG_INFO`](crate::LOG_INFO) and so on.
    pub fn log(&self, level: u32, message: &str) {
        // SAFETY: as above; the text is valid during the call.
        unsafe {
            if let Some(log) = (*self.host).log {
                log((*self.host).context, level, ClearformText::new(message));
            }
        }
    }

    fn table(&self) -> &ClearformFile {
        // SAFETY: the file is valid until close, which drops `self`.
        unsafe { &*self.file }
    }
}

// SAFETY: the functions of a file and a host may be called from any thread, and nothing in the structs is written.
unsafe impl Send for AdapterFile {}
// SAFETY: as above.
unsafe impl Sync for AdapterFile {}

impl FileTensor {
    /// # Safety
    /// The pointers of `info` are valid.
    unsafe fn new(info: &ClearformTensorInfo) -> Self {
        // SAFETY: guaranteed by the caller.
        let shape = unsafe { slice(info.shape, info.ndim.max(0) as usize) };
        // SAFETY: guaranteed by the caller.
        let name = unsafe { info.name.as_str() };
        Self {
            name: name.unwrap_or_default().to_owned(),
            shape: shape.iter().map(|size| *size as usize).collect(),
            element: ElementType::from_dlpack(info.dtype),
        }
    }
}

/// # Safety
/// `pointer` is null, or valid for `length` items.
unsafe fn slice<'a, T>(pointer: *const T, length: usize) -> &'a [T] {
    if pointer.is_null() || length == 0 {
        return &[];
    }
    // SAFETY: guaranteed by the caller.
    unsafe { std::slice::from_raw_parts(pointer, length) }
}
