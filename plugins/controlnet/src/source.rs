//! [`FileSource`]: the host's file as a source of tensors.

use clearform_plugin_abi::sdk::{AdapterFile, Result};
use clearform_weights::{RawTensor, TensorInfo, TensorSource, WeightsError};
use std::collections::BTreeMap;

/// An adapter's file, whose tensors are read when they are asked for.
pub struct FileSource {
    file: AdapterFile,
    /// By name, with their index in the file.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl FileSource {
    /// # Errors
    /// A tensor of a number format that cannot be computed with.
    pub fn new(file: AdapterFile) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (index, tensor) in file.tensors().into_iter().enumerate() {
            let element = tensor.element.and_then(|element| element.to_candle().ok());
            let dtype = element.ok_or_else(|| format!("{:?}: its number format is not supported", tensor.name))?;
            let info = TensorInfo { name: tensor.name.clone(), dtype: dtype.into(), shape: tensor.shape };
            tensors.insert(tensor.name, (index, info));
        }
        Ok(Self { file, tensors })
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
        let bad = |reason| WeightsError::BadTensor { name: name.to_owned(), reason };
        let bytes = self.file.read(*index).map_err(bad)?.view().bytes().to_vec();
        Ok(RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }
}
