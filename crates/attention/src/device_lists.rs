//! [`DeviceListCache`]: the lists that kernels of a GPU visit, in the memory of the device.

use candle_core::cuda_backend::{DeviceId, WrapErr as _};
use candle_core::{CudaDevice, Result};
use clearform_kernels::clear_attention::{FORWARD_SM90A, ListRows, SequenceLayout, TextPadding, VisitLists, WorkPairs};
use clearform_kernels::launch::{DeviceLists, DevicePairs};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Lists on the host and on a device.
pub(crate) struct CachedLists {
    pub lists: VisitLists,
    pub on_device: DeviceLists,
    /// For devices that compute two tiles of queries at a time.
    pub paired: Option<(WorkPairs, DevicePairs)>,
}

/// What lists depend on besides the geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ListKey {
    pub device: DeviceId,
    pub limit: Option<i32>,
    pub text: usize,
    pub is_padded: bool,
    pub pooled: usize,
    pub by_query: bool,
}

/// The lists of one geometry so far. All layers and steps need the same few, so none is ever removed.
#[derive(Default)]
pub(crate) struct DeviceListCache(Mutex<HashMap<ListKey, Arc<CachedLists>>>);

impl DeviceListCache {
    /// The lists for `key`, made and copied to `device` at the first call. `positions` returns row and column of each
    /// image token.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn get(
        &self,
        device: &CudaDevice,
        key: ListKey,
        positions: impl FnOnce() -> Vec<(i32, i32)>,
    ) -> Result<Arc<CachedLists>> {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lists) = cache.get(&key) {
            return Ok(lists.clone());
        }
        let lists = Arc::new(CachedLists::new(device, key, &positions())?);
        cache.insert(key, lists.clone());
        Ok(lists)
    }
}

impl std::fmt::Debug for DeviceListCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("lists on devices")
    }
}

impl CachedLists {
    fn new(device: &CudaDevice, key: ListKey, positions: &[(i32, i32)]) -> Result<Self> {
        let text = if key.is_padded { TextPadding::Padded(key.text) } else { TextPadding::Whole(key.text) };
        let sequence = SequenceLayout { text, positions, pooled: key.pooled, limit: key.limit };
        let lists = VisitLists::new(&sequence, if key.by_query { ListRows::Queries } else { ListRows::Keys });
        let stream = device.cuda_stream();
        let on_device = DeviceLists::new(&stream, &lists).w()?;
        let capability = stream.context().compute_capability().w()?;
        let paired = if key.by_query && FORWARD_SM90A.target.runs_on(capability) {
            let pairs = WorkPairs::new(&lists);
            let on_device = DevicePairs::new(&stream, &pairs).w()?;
            Some((pairs, on_device))
        } else {
            None
        };
        Ok(Self { lists, on_device, paired })
    }
}
