//! [`Fingerprint`]: tells models apart by their weights, so that an interrupted run does not go on with others.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use sha2::{Digest as _, Sha256};

/// Values of each tensor that are read: all of most biases and norms, and enough of a matrix to tell it from another.
const VALUES: usize = 1 << 14;

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
        let read = flat.narrow(0, 0, flat.elem_count().min(VALUES))?;
        for value in read.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            self.0.update(value.to_le_bytes());
        }
        Ok(())
    }

    /// The hash, in hexadecimal.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
