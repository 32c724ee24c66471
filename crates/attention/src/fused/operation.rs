//! [`AttentionOp`]: the CPU kernel as a differentiable candle operation.

use super::QkvGradients;
use super::backward::{BackwardInputs, backward};
use super::forward::forward;
use super::problem::Problem;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use clearform_ops::simd::{Bf16Pair, Element, Lane};
use half::bf16;
use std::sync::OnceLock;

/// Attention of one call over (query, key, value). It keeps the maximum and sum of each query's softmax for the
/// backward.
pub(super) struct AttentionOp {
    problem: Problem,
    /// Whether f32 and bf16 are multiplied as pairs of bf16.
    pairs: bool,
    scales: OnceLock<Vec<[f64; 2]>>,
}

impl AttentionOp {
    /// The operation for one call.
    pub fn new(problem: Problem, pairs: bool) -> Self {
        Self { problem, pairs, scales: OnceLock::new() }
    }

    fn forward<E: Element, F: Lane<Sum = E::Work>>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage> {
        let [query, key, value] = inputs.map(|(storage, layout)| contiguous::<E>(storage, layout));
        let (out, scales) = forward::<E, F>(&self.problem, [query?, key?, value?]);
        // The same operation on the same tensors gives the same scales, so the first to be set are right.
        self.scales.get_or_init(|| scales.into_iter().map(|scale| scale.map(|value| value.to_f64())).collect());
        Ok(E::to_cpu_storage_owned(out))
    }

    fn backward<E: Element, F: Lane<Sum = E::Work>>(
        &self,
        args: [&Tensor; 3],
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<QkvGradients> {
        let Some(scales) = self.scales.get() else { bail!("attention backward ran before the forward") };
        let tensors = [args[0], args[1], args[2], out, grad];
        let guards = tensors.map(|tensor| tensor.storage_and_layout());
        let [query, key, value, out, grad] = guards.each_ref().map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => contiguous::<E>(storage, layout),
            _ => bail!("attention backward: expected tensors on the CPU"),
        });
        let inputs = BackwardInputs { query: query?, key: key?, value: value?, out: out?, grad: grad?, scales };
        let mut gradients = backward::<E, F>(&self.problem, &inputs).into_iter();
        let mut tracked = |arg: &Tensor| match gradients.next() {
            Some(values) if arg.track_op() => Tensor::from_vec(values, arg.shape(), arg.device()).map(Some),
            _ => Ok(None),
        };
        Ok((tracked(args[0])?, tracked(args[1])?, tracked(args[2])?))
    }
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        query_layout: &Layout,
        key: &CpuStorage,
        key_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(query, query_layout), (key, key_layout), (value, value_layout)];
        let out = match query {
            CpuStorage::F32(_) if self.pairs => self.forward::<f32, Bf16Pair>(inputs)?,
            CpuStorage::F32(_) => self.forward::<f32, f32>(inputs)?,
            CpuStorage::F64(_) => self.forward::<f64, f64>(inputs)?,
            CpuStorage::BF16(_) if self.pairs => self.forward::<bf16, Bf16Pair>(inputs)?,
            CpuStorage::BF16(_) => self.forward::<bf16, f32>(inputs)?,
            _ => bail!("attention has no kernel for {:?}", query.dtype()),
        };
        Ok((out, query_layout.shape().clone()))
    }

    fn bwd(&self, query: &Tensor, key: &Tensor, value: &Tensor, out: &Tensor, grad: &Tensor) -> Result<QkvGradients> {
        let args = [query, key, value];
        let grad = grad.contiguous()?;
        match query.dtype() {
            DType::F32 if self.pairs => self.backward::<f32, Bf16Pair>(args, out, &grad),
            DType::F32 => self.backward::<f32, f32>(args, out, &grad),
            DType::F64 => self.backward::<f64, f64>(args, out, &grad),
            DType::BF16 if self.pairs => self.backward::<bf16, Bf16Pair>(args, out, &grad),
            DType::BF16 => self.backward::<bf16, f32>(args, out, &grad),
            dtype => bail!("attention has no kernel for {dtype:?}"),
        }
    }
}

fn contiguous<'a, E: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [E]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&E::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("attention: expected a contiguous tensor, found {layout:?}"),
    }
}
