//! [`AttentionOp`]: attention of a window on a GPU, with its backward, by the kernels of `kernels/clear_attention`. It has
//! not run on a GPU yet. Knows no policy.

use crate::sequence::Sequence;
use crate::{Geometry, Radius};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::{CudaDType, DeviceId, WrapErr as _};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail,
};
use clearform_kernels::clear_attention::{
    self as kernels, BackwardParameters, ForwardParameters, ListAddresses, Lists, PairedForwardParameters, Pairs, Rows,
    Text, padding,
};
use clearform_kernels::launch::{ResidentLists, ResidentPairs, tile_map};
use clearform_kernels::{Number, Refusal};
use clearform_ops::cuda::{contiguous, number, start};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Tokens of a text tile.
const TILE: usize = 64;

/// Attention over `sequence`, or why no kernel takes it. Heads of another width than the kernels' are given zeros, which
/// change no product.
pub(super) fn attend(
    sequence: &Sequence,
    geometry: &Geometry,
    radius: Option<Radius>,
) -> Result<std::result::Result<Tensor, Refusal>> {
    let head_dim = sequence.query.dim(3)?;
    let Some(wider) = kernels::HEAD_DIMS.into_iter().find(|one| *one >= head_dim) else {
        return Ok(Err(Refusal::HeadDim { head_dim }));
    };
    let [query, key, value] = all([&sequence.query, &sequence.key, &sequence.value].map(|x| {
        let x = if wider > head_dim { &x.pad_with_zeros(3, 0, wider - head_dim)? } else { x };
        x.contiguous()
    }))?;
    let padded = Sequence { query, key, value, ..*sequence };
    let operation = match Softmax::new(&padded, head_dim, geometry, radius)? {
        Ok(operation) => operation,
        Err(refusal) => return Ok(Err(refusal)),
    };
    padded.query.apply_op3(&padded.key, &padded.value, operation)?.narrow(3, 0, head_dim).map(Ok)
}

/// Attention of one call over (query, key, value). It keeps the log-sum-exp of each query for its backward.
struct Softmax {
    problem: kernels::Problem,
    batch: usize,
    heads: usize,
    head_dim: usize,
    /// Of the heads before they were given zeros.
    scale: f32,
    queries: usize,
    keys: usize,
    text: usize,
    /// Text tokens that count, batch by batch, where not all do.
    visible: Option<Vec<Vec<bool>>>,
    geometry: Geometry,
    key: Key,
    by_query: Arc<Listed>,
    lse: OnceLock<CudaSlice<f32>>,
}

/// A type of numbers that the kernels take.
trait Stored: CudaDType + DeviceRepr + ValidAsZeroBits {}

impl Stored for bf16 {}
impl Stored for f16 {}

/// Lists, and where they lie on the device.
pub(crate) struct Listed {
    lists: Lists,
    resident: ResidentLists,
    /// Where the device computes two tiles of queries at a time.
    paired: Option<(Pairs, ResidentPairs)>,
}

/// What lists depend on, apart from the geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    device: DeviceId,
    limit: Option<i32>,
    text: usize,
    is_padded: bool,
    pooled: usize,
    by_query: bool,
}

/// The lists of one geometry that were asked for. Every layer and step asks for the same few.
#[derive(Default)]
pub(crate) struct Known(Mutex<HashMap<Key, Arc<Listed>>>);

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("lists on devices")
    }
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// A refusal with what would help: another number format, where that is what was refused.
pub(super) fn explained(refusal: Refusal) -> String {
    let hint = if matches!(refusal, Refusal::Number { .. }) { "; give --dtype bf16" } else { "" };
    format!("{refusal}{hint}")
}

impl Softmax {
    /// The operation for `sequence`, whose heads stand for some of `true_dim`, or why no kernel takes it.
    fn new(
        sequence: &Sequence,
        true_dim: usize,
        geometry: &Geometry,
        radius: Option<Radius>,
    ) -> Result<std::result::Result<Self, Refusal>> {
        let (batch, queries, heads, head_dim) = sequence.query.dims4()?;
        let number = number(sequence.query.dtype()).unwrap_or(Number::F32);
        let problem = match kernels::Problem::new(number, batch, heads, head_dim) {
            Ok(problem) => problem,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let device = sequence.query.device().as_cuda_device()?;
        let keys = sequence.key.dim(1)?;
        let visible = geometry.visible_text(batch, sequence.text)?;
        let key = Key {
            device: device.id(),
            limit: radius.map(|radius| radius.limit()),
            text: sequence.text,
            is_padded: visible.is_some(),
            pooled: keys - queries,
            by_query: true,
        };
        let (text, geometry, by_query) = (sequence.text, geometry.clone(), listed(geometry, device, key)?);
        let (lse, scale) = (OnceLock::new(), 1.0 / (true_dim as f32).sqrt());
        Ok(Ok(Self {
            problem,
            batch,
            heads,
            head_dim,
            scale,
            queries,
            keys,
            text,
            visible,
            geometry,
            key,
            by_query,
            lse,
        }))
    }

    fn forward<T: Stored>(&self, inputs: [(&CudaStorage, &Layout); 3]) -> Result<CudaStorage> {
        let device = inputs[0].0.device().clone();
        let stream = device.cuda_stream();
        let [query, key, value] = all(inputs.map(|(storage, layout)| contiguous::<T>(storage, layout)))?;
        let Listed { lists, resident, .. } = &*self.by_query;
        // SAFETY: the kernels write every number of it.
        let out = unsafe { device.alloc::<T>(self.query_count()) }?;
        // SAFETY: as above.
        let lse = unsafe { device.alloc::<f32>(self.rows()) }?;
        let (parts, part_lse) = self.parts(&device, lists)?;
        let padding = self.padding(&device, Rows::Queries)?;
        let parameters = ForwardParameters {
            query: query.device_ptr(&stream).0,
            key: key.device_ptr(&stream).0,
            value: value.device_ptr(&stream).0,
            out: out.device_ptr(&stream).0,
            lse: lse.device_ptr(&stream).0,
            parts: parts.device_ptr(&stream).0,
            part_lse: part_lse.device_ptr(&stream).0,
            lists: self.addresses(&device, resident, padding.as_ref()),
            queries: self.queries as i32,
            keys: self.keys as i32,
            slots: lists.slots as i32,
            scale: std::f32::consts::LOG2_E * self.scale,
        };
        self.start_forward(&device, parameters)?;
        // The same operation on the same tensors gives the same numbers, so whoever set them first is right.
        let _ = self.lse.set(lse);
        Ok(CudaStorage::wrap_cuda_slice(out, device))
    }

    fn start_forward(&self, device: &CudaDevice, parameters: ForwardParameters) -> Result<()> {
        let stream = device.cuda_stream();
        let Listed { lists, resident, paired } = &*self.by_query;
        let joins = ListAddresses { work: resident.joins.device_ptr(&stream).0, ..parameters.lists };
        // SAFETY: all memory is of this device, is as large as the sources say, and is freed on this very stream.
        unsafe {
            match paired {
                Some((pairs, resident)) => {
                    let parameters = PairedForwardParameters {
                        key: tile_map(&self.problem, parameters.key, self.keys).w()?,
                        value: tile_map(&self.problem, parameters.value, self.keys).w()?,
                        forward: parameters,
                        pairs: resident.pairs.device_ptr(&stream).0,
                        visits: resident.visits.device_ptr(&stream).0,
                        count: pairs.pairs.len() as i32,
                    };
                    start(device, &self.problem.paired_forward(pairs), parameters)?;
                }
                None => start(device, &self.problem.forward(lists), parameters)?,
            }
            start(device, &self.problem.merge(lists), ForwardParameters { lists: joins, ..parameters })
        }
    }

    fn backward<T: Stored>(&self, args: [&Tensor; 3], out: &Tensor, grad: &Tensor) -> Result<Gradients> {
        let device = args[0].device().as_cuda_device()?.clone();
        let stream = device.cuda_stream();
        let guards = [args[0], args[1], args[2], out, grad].map(|tensor| tensor.storage_and_layout());
        let mut inputs = [0; 5];
        for (address, (storage, layout)) in inputs.iter_mut().zip(&guards) {
            let Storage::Cuda(storage) = &**storage else { bail!("attention's backward away from the GPU") };
            *address = contiguous::<T>(storage, layout)?.device_ptr(&stream).0;
        }
        // Keys that nobody sees have no work, and their gradient is 0.
        let query = device.alloc_zeros::<T>(self.query_count())?;
        let [key, value] = all([(); 2].map(|()| device.alloc_zeros::<T>(self.key_count())))?;
        self.differentiate(&device, inputs, [&query, &key, &value].map(|grad| grad.device_ptr(&stream).0))?;
        let tensor = |arg: &Tensor, slice: CudaSlice<T>| {
            let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
            arg.track_op().then(|| Tensor::from_storage(storage, arg.shape(), BackpropOp::none(), false))
        };
        Ok((tensor(args[0], query), tensor(args[1], key), tensor(args[2], value)))
    }

    /// From the addresses of query, key, value, out and its gradient to those of the gradients of query, key and value.
    fn differentiate(&self, device: &CudaDevice, inputs: [u64; 5], gradients: [u64; 3]) -> Result<()> {
        let Some(lse) = self.lse.get() else { bail!("attention's backward before its forward") };
        let stream = device.cuda_stream();
        // SAFETY: the kernel writes every number of it.
        let delta = unsafe { device.alloc::<f32>(self.rows()) }?;
        let keyed = listed(&self.geometry, device, Key { by_query: false, ..self.key })?;
        let parts = [&self.by_query, &keyed, &keyed].map(|listed| self.parts(device, &listed.lists));
        let [(query_parts, _), (key_parts, _), (value_parts, _)] = all(parts)?;
        let [queries_hidden, keys_hidden] = all([Rows::Queries, Rows::Keys].map(|rows| self.padding(device, rows)))?;
        let by_query = BackwardParameters {
            query: inputs[0],
            key: inputs[1],
            value: inputs[2],
            out: inputs[3],
            grad: inputs[4],
            lse: lse.device_ptr(&stream).0,
            delta: delta.device_ptr(&stream).0,
            query_grad: gradients[0],
            key_grad: gradients[1],
            value_grad: gradients[2],
            parts: query_parts.device_ptr(&stream).0,
            value_parts: value_parts.device_ptr(&stream).0,
            lists: self.addresses(device, &self.by_query.resident, queries_hidden.as_ref()),
            batch: self.batch as i32,
            heads: self.heads as i32,
            queries: self.queries as i32,
            keys: self.keys as i32,
            slots: self.by_query.lists.slots as i32,
            scale: self.scale,
        };
        let by_key = BackwardParameters {
            parts: key_parts.device_ptr(&stream).0,
            lists: self.addresses(device, &keyed.resident, keys_hidden.as_ref()),
            slots: keyed.lists.slots as i32,
            ..by_query
        };
        self.start_backward(device, by_query, (by_key, &keyed))
    }

    fn start_backward(
        &self,
        device: &CudaDevice,
        by_query: BackwardParameters,
        (by_key, keyed): (BackwardParameters, &Listed),
    ) -> Result<()> {
        let delta = self.problem.delta(self.queries).map_err(candle_core::Error::wrap)?;
        let [query, sum_queries] = self.problem.query_gradient(&self.by_query.lists);
        let [key, sum_keys] = self.problem.key_gradient(&keyed.lists);
        let joined = |parameters: BackwardParameters, listed: &Listed| {
            let work = listed.resident.joins.device_ptr(&device.cuda_stream()).0;
            BackwardParameters { lists: ListAddresses { work, ..parameters.lists }, ..parameters }
        };
        // SAFETY: all memory is of this device, is as large as backward.cu says, and is freed on this very stream.
        unsafe {
            start(device, &delta, by_query)?;
            start(device, &query, by_query)?;
            start(device, &sum_queries, joined(by_query, &self.by_query))?;
            start(device, &key, by_key)?;
            start(device, &sum_keys, joined(by_key, keyed))
        }
    }

    fn addresses(
        &self,
        device: &CudaDevice,
        resident: &ResidentLists,
        padding: Option<&CudaSlice<u32>>,
    ) -> ListAddresses {
        let stream = device.cuda_stream();
        ListAddresses {
            work: resident.work.device_ptr(&stream).0,
            entries: resident.entries.device_ptr(&stream).0,
            masks: resident.masks.device_ptr(&stream).0,
            padding: padding.map_or(0, |padding| padding.device_ptr(&stream).0),
            text_tiles: self.text.div_ceil(TILE) as i32,
        }
    }

    fn padding(&self, device: &CudaDevice, rows: Rows) -> Result<Option<CudaSlice<u32>>> {
        let copy = |visible: &Vec<Vec<bool>>| device.clone_htod(&padding(visible, rows));
        self.visible.as_ref().filter(|_| self.text > 0).map(copy).transpose()
    }

    /// Memory for parts of long lists, and for their log-sum-exp. The driver allocates no empty memory.
    fn parts(&self, device: &CudaDevice, lists: &Lists) -> Result<(CudaSlice<f32>, CudaSlice<f32>)> {
        let count = self.problem.part_numbers(lists).max(self.head_dim);
        // SAFETY: what is read of it was written by the launch before.
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

fn all<T, const N: usize>(results: [Result<T>; N]) -> Result<[T; N]> {
    let all: Vec<T> = results.into_iter().collect::<Result<_>>()?;
    all.try_into().map_err(|_| candle_core::Error::msg("as many came out as went in"))
}

fn listed(geometry: &Geometry, device: &CudaDevice, key: Key) -> Result<Arc<Listed>> {
    let order = geometry.order();
    let mut known = order.lists.0.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(listed) = known.get(&key) {
        return Ok(listed.clone());
    }
    let places = order.places();
    let sequence = kernels::Sequence {
        text: if key.is_padded { Text::Padded(key.text) } else { Text::Whole(key.text) },
        places: &places,
        pooled: key.pooled,
        limit: key.limit,
    };
    let lists = Lists::new(&sequence, if key.by_query { Rows::Queries } else { Rows::Keys });
    let stream = device.cuda_stream();
    let resident = ResidentLists::new(&stream, &lists).w()?;
    let capability = stream.context().compute_capability().w()?;
    let paired = if key.by_query && kernels::FORWARD_SM90A.target.runs_on(capability) {
        let pairs = Pairs::new(&lists);
        let resident = ResidentPairs::new(&stream, &pairs).w()?;
        Some((pairs, resident))
    } else {
        None
    };
    let listed = Arc::new(Listed { lists, resident, paired });
    known.insert(key, listed.clone());
    Ok(listed)
}

impl CustomOp3 for Softmax {
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
        bail!("attention for a GPU was given tensors of the CPU")
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

    fn bwd(&self, query: &Tensor, key: &Tensor, value: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Gradients> {
        let (args, grad) = ([query, key, value], grad.contiguous()?);
        match query.dtype() {
            DType::BF16 => self.backward::<bf16>(args, out, &grad),
            _ => self.backward::<f16>(args, out, &grad),
        }
    }
}
