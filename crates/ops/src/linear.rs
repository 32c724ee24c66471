//! [`linear`]: a product with a weight that may be frozen. Its rows may be any tokens.

use crate::gemm::{self, GemmOperands, GemmShape};
use crate::kernel::{contiguous, for_rows};
use crate::reference;
use crate::simd::{CpuFeatures, Element, Isa, SimdKernel, dispatch};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, D, DType, Layout, MetalStorage, Result, Shape, Tensor,
};
use candle_core::{bail, op};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;

/// x wᵀ + b. A weight of another number format is converted at use, and its gradient comes in the weight's own. Only
/// what is tracked gets a gradient: a frozen weight costs none.
///
/// # Shapes
/// x (.., inputs), weight (outputs, inputs), bias (outputs) -> (.., outputs).
///
/// # Errors
/// Shapes that contradict each other.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    if x.dim(D::Minus1)? != inputs {
        bail!("linear: x {:?} does not fit weight {:?}", x.dims(), weight.dims());
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [outputs]) {
        bail!("linear: bias {:?} does not fit weight {:?}", bias.dims(), weight.dims());
    }
    if x.elem_count() == 0 || outputs == 0 {
        // Kernels take no empty side; the plain operation does.
        return reference::linear(x, weight, bias);
    }
    let x = x.contiguous()?;
    match bias {
        None => x.apply_op2(weight, LinearOp),
        Some(bias) => x.apply_op3(weight, bias, LinearOp),
    }
}

struct LinearOp;

type WeightAndBiasGradients = (Option<Tensor>, Option<Tensor>);
type LinearGradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        match ours((x, lx), (w, lw), None)? {
            Some(out) => Ok((out, shape(lx, lw)?)),
            None => product((x, lx), (w, lw)),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, w: &CudaStorage, lw: &Layout) -> Result<(CudaStorage, Shape)> {
        product((x, lx), (w, lw))
    }

    fn metal_fwd(&self, x: &MetalStorage, lx: &Layout, w: &MetalStorage, lw: &Layout) -> Result<(MetalStorage, Shape)> {
        product((x, lx), (w, lw))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<WeightAndBiasGradients> {
        Ok((input_gradient(x, weight, grad)?, weight_gradient(x, weight, grad)?))
    }
}

impl CustomOp3 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if let Some(out) = ours((x, lx), (w, lw), Some((b, lb)))? {
            return Ok((out, shape(lx, lw)?));
        }
        let (mut out, shape) = product((x, lx), (w, lw))?;
        match (&mut out, b.to_dtype(lb, x.dtype())?) {
            (CpuStorage::F32(out), CpuStorage::F32(bias)) => add_rows(out, &bias),
            (CpuStorage::F64(out), CpuStorage::F64(bias)) => add_rows(out, &bias),
            (CpuStorage::BF16(out), CpuStorage::BF16(bias)) => add_rows(out, &bias),
            _ => return add_bias((out, shape), (b, lb)),
        }
        Ok((out, shape))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (out, shape) = product((x, lx), (w, lw))?;
        #[cfg(feature = "cuda")]
        if crate::cuda::add_bias(&out, shape.elem_count(), (b, lb))? {
            return Ok((out, shape));
        }
        add_bias((out, shape), (b, lb))
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        lx: &Layout,
        w: &MetalStorage,
        lw: &Layout,
        b: &MetalStorage,
        lb: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        add_bias(product((x, lx), (w, lw))?, (b, lb))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, _: &Tensor, grad: &Tensor) -> Result<LinearGradients> {
        Ok((input_gradient(x, weight, grad)?, weight_gradient(x, weight, grad)?, bias_gradient(bias, grad)?))
    }
}

/// x wᵀ on any device, without a view of either leaving it.
fn product<S: BackendStorage>(x: (&S, &Layout), weight: (&S, &Layout)) -> Result<(S, Shape)> {
    let (outputs, inputs) = weight.1.shape().dims2()?;
    let rows = row_count(x.1);
    let flat = Layout::contiguous_with_offset((rows, inputs), x.1.start_offset());
    let size = (1, rows, outputs, inputs);
    let out = if weight.0.dtype() == x.0.dtype() {
        x.0.matmul(weight.0, size, &flat, &weight.1.transpose(0, 1)?)?
    } else {
        let converted = weight.0.to_dtype(weight.1, x.0.dtype())?;
        x.0.matmul(&converted, size, &flat, &Layout::contiguous((outputs, inputs)).transpose(0, 1)?)?
    };
    Ok((out, shape(x.1, weight.1)?))
}

fn shape(x: &Layout, weight: &Layout) -> Result<Shape> {
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(weight.shape().dims2()?.0);
    Ok(shape.into())
}

type StorageRef<'a> = (&'a CpuStorage, &'a Layout);

/// x wᵀ + b by our own product, where it is the faster one.
fn ours(x: StorageRef, weight: StorageRef, bias: Option<StorageRef>) -> Result<Option<CpuStorage>> {
    let ((outputs, inputs), features) = (weight.1.shape().dims2()?, CpuFeatures::detect());
    let extents = GemmShape { rows: row_count(x.1), inputs, outputs };
    let are_whole = [Some(x), Some(weight), bias].into_iter().flatten().all(|(_, layout)| layout.is_contiguous());
    match x.0.dtype() {
        format if !are_whole || !extents.suit(format, features) => Ok(None),
        DType::BF16 => ours_of::<bf16>(x, weight, bias, extents, features).map(Some),
        DType::F32 => ours_of::<f32>(x, weight, bias, extents, features).map(Some),
        _ => Ok(None),
    }
}

fn ours_of<E: Element<Work = f32>>(
    x: StorageRef,
    weight: StorageRef,
    bias: Option<StorageRef>,
    extents: GemmShape,
    features: CpuFeatures,
) -> Result<CpuStorage> {
    let (x, weight, bias) = (numbers::<E>(x)?, numbers::<E>(weight)?, bias.map(numbers::<E>).transpose()?);
    let sides = GemmOperands { x: &x, weight: &weight, bias: bias.as_deref() };
    Ok(E::to_cpu_storage_owned(gemm::product(sides, extents, features)))
}

/// The numbers of a tensor, rounded where they are masters in a wider format.
fn numbers<'a, E: Element<Work = f32>>((storage, layout): StorageRef<'a>) -> Result<Cow<'a, [E]>> {
    if storage.dtype() == E::DTYPE {
        return contiguous(storage, layout).map(Cow::Borrowed);
    }
    match storage {
        CpuStorage::F32(_) => {
            let masters = contiguous::<f32>(storage, layout)?;
            Ok(masters.par_iter().map(|number| E::store(*number)).collect())
        }
        _ => E::cpu_storage_data(storage.to_dtype(layout, E::DTYPE)?).map(Cow::Owned),
    }
}

/// Rows of x, which counts them even where they are empty.
fn row_count(x: &Layout) -> usize {
    x.dims().iter().rev().skip(1).product()
}

fn add_bias<S: BackendStorage>((out, shape): (S, Shape), bias: (&S, &Layout)) -> Result<(S, Shape)> {
    let converted = bias.0.to_dtype(bias.1, out.dtype())?;
    let broadcast = Layout::contiguous(bias.1.shape()).broadcast_as(shape.clone())?;
    let sum = out.binary_impl::<op::Add>(&converted, &Layout::contiguous(shape.clone()), &broadcast)?;
    Ok((sum, shape))
}

fn add_rows<E: Element>(out: &mut [E], bias: &[E]) {
    for_rows(out, bias.len(), |_, out| dispatch(AddRows { out, bias }));
}

struct AddRows<'a, E> {
    out: &'a mut [E],
    bias: &'a [E],
}

impl<E: Element> SimdKernel for AddRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Isa>(self) {
        for out in self.out.chunks_exact_mut(self.bias.len()) {
            for (out, bias) in out.iter_mut().zip(self.bias) {
                *out = E::store(out.load() + bias.load());
            }
        }
    }
}

fn input_gradient(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    if !x.track_op() {
        return Ok(None);
    }
    let (grad, weight) = (rows(grad)?.detach(), weight.detach().to_dtype(grad.dtype())?.contiguous()?);
    let ((rows, inputs), outputs) = (grad.dims2()?, weight.dim(1)?);
    let extents = GemmShape { rows, inputs, outputs };
    let is_ours = grad.device().is_cpu() && extents.suit(grad.dtype(), CpuFeatures::detect());
    let gradient = if is_ours { grad.apply_op2_no_bwd(&weight, &LinearInputGradient)? } else { grad.matmul(&weight)? };
    gradient.reshape(x.shape()).map(Some)
}

/// grad w by our own product.
struct LinearInputGradient;

impl LinearInputGradient {
    fn run<E: Element<Work = f32>>(grad: StorageRef, weight: StorageRef) -> Result<(CpuStorage, Shape)> {
        let (rows, (inputs, outputs)) = (row_count(grad.1), weight.1.shape().dims2()?);
        let (grad, weight) = (contiguous::<E>(grad.0, grad.1)?, contiguous::<E>(weight.0, weight.1)?);
        let extents = GemmShape { rows, inputs, outputs };
        let out = gemm::product_by_columns(grad, weight, extents, CpuFeatures::detect());
        Ok((E::to_cpu_storage_owned(out), (rows, outputs).into()))
    }
}

impl CustomOp2 for LinearInputGradient {
    fn name(&self) -> &'static str {
        "linear gradient of x"
    }

    fn cpu_fwd(&self, grad: &CpuStorage, lg: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        match grad {
            CpuStorage::BF16(_) => Self::run::<bf16>((grad, lg), (w, lw)),
            CpuStorage::F32(_) => Self::run::<f32>((grad, lg), (w, lw)),
            _ => bail!("{} is of f32 or bf16 numbers", self.name()),
        }
    }
}

fn weight_gradient(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    if !weight.track_op() {
        return Ok(None);
    }
    // The product is formed in the wider format: gradients of f32 masters are not rounded to bf16 on the way.
    let dtype = wider(weight.dtype(), grad.dtype());
    let (x, grad) = (rows(&x.detach())?, rows(grad)?);
    #[cfg(feature = "cuda")]
    if dtype == DType::F32
        && let Some(product) = crate::cuda::transposed_product(&grad, &x)?
    {
        return product.to_dtype(weight.dtype()).map(Some);
    }
    let (x, grad) = (x.to_dtype(dtype)?, grad.to_dtype(dtype)?);
    grad.t()?.matmul(&x)?.to_dtype(weight.dtype()).map(Some)
}

fn bias_gradient(bias: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    if !bias.track_op() {
        return Ok(None);
    }
    let grad = rows(grad)?.to_dtype(wider(bias.dtype(), DType::F32))?;
    let ones = Tensor::ones((1, grad.dim(0)?), grad.dtype(), grad.device())?;
    ones.matmul(&grad)?.squeeze(0)?.to_dtype(bias.dtype()).map(Some)
}

fn rows(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.reshape((row_count(x.layout()), x.dim(D::Minus1)?))
}

fn wider(a: DType, b: DType) -> DType {
    if a.size_in_bytes() >= b.size_in_bytes() { a } else { b }
}
