//! [`attend`]: attention of a window on a GPU, with its backward, by the kernels of `kernels/clear_attention`. It has
//! not run on a real GPU yet.

use super::QkvGradients;
use crate::device_lists::{CachedLists, ListKey};
use crate::sequence::JointSequence;
use crate::{Geometry, Radius};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::{CudaDType, WrapErr as _};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail,
};
use clearform_kernels::clear_attention::{
    self as kernels, BackwardParameters, ForwardParameters, ListAddresses, ListRows, PairedForwardParameters,
    VisitLists, padding,
};
use clearform_kernels::launch::{DeviceLists, tile_map};
use clearform_kernels::{Refusal, Scalar};
use clearform_ops::cuda::{contiguous, scalar, start};
use clearform_ops::{check_gpu_dims, slice};
use half::{bf16, f16};
use std::sync::{Arc, OnceLock};

/// Tokens of a text tile, as in the kernels.
const TILE: usize = 64;

/// Attention over `sequence`, or the reason why no kernel supports it. Other head dimensions than the kernels' are
/// padded with zeros, which change no product.
pub(super) fn attend(
    sequence: &JointSequence,
    geometry: &Geometry,
    radius: Option<Radius>,
) -> Result<std::result::Result<Tensor, Refusal>> {
    let head_dim = sequence.query.dim(3)?;
    let Some(wider) = kernels::HEAD_DIMS.into_iter().find(|supported| *supported >= head_dim) else {
        return Ok(Err(Refusal::HeadDim { head_dim }));
    };
    let (batch, keys, heads, _) = sequence.key.dims4()?;
    check_gpu_dims(&[batch, keys, heads, wider])?;
    let [query, key, value] = collect_array([&sequence.query, &sequence.key, &sequence.value].map(|x| {
        let x = if wider > head_dim { &x.pad_with_zeros(3, 0, wider - head_dim)? } else { x };
        x.contiguous()
    }))?;
    let padded = JointSequence { query, key, value, ..*sequence };
    let operation = match CudaAttentionOp::new(&padded, head_dim, geometry, radius)? {
        Ok(operation) => operation,
        Err(refusal) => return Ok(Err(refusal)),
    };
    slice(&padded.query.apply_op3(&padded.key, &padded.value, operation)?, 3, 0, head_dim).map(Ok)
}

/// Attention of one call over (query, key, value). It keeps the log-sum-exp of each query for the backward.
struct CudaAttentionOp {
    problem: kernels::KernelProblem,
    batch: usize,
    heads: usize,
    head_dim: usize,
    /// 1 / √head_dim, of the head dimension before padding.
    scale: f32,
    queries: usize,
    keys: usize,
    text: usize,
    /// Per batch entry, the text tokens that are not padding; none without a mask.
    visible: Option<Vec<Vec<bool>>>,
    geometry: Geometry,
    key: ListKey,
    by_query: Arc<CachedLists>,
    lse: OnceLock<CudaSlice<f32>>,
}

/// An element type that the kernels support.
trait KernelElement: CudaDType + DeviceRepr + ValidAsZeroBits {}

impl KernelElement for bf16 {}
impl KernelElement for f16 {}

/// The message of a refusal, with the remedy where there is one.
pub(super) fn explain(refusal: Refusal) -> String {
    let remedy = if matches!(refusal, Refusal::Scalar { .. }) { "pass --dtype bf16" } else { "pass --device cpu" };
    format!("{refusal}; {remedy}")
}

impl CudaAttentionOp {
    /// The operation for `sequence`, whose heads were padded from `true_dim`, or the reason why no kernel supports it.
    fn new(
        sequence: &JointSequence,
        true_dim: usize,
        geometry: &Geometry,
        radius: Option<Radius>,
    ) -> Result<std::result::Result<Self, Refusal>> {
        let (batch, queries, heads, head_dim) = sequence.query.dims4()?;
        let scalar = scalar(sequence.query.dtype()).unwrap_or(Scalar::F32);
        let problem = match kernels::KernelProblem::new(scalar, batch, heads, head_dim) {
            Ok(problem) => problem,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let device = sequence.query.device().as_cuda_device()?;
        let keys = sequence.key.dim(1)?;
        let visible = geometry.visible_text(batch, sequence.text)?;
        let key = ListKey {
            device: device.id(),
            limit: radius.map(|radius| radius.limit()),
            text: sequence.text,
            is_padded: visible.is_some(),
            pooled: keys - queries,
            by_query: true,
        };
        Ok(Ok(Self {
            problem,
            batch,
            heads,
            head_dim,
            scale: 1.0 / (true_dim as f32).sqrt(),
            queries,
            keys,
            text: sequence.text,
            visible,
            geometry: geometry.clone(),
            key,
            by_query: lists(geometry, device, key)?,
            lse: OnceLock::new(),
        }))
    }

    fn forward<T: KernelElement>(&self, inputs: [(&CudaStorage, &Layout); 3]) -> Result<CudaStorage> {
        let device = inputs[0].0.device().clone();
        let stream = device.cuda_stream();
        let [query, key, value] = collect_array(inputs.map(|(storage, layout)| contiguous::<T>(storage, layout)))?;
        let CachedLists { lists, on_device, .. } = &*self.by_query;
        // SAFETY: the kernels write every element.
        let out = unsafe { device.alloc::<T>(self.query_count()) }?;
        // SAFETY: as above.
        let lse = unsafe { device.alloc::<f32>(self.rows()) }?;
        let (parts, part_lse) = self.parts(&device, lists)?;
        let padding = self.padding(&device, ListRows::Queries)?;
        let parameters = ForwardParameters {
            query: query.device_ptr(&stream).0,
            key: key.device_ptr(&stream).0,
            value: value.device_ptr(&stream).0,
            out: out.device_ptr(&stream).0,
            lse: lse.device_ptr(&stream).0,
            parts: parts.device_ptr(&stream).0,
            part_lse: part_lse.device_ptr(&stream).0,
            lists: self.addresses(&device, on_device, padding.as_ref()),
            queries: self.queries as i32,
            keys: self.keys as i32,
            slots: lists.slots as i32,
            scale: std::f32::consts::LOG2_E * self.scale,
        };
        self.start_forward(&device, parameters)?;
        // The same operation on the same tensors gives the same values, so the first to be set are right.
        let _ = self.lse.set(lse);
        Ok(CudaStorage::wrap_cuda_slice(out, device))
    }

    fn start_forward(&self, device: &CudaDevice, parameters: ForwardParameters) -> Result<()> {
        let stream = device.cuda_stream();
        let CachedLists { lists, on_device, paired } = &*self.by_query;
        let joins = ListAddresses { work: on_device.joins.device_ptr(&stream).0, ..parameters.lists };
        // SAFETY: all memory belongs to this device, is as large as the sources state, and is freed on this stream.
        unsafe {
            match paired {
                Some((pairs, on_device)) => {
                    let parameters = PairedForwardParameters {
                        key: tile_map(&self.problem, parameters.key, self.keys).w()?,
                        value: tile_map(&self.problem, parameters.value, self.keys).w()?,
                        forward: parameters,
                        pairs: on_device.pairs.device_ptr(&stream).0,
                        visits: on_device.visits.device_ptr(&stream).0,
                        count: pairs.pairs.len() as i32,
                    };
                    start(device, &self.problem.paired_forward(pairs), parameters)?;
                }
                None => start(device, &self.problem.forward(lists), parameters)?,
            }
            start(device, &self.problem.merge(lists), ForwardParameters { lists: joins, ..parameters })
        }
    }

    fn backward<T: KernelElement>(&self, args: [&Tensor; 3], out: &Tensor, grad: &Tensor) -> Result<QkvGradients> {
        let device = args[0].device().as_cuda_device()?.clone();
        let stream = device.cuda_stream();
        let guards = [args[0], args[1], args[2], out, grad].map(|tensor| tensor.storage_and_layout());
        let mut inputs = [0; 5];
        for (address, (storage, layout)) in inputs.iter_mut().zip(&guards) {
            let Storage::Cuda(storage) = &**storage else { bail!("attention backward: expected tensors on the GPU") };
            *address = contiguous::<T>(storage, layout)?.device_ptr(&stream).0;
        }
        // Keys that no query attends to have no work item, and their gradient is 0.
        let query = device.alloc_zeros::<T>(self.query_count())?;
        let [key, value] = collect_array([(); 2].map(|()| device.alloc_zeros::<T>(self.key_count())))?;
        self.differentiate(&device, inputs, [&query, &key, &value].map(|grad| grad.device_ptr(&stream).0))?;
        let tensor = |arg: &Tensor, slice: CudaSlice<T>| {
            let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
            arg.track_op().then(|| Tensor::from_storage(storage, arg.shape(), BackpropOp::none(), false))
        };
        Ok((tensor(args[0], query), tensor(args[1], key), tensor(args[2], value)))
    }

    /// Computes the gradients of query, key and value from query, key, value, out and its gradient, given by their
    /// addresses.
    fn differentiate(&self, device: &CudaDevice, inputs: [u64; 5], gradients: [u64; 3]) -> Result<()> {
        let Some(lse) = self.lse.get() else { bail!("attention backward ran before the forward") };
        let stream = device.cuda_stream();
        // SAFETY: the kernel writes every element.
        let delta = unsafe { device.alloc::<f32>(self.rows()) }?;
        let key_lists = lists(&self.geometry, device, ListKey { by_query: false, ..self.key })?;
        let parts = [&self.by_query, &key_lists, &key_lists].map(|cached| self.parts(device, &cached.lists));
        let [(query_parts, _), (key_parts, _), (value_parts, _)] = collect_array(parts)?;
        let query_padding = self.padding(device, ListRows::Queries)?;
        let key_padding = self.padding(device, ListRows::Keys)?;
        let by_query = BackwardParameters {
            lse: lse.device_ptr(&stream).0,
            delta: delta.device_ptr(&stream).0,
            parts: query_parts.device_ptr(&stream).0,
            value_parts: value_parts.device_ptr(&stream).0,
            lists: self.addresses(device, &self.by_query.on_device, query_padding.as_ref()),
            slots: self.by_query.lists.slots as i32,
            ..self.backward_parameters(inputs, gradients)
        };
        let by_key = BackwardParameters {
            parts: key_parts.device_ptr(&stream).0,
            lists: self.addresses(device, &key_lists.on_device, key_padding.as_ref()),
            slots: key_lists.lists.slots as i32,
            ..by_query
        };
        self.start_backward(device, by_query, (by_key, &key_lists))
    }

    /// The parameters of the backward that do not depend on its temporary memory and lists.
    fn backward_parameters(&self, inputs: [u64; 5], gradients: [u64; 3]) -> BackwardParameters {
        let [query, key, value, out, grad] = inputs;
        let [query_grad, key_grad, value_grad] = gradients;
        BackwardParameters {
            query,
            key,
            value,
            out,
            grad,
            lse: 0,
            delta: 0,
            query_grad,
            key_grad,
            value_grad,
            parts: 0,
            value_parts: 0,
            lists: ListAddresses { work: 0, entries: 0, masks: 0, padding: 0, text_tiles: 0 },
            batch: self.batch as i32,
            heads: self.heads as i32,
            queries: self.queries as i32,
            keys: self.keys as i32,
            slots: 0,
            scale: self.scale,
        }
    }

    fn start_backward(
        &self,
        device: &CudaDevice,
        by_query: BackwardParameters,
        (by_key, key_lists): (BackwardParameters, &CachedLists),
    ) -> Result<()> {
        let delta = self.problem.delta(self.queries).map_err(candle_core::Error::wrap)?;
        let [query, sum_queries] = self.problem.query_gradient(&self.by_query.lists);
        let [key, sum_keys] = self.problem.key_gradient(&key_lists.lists);
        let joined = |parameters: BackwardParameters, cached: &CachedLists| {
            let work = cached.on_device.joins.device_ptr(&device.cuda_stream()).0;
            BackwardParameters { lists: ListAddresses { work, ..parameters.lists }, ..parameters }
        };
        // SAFETY: all memory belongs to this device, is as large as backward.cu states, and is freed on this stream.
        unsafe {
            start(device, &delta, by_query)?;
            start(device, &query, by_query)?;
            start(device, &sum_queries, joined(by_query, &self.by_query))?;
            start(device, &key, by_key)?;
            start(device, &sum_keys, joined(by_key, key_lists))
        }
    }

    fn addresses(&self, device: &CudaDevice, lists: &DeviceLists, padding: Option<&CudaSlice<u32>>) -> ListAddresses {
        let stream = device.cuda_stream();
        ListAddresses {
            work: lists.work.device_ptr(&stream).0,
            entries: lists.entries.device_ptr(&stream).0,
            masks: lists.masks.device_ptr(&stream).0,
            padding: padding.map_or(0, |padding| padding.device_ptr(&stream).0),
            text_tiles: self.text.div_ceil(TILE) as i32,
        }
    }

    fn padding(&self, device: &CudaDevice, rows: ListRows) -> Result<Option<CudaSlice<u32>>> {
        let copy = |visible: &Vec<Vec<bool>>| device.clone_htod(&padding(visible, rows));
        self.visible.as_ref().filter(|_| self.text > 0).map(copy).transpose()
    }

    /// Memory for partial results of split lists and for their log-sum-exp; never empty, because the driver cannot
    /// allocate 0 bytes.
    fn parts(&self, device: &CudaDevice, lists: &VisitLists) -> Result<(CudaSlice<f32>, CudaSlice<f32>)> {
        let count = self.problem.partial_elements(lists).max(self.head_dim);
        // SAFETY: kernels read only what the launch before has written.
        Ok(unsafe { (device.alloc(count)?, device.alloc(count / self.head_dim)?) })
    }

    fn rows(&self) -> usize {
        self.batch * self.heads * self.queries
    }

    fn query_count(&self) -> usize {
        self.rows() * self.head_dim
    }

    fn key_count(&self) -> usize {
        self.batch * self.heads * self.keys * self.head_dim
    }
}

/// The values, or the first error.
fn collect_array<T, const N: usize>(results: [Result<T>; N]) -> Result<[T; N]> {
    let all: Vec<T> = results.into_iter().collect::<Result<_>>()?;
    all.try_into().map_err(|_| candle_core::Error::msg("an array changed its length"))
}

/// The lists of a geometry for `key`, from its cache.
fn lists(geometry: &Geometry, device: &CudaDevice, key: ListKey) -> Result<Arc<CachedLists>> {
    let order = geometry.order();
    order.lists.get(device, key, || order.positions())
}

impl CustomOp3 for CudaAttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("attention: expected tensors on a GPU, found them on the CPU")
    }

    fn cuda_fwd(
        &self,
        query: &CudaStorage,
        query_layout: &Layout,
        key: &CudaStorage,
        key_layout: &Layout,
        value: &CudaStorage,
        value_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let inputs = [(query, query_layout), (key, key_layout), (value, value_layout)];
        let out = match query.dtype() {
            DType::BF16 => self.forward::<bf16>(inputs)?,
            _ => self.forward::<f16>(inputs)?,
        };
        Ok((out, query_layout.shape().clone()))
    }

    fn bwd(&self, query: &Tensor, key: &Tensor, value: &Tensor, out: &Tensor, grad: &Tensor) -> Result<QkvGradients> {
        let args = [query, key, value];
        let grad = grad.contiguous()?;
        match query.dtype() {
            DType::BF16 => self.backward::<bf16>(args, out, &grad),
            _ => self.backward::<f16>(args, out, &grad),
        }
    }
}
