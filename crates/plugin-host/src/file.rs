//! [`LentFile`]: an adapter's checkpoint as a plugin sees it. Tensors are read when the plugin asks for them.

use candle_core::DType;
use clearform_plugin_abi::dlpack::{DLDataType, DLManagedTensorVersioned};
use clearform_plugin_abi::tensor::{ElementType, give};
use clearform_plugin_abi::{ClearformFile, ClearformPair, ClearformTensorInfo, ClearformText, FAILED, OK};
use clearform_weights::{Checkpoint, Dtype, TensorSource, WeightsError};
use std::ffi::c_void;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// A checkpoint, lent.
pub(crate) struct LentFile {
    /// Leads into `kept`; both stay where they are however this is moved.
    table: Box<ClearformFile>,
    kept: Arc<FileTable>,
}

/// What the table's pointers lead to.
struct FileTable {
    checkpoint: Arc<Checkpoint>,
    names: Vec<String>,
    /// Extents of each tensor.
    _shapes: Vec<Vec<i64>>,
    infos: Vec<ClearformTensorInfo>,
    pairs: Vec<ClearformPair>,
    config: String,
    /// Why the last read failed.
    failure: Mutex<Option<String>>,
}

impl LentFile {
    /// Lends `checkpoint`.
    pub fn new(checkpoint: Arc<Checkpoint>) -> Self {
        let kept = Arc::new(FileTable::new(checkpoint));
        let table = ClearformFile {
            struct_size: size_of::<ClearformFile>() as u32,
            reserved: 0,
            context: Arc::as_ptr(&kept).cast_mut().cast(),
            tensors: kept.infos.as_ptr(),
            tensor_count: kept.infos.len(),
            metadata: kept.pairs.as_ptr(),
            metadata_count: kept.pairs.len(),
            config: ClearformText::new(&kept.config),
            read: Some(read),
        };
        Self { table: Box::new(table), kept }
    }

    /// What the plugin gets.
    pub fn table(&self) -> *const ClearformFile {
        &raw const *self.table
    }

    /// Names of its tensors, sorted.
    pub fn names(&self) -> &[String] {
        &self.kept.names
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.kept.checkpoint.path()
    }

    /// `reason`, with why reading failed, if it did.
    pub fn explain(&self, reason: String) -> String {
        match self.kept.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => format!("{reason}: {failure}"),
            None => reason,
        }
    }
}

// SAFETY: the pointers of both lead to what `FileTable` itself keeps, which is never written but for the lock.
unsafe impl Send for LentFile {}
// SAFETY: as above.
unsafe impl Sync for LentFile {}
// SAFETY: as above.
unsafe impl Send for FileTable {}
// SAFETY: as above.
unsafe impl Sync for FileTable {}

impl FileTable {
    fn new(checkpoint: Arc<Checkpoint>) -> Self {
        let tensors = checkpoint.tensors();
        let names: Vec<String> = tensors.iter().map(|info| info.name.clone()).collect();
        let extents = |shape: &Vec<usize>| shape.iter().map(|extent| *extent as i64).collect();
        let shapes: Vec<Vec<i64>> = tensors.iter().map(|info| extents(&info.shape)).collect();
        let describe = |((name, shape), dtype): ((&String, &Vec<i64>), Dtype)| ClearformTensorInfo {
            name: ClearformText::new(name),
            shape: shape.as_ptr(),
            ndim: shape.len() as i32,
            dtype: element(dtype).map_or(DLDataType { code: 0, bits: 0, lanes: 0 }, ElementType::dtype),
        };
        let infos = names.iter().zip(&shapes).zip(tensors.iter().map(|info| info.dtype)).map(describe).collect();
        let pair = |(key, value): (&String, &String)| ClearformPair {
            key: ClearformText::new(key),
            value: ClearformText::new(value),
        };
        let pairs = checkpoint.metadata().iter().map(pair).collect();
        let config = checkpoint.config().map_or_else(String::new, ToString::to_string);
        Self { names, _shapes: shapes, infos, pairs, config, failure: Mutex::default(), checkpoint }
    }

    fn read(&self, index: usize) -> std::result::Result<*mut DLManagedTensorVersioned, WeightsError> {
        let name = self.names.get(index).ok_or_else(|| WeightsError::Missing { name: format!("number {index}") })?;
        let raw = self.checkpoint.read(name)?;
        let element = element(raw.dtype).ok_or_else(|| WeightsError::BadTensor {
            name: name.clone(),
            reason: format!("number format {:?} cannot be given to a plugin", raw.dtype),
        })?;
        Ok(give(raw.bytes, element, &raw.shape))
    }
}

fn element(dtype: Dtype) -> Option<ElementType> {
    ElementType::named(DType::try_from(dtype).ok()?.as_str())
}

unsafe extern "C" fn read(context: *mut c_void, index: usize, tensor: *mut *mut DLManagedTensorVersioned) -> i32 {
    // SAFETY: the context is the `FileTable` of a file that is lent until the plugin's `close`, and is never written.
    let kept = unsafe { &*context.cast::<FileTable>().cast_const() };
    match kept.read(index) {
        Ok(given) => {
            *kept.failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
            // SAFETY: the plugin says where it wants the tensor.
            unsafe { *tensor = given };
            OK
        }
        Err(error) => {
            *kept.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            FAILED
        }
    }
}
