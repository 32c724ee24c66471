//! Tensors that plugins return, as candle tensors.

use crate::Result;
use candle_core::{Error, Tensor};
use clearform_plugin_abi::dlpack::DLManagedTensorVersioned;
use clearform_plugin_abi::tensor::OwnedTensor;

/// Copies a tensor that a plugin returned, and frees it. `None` for null.
///
/// # Safety
/// `tensor` is null, or a managed tensor that the host owns.
pub(crate) unsafe fn receive(tensor: *mut DLManagedTensorVersioned) -> Option<Result<Tensor>> {
    if tensor.is_null() {
        return None;
    }
    // SAFETY: guaranteed by the caller.
    let owned = unsafe { OwnedTensor::from_raw(tensor) };
    let owned = owned.map_err(|reason| Error::Msg(format!("the plugin returned an invalid tensor: {reason}")));
    Some(owned.and_then(|owned| owned.view().to_candle()).map_err(Into::into))
}
