//! [`FileSource`]: the file that the host passes, as a tensor source.

use clearform_plugin_abi::sdk::{AdapterFile, Result};
use clearform_weights::{RawTensor, TensorInfo, TensorSource, WeightsError};
use std::collections::BTreeMap;

/// An adapter's file. Its tensors are read on request.
pub struct FileSource {
    file: AdapterFile,
    /// By name, each with its index in the file.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl FileSource {
    /// Lists the tensors of `file`.
    ///
    /// # Errors
    /// A tensor has a dtype that candle cannot compute with.
    pub fn new(file: AdapterFile) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (index, tensor) in file.tensors().into_iter().enumerate() {
            let element = tensor.element.and_then(|element| element.to_candle().ok());
            let dtype = element.ok_or_else(|| format!("{:?}: its dtype is not supported", tensor.name))?;
            let info = TensorInfo { name: tensor.name.clone(), dtype: dtype.into(), shape: tensor.shape };
            tensors.insert(tensor.name, (index, info));
        }
        Ok(Self { file, tensors })
    }

    /// The file.
    pub fn file(&self) -> &AdapterFile {
        &self.file
    }
}

impl TensorSource for FileSource {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors.values().map(|(_, info)| info.clone()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(_, info)| info.clone())
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        let (index, info) = self.tensors.get(name).ok_or_else(|| WeightsError::Missing { name: name.to_owned() })?;
        let bad_tensor = |reason| WeightsError::BadTensor { name: name.to_owned(), reason };
        let bytes = self.file.read(*index).map_err(bad_tensor)?.view().bytes().to_vec();
        Ok(RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }
}
