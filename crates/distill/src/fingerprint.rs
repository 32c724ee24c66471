//! [`Fingerprint`]: tells models apart by their weights, so that an interrupted run does not go on with others.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use clearform_weights::TensorSource;
use sha2::{Digest as _, Sha256};

/// Bytes of each tensor that are read: all of most biases and norms, and enough of a matrix to tell it from another.
const BYTES: usize = 1 << 16;

/// A hash that tells the model with these tensors from others.
///
/// # Errors
/// A tensor cannot be read.
pub fn weights_fingerprint(source: &dyn TensorSource) -> Result<String> {
    let mut fingerprint = Fingerprint::default();
    fingerprint.source(source)?;
    Ok(fingerprint.finish())
}

/// A hash of names, shapes and values.
#[derive(Default)]
pub(crate) struct Fingerprint(Sha256);

impl Fingerprint {
    /// Adds a text.
    pub fn text(&mut self, text: &str) {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
    }

    /// Adds a tensor, of which the first values are read.
    ///
    /// # Errors
    /// It cannot be copied to the CPU.
    pub fn tensor(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.text(name);
        self.text(&format!("{:?}", tensor.dims()));
        let flat = tensor.flatten_all()?;
        let read = flat.narrow(0, 0, flat.elem_count().min(BYTES / size_of::<f32>()))?;
        for value in read.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            self.0.update(value.to_le_bytes());
        }
        Ok(())
    }

    /// Adds the tensors of `source` as they are stored, of each the first bytes.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn source(&mut self, source: &dyn TensorSource) -> Result<()> {
        for info in source.tensors() {
            self.text(&info.name);
            self.text(&format!("{:?} {:?}", info.dtype, info.shape));
            let read = (info.byte_count() as usize).min(BYTES);
            self.0.update(source.read_range(&info.name, 0..read)?);
        }
        Ok(())
    }

    /// The hash, in hexadecimal.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
