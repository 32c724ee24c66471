//! What plugins give, as tensors of the tensor library.

use crate::Result;
use candle_core::{Error, Tensor};
use clearform_plugin_abi::dlpack::DLManagedTensorVersioned;
use clearform_plugin_abi::tensor::OwnedTensor;

/// A copy of a tensor that a plugin gave away, which is freed; none for null.
///
/// # Safety
/// Null, or a managed tensor that is ours.
pub(crate) unsafe fn receive(tensor: *mut DLManagedTensorVersioned) -> Option<Result<Tensor>> {
    if tensor.is_null() {
        return None;
    }
    // SAFETY: the caller says so.
    let taken = unsafe { OwnedTensor::take(tensor) };
    let taken = taken.map_err(|reason| Error::Msg(format!("the plugin gave {reason}")));
    Some(taken.and_then(|owned| owned.view().to_candle()).map_err(Into::into))
}
