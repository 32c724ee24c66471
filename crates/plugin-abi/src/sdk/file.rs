//! [`AdapterFile`]: the file that a plugin is opened with.

use super::Result;
use crate::tensor::{ElementType, OwnedTensor};
use crate::{ClearformHost, ClearformText, OK};

/// An adapter's file. It is open as long as the instance is: keep it there, and nowhere that outlives it.
pub struct AdapterFile {
    pub(super) file: *const crate::ClearformFile,
    pub(super) host: *const ClearformHost,
}

/// A tensor of a file, not read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileTensor {
    /// Its name in the file.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Number format, if it is one that crosses.
    pub element: Option<ElementType>,
}

impl AdapterFile {
    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> Vec<FileTensor> {
        let file = self.file();
        // SAFETY: the host lends the file until close, which drops this, and its arrays are as long as they say.
        let infos = unsafe { slice(file.tensors, file.tensor_count) };
        // SAFETY: as above.
        infos.iter().map(|info| unsafe { FileTensor::new(info) }).collect()
    }

    /// Reads the tensor `index` of [`Self::tensors`].
    ///
    /// # Errors
    /// The host could not read it.
    pub fn read(&self, index: usize) -> Result<OwnedTensor> {
        let file = self.file();
        let read = file.read.ok_or("the host lends no way to read tensors")?;
        let mut tensor = std::ptr::null_mut();
        // SAFETY: the host lends the function with its context; the tensor it writes is ours.
        match unsafe { read(file.context, index, &raw mut tensor) } {
            // SAFETY: the host gave it away.
            OK => unsafe { OwnedTensor::take(tensor) },
            _ => Err(format!("tensor {index} of the file cannot be read")),
        }
    }

    /// The value of `key` in what the file holds beside its tensors.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let file = self.file();
        // SAFETY: as in `tensors`.
        let pairs = unsafe { slice(file.metadata, file.metadata_count) };
        // SAFETY: the texts are lent as long as the file is.
        let find = pairs.iter().find(|pair| unsafe { pair.key.as_str() } == Some(key))?;
        // SAFETY: as above.
        unsafe { find.value.as_str() }.map(str::to_owned)
    }

    /// The config.json beside the file.
    pub fn config(&self) -> Option<String> {
        // SAFETY: the text is lent as long as the file is.
        unsafe { self.file().config.as_str() }.filter(|text| !text.is_empty()).map(str::to_owned)
    }

    /// Threads that the host computes with.
    pub fn threads(&self) -> usize {
        // SAFETY: the host is lent until close, which drops this.
        unsafe { (*self.host).threads as usize }
    }

    /// A message for the person.
    pub fn log(&self, level: u32, message: &str) {
        // SAFETY: as above; the text stands during the call.
        unsafe {
            if let Some(log) = (*self.host).log {
                log((*self.host).context, level, ClearformText::new(message));
            }
        }
    }

    fn file(&self) -> &crate::ClearformFile {
        // SAFETY: the host lends it until close, which drops this.
        unsafe { &*self.file }
    }
}

// SAFETY: the host lets any thread call the functions of a file and of itself, and nothing in them is written.
unsafe impl Send for AdapterFile {}
// SAFETY: as above.
unsafe impl Sync for AdapterFile {}

impl FileTensor {
    /// # Safety
    /// `info` is as the host lends it.
    unsafe fn new(info: &crate::ClearformTensorInfo) -> Self {
        // SAFETY: the caller says so.
        unsafe {
            let shape = slice(info.shape, info.ndim.max(0) as usize);
            Self {
                name: info.name.as_str().unwrap_or_default().to_owned(),
                shape: shape.iter().map(|extent| *extent as usize).collect(),
                element: ElementType::of(info.dtype),
            }
        }
    }
}

/// # Safety
/// `pointer` is null, or valid for `length` items.
unsafe fn slice<'a, T>(pointer: *const T, length: usize) -> &'a [T] {
    if pointer.is_null() || length == 0 {
        return &[];
    }
    // SAFETY: the caller says so.
    unsafe { std::slice::from_raw_parts(pointer, length) }
}
