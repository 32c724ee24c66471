//! [`PluginFile`]: an adapter's checkpoint as the C struct that a plugin receives. Tensors are read on request.

use crate::{PluginError, Result};
use candle_core::DType;
use clearform_layout::Dequantized;
use clearform_plugin_abi::dlpack::{DLDataType, DLManagedTensorVersioned};
use clearform_plugin_abi::tensor::{ElementType, OwnedTensor};
use clearform_plugin_abi::{ClearformFile, ClearformPair, ClearformTensorInfo, ClearformText, FAILED, OK};
use clearform_weights::{Checkpoint, Dtype, TensorInfo, TensorSource, WeightsError};
use std::ffi::c_void;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A checkpoint with its C struct.
pub(crate) struct PluginFile {
    /// Points into `contents`. Both are on the heap, so moving this value does not move them.
    table: Box<ClearformFile>,
    contents: Arc<FileContents>,
}

/// What the pointers of the C struct point to.
struct FileContents {
    checkpoint: Dequantized<Arc<Checkpoint>>,
    names: Vec<String>,
    /// `infos` points to them.
    _shapes: Vec<Vec<i64>>,
    infos: Vec<ClearformTensorInfo>,
    pairs: Vec<ClearformPair>,
    config: String,
    /// Why the last read failed.
    read_error: Mutex<Option<String>>,
}

impl PluginFile {
    /// Prepares `checkpoint` for a plugin, with the text of its configuration. fp8 tensors are widened as those of a
    /// model are.
    ///
    /// # Errors
    /// A tensor is stored in a format that cannot be computed with.
    pub fn new(checkpoint: Arc<Checkpoint>, config: String) -> Result<Self> {
        let path = checkpoint.path().to_owned();
        let bad_adapter = |reason: String| PluginError::BadAdapter { adapter: path.clone(), reason };
        let checkpoint = Dequantized::whole(checkpoint).map_err(|error| bad_adapter(error.to_string()))?;
        let contents = Arc::new(FileContents::new(checkpoint, config).map_err(bad_adapter)?);
        let table = ClearformFile {
            struct_size: size_of::<ClearformFile>() as u32,
            reserved: 0,
            context: Arc::as_ptr(&contents).cast_mut().cast(),
            tensors: contents.infos.as_ptr(),
            tensor_count: contents.infos.len(),
            metadata: contents.pairs.as_ptr(),
            metadata_count: contents.pairs.len(),
            config: ClearformText::new(&contents.config),
            read: Some(read),
        };
        Ok(Self { table: Box::new(table), contents })
    }

    /// Its tensors as the plugin reads them.
    pub fn tensors(&self) -> &dyn TensorSource {
        &self.contents.checkpoint
    }

    /// The C struct, valid as long as `self` is.
    pub fn table(&self) -> *const ClearformFile {
        &raw const *self.table
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> &[String] {
        &self.contents.names
    }

    /// Path of the file or folder.
    pub fn path(&self) -> &Path {
        self.contents.checkpoint.source().path()
    }

    /// Appends the cause of the last failed read to `reason`, if there was one, and how the tensors that it names are
    /// stored if they are lent otherwise.
    pub fn explain(&self, reason: String) -> String {
        let stored = self.contents.stored_otherwise(&reason);
        let cause = self.contents.read_error().take().map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{reason}{cause}{stored}")
    }
}

// SAFETY: the pointers of both structs point into `FileContents`, where nothing but the mutex is ever written.
unsafe impl Send for PluginFile {}
// SAFETY: as above.
unsafe impl Sync for PluginFile {}
// SAFETY: as above.
unsafe impl Send for FileContents {}
// SAFETY: as above.
unsafe impl Sync for FileContents {}

impl FileContents {
    fn new(checkpoint: Dequantized<Arc<Checkpoint>>, config: String) -> std::result::Result<Self, String> {
        let tensors = checkpoint.tensors();
        tensors.iter().try_for_each(check_dtype)?;
        let names: Vec<String> = tensors.iter().map(|info| info.name.clone()).collect();
        let shapes: Vec<Vec<i64>> = tensors.iter().map(c_shape).collect();
        let infos = tensors.iter().zip(&names).zip(&shapes);
        let infos = infos.map(|((info, name), shape)| tensor_info(name, shape, info.dtype)).collect();
        let pairs = checkpoint.source().metadata().iter();
        let pairs = pairs
            .map(|(key, value)| ClearformPair { key: ClearformText::new(key), value: ClearformText::new(value) })
            .collect();
        Ok(Self { names, _shapes: shapes, infos, pairs, config, read_error: Mutex::default(), checkpoint })
    }

    fn read(&self, index: usize) -> std::result::Result<OwnedTensor, WeightsError> {
        let missing = || WeightsError::Missing { name: format!("index {index}") };
        let name = self.names.get(index).ok_or_else(missing)?;
        let raw = self.checkpoint.read(name)?;
        if is_short(raw.dtype) {
            return Ok(OwnedTensor::from_candle(&raw.to_tensor(name)?.to_dtype(DType::I64)?)?);
        }
        let element = element_type(raw.dtype).ok_or_else(|| WeightsError::BadTensor {
            name: name.clone(),
            reason: format!("dtype {:?} is not supported by the plugin interface", raw.dtype),
        })?;
        Ok(OwnedTensor::new(raw.bytes, element, &raw.shape))
    }

    /// The stored dtypes of tensors named in `text` that plugins see in another.
    fn stored_otherwise(&self, text: &str) -> String {
        let tensors = self.checkpoint.tensors().into_iter();
        let named = tensors.filter(|info| is_short(info.dtype) && text.contains(&format!("{:?}", info.name)));
        let lent =
            named.map(|info| format!(" ({:?} is stored in {:?}, which plugins see as i64)", info.name, info.dtype));
        lent.collect()
    }

    fn read_error(&self) -> MutexGuard<'_, Option<String>> {
        self.read_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that is lent to a plugin can be computed with.
fn check_dtype(info: &TensorInfo) -> std::result::Result<(), String> {
    match element_type(info.dtype) {
        Some(_) => Ok(()),
        None => Err(format!(
            "tensor {:?} is stored in {:?}, which cannot be computed with: use the file in bf16, fp16, fp32 or fp8",
            info.name, info.dtype
        )),
    }
}

fn c_shape(info: &TensorInfo) -> Vec<i64> {
    info.shape.iter().map(|size| *size as i64).collect()
}

fn tensor_info(name: &str, shape: &[i64], dtype: Dtype) -> ClearformTensorInfo {
    const UNSUPPORTED: DLDataType = DLDataType { code: 0, bits: 0, lanes: 0 };
    ClearformTensorInfo {
        name: ClearformText::new(name),
        shape: shape.as_ptr(),
        ndim: shape.len() as i32,
        dtype: element_type(dtype).map_or(UNSUPPORTED, ElementType::to_dlpack),
    }
}

/// The type in which a tensor of `dtype` is lent, if it can be.
fn element_type(dtype: Dtype) -> Option<ElementType> {
    let dtype = if is_short(dtype) { DType::I64 } else { DType::try_from(dtype).ok()? };
    ElementType::from_name(dtype.as_str())
}

/// Whether it is a type of whole numbers that the interface does not have, and that is lent in 64 bits.
fn is_short(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I16 | Dtype::I32)
}

unsafe extern "C" fn read(context: *mut c_void, index: usize, tensor: *mut *mut DLManagedTensorVersioned) -> i32 {
    // SAFETY: the context is the `FileContents` of a file that outlives the instance; it is only read.
    let contents = unsafe { &*context.cast::<FileContents>().cast_const() };
    match contents.read(index) {
        Ok(owned) => {
            *contents.read_error() = None;
            // SAFETY: the plugin passes a valid pointer for the tensor, which it then owns.
            unsafe { *tensor = owned.into_raw() };
            OK
        }
        Err(error) => {
            *contents.read_error() = Some(error.to_string());
            FAILED
        }
    }
}
