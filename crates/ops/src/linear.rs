//! [`linear`]: a linear layer over a [`Weight`]; [`dense_linear`]: over a tensor, which may be frozen. Quantised weights are
//! in `quantized_linear.rs`.

use crate::addition::add;
use crate::gemm::{self, GemmMode, GemmOperands, GemmShape, WeightRows};
use crate::kernel::contiguous;
use crate::matrix_rows::{StorageRef, add_rows, row_count, with_channels};
use crate::quantized_linear::quantized_linear;
use crate::reference;
use crate::simd::Element;
use crate::strided_product::{StridedMatrix, strided_product};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, D, DType, Layout, MetalStorage, Result, Shape, Tensor,
};
use candle_core::{bail, op};
use clearform_weights::{BaseWeight, LowRank, ProductPrecision, Weight};
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;

/// x wᵀ + b, and for each low-rank term of the weight scale · (x downᵀ) upᵀ (LoRA, arXiv 2106.09685, eq. 3). Each factor
/// is treated as the weight is in [`dense_linear`].
///
/// # Shapes
/// x (.., inputs), weight (outputs, inputs), bias (outputs) -> (.., outputs).
///
/// # Errors
/// Shapes that contradict each other.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut y = match &weight.base {
        BaseWeight::Dense(base) => LinearOp { precision: weight.products }.apply(x, base, bias)?,
        BaseWeight::Quantized(matrix) => quantized_linear(x, matrix, bias)?,
    };
    for LowRank { down, up, scale } in &weight.low_rank {
        let inner = (dense_linear(x, down, None)? * *scale)?; // (.., rank)
        y = add(&y, &dense_linear(&inner, up, None)?)?;
    }
    Ok(y)
}

/// x wᵀ + b (`torch.nn.functional.linear`). A weight of another dtype than x is converted at use, and its gradient has
/// the dtype of the weight. Only tracked arguments get a gradient, so a frozen weight costs none.
///
/// # Shapes
/// x (.., inputs), weight (outputs, inputs), bias (outputs) -> (.., outputs).
///
/// # Errors
/// Shapes that contradict each other.
pub fn dense_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    LinearOp { precision: ProductPrecision::Full }.apply(x, weight, bias)
}

/// [`dense_linear`] with products of f32 in some precision.
#[derive(Clone, Copy)]
struct LinearOp {
    precision: ProductPrecision,
}

impl LinearOp {
    fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (outputs, inputs) = weight.dims2()?;
        if x.dim(D::Minus1)? != inputs {
            bail!("linear: x {:?} does not match weight {:?}", x.dims(), weight.dims());
        }
        if let Some(bias) = bias.filter(|bias| bias.dims() != [outputs]) {
            bail!("linear: bias {:?} does not match weight {:?}", bias.dims(), weight.dims());
        }
        if x.elem_count() == 0 || outputs == 0 {
            // The kernels do not accept empty operands; the reference does.
            return reference::dense_linear(x, weight, bias);
        }
        let x = x.contiguous()?;
        match bias {
            None => x.apply_op2(weight, self),
            Some(bias) => x.apply_op3(weight, bias, self),
        }
    }
}

type WeightAndBiasGradients = (Option<Tensor>, Option<Tensor>);
type LinearGradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.by_gemm((x, lx), (w, lw), None)? {
            Some(out) => Ok((out, output_shape(lx, lw)?)),
            None => cpu_product((x, lx), (w, lw)),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, w: &CudaStorage, lw: &Layout) -> Result<(CudaStorage, Shape)> {
        product((x, lx), (w, lw))
    }

    fn metal_fwd(&self, x: &MetalStorage, lx: &Layout, w: &MetalStorage, lw: &Layout) -> Result<(MetalStorage, Shape)> {
        product((x, lx), (w, lw))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<WeightAndBiasGradients> {
        Ok((self.input_gradient(x, weight, grad)?, self.weight_gradient(x, weight, grad)?))
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
        if let Some(out) = self.by_gemm((x, lx), (w, lw), Some((b, lb)))? {
            return Ok((out, output_shape(lx, lw)?));
        }
        let (mut out, shape) = cpu_product((x, lx), (w, lw))?;
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
        let input = self.input_gradient(x, weight, grad)?;
        Ok((input, self.weight_gradient(x, weight, grad)?, bias_gradient(bias, grad)?))
    }
}

/// x wᵀ on the CPU.
fn cpu_product(x: StorageRef, weight: StorageRef) -> Result<(CpuStorage, Shape)> {
    let (CpuStorage::F32(_), true) = (x.0, weight.1.is_contiguous()) else { return product(x, weight) };
    let (outputs, inputs) = weight.1.shape().dims2()?;
    let a = StridedMatrix::new(contiguous::<f32>(x.0, x.1)?, row_count(x.1), inputs);
    let weight_values = elements::<f32>(weight)?;
    let b = StridedMatrix::new(&weight_values, outputs, inputs);
    Ok((CpuStorage::F32(strided_product(a, b.transposed())), output_shape(x.1, weight.1)?))
}

/// x wᵀ by candle, on any device.
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
    Ok((out, output_shape(x.1, weight.1)?))
}

/// Shape of x wᵀ.
fn output_shape(x: &Layout, weight: &Layout) -> Result<Shape> {
    Ok(with_channels(x, weight.shape().dims2()?.0))
}

impl LinearOp {
    /// x wᵀ + b by [`gemm`], or none where candle is faster.
    fn by_gemm(self, x: StorageRef, weight: StorageRef, bias: Option<StorageRef>) -> Result<Option<CpuStorage>> {
        let (outputs, inputs) = weight.1.shape().dims2()?;
        let shape = GemmShape { rows: row_count(x.1), inputs, outputs };
        let operands = [Some(x), Some(weight), bias];
        let are_contiguous = operands.into_iter().flatten().all(|(_, layout)| layout.is_contiguous());
        let mode = GemmMode::detect(self.precision);
        match x.0.dtype() {
            dtype if !are_contiguous || !shape.is_faster_than_candle(dtype, mode) => Ok(None),
            DType::BF16 => by_gemm_of::<bf16>(x, weight, bias, shape, mode).map(Some),
            DType::F32 => by_gemm_of::<f32>(x, weight, bias, shape, mode).map(Some),
            _ => Ok(None),
        }
    }

    fn input_gradient(self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let grad = rows(grad)?.detach();
        let weight = weight.detach().contiguous()?;
        let (rows, inputs) = grad.dims2()?;
        let shape = GemmShape { rows, inputs, outputs: weight.dim(1)? };
        let mode = GemmMode::detect(self.precision);
        let uses_gemm = grad.device().is_cpu() && shape.is_faster_than_candle(grad.dtype(), mode);
        let gradient = match (uses_gemm, is_f32_on_cpu(&grad)) {
            (true, _) => grad.apply_op2_no_bwd(&weight, &LinearInputGradient { shape, mode })?,
            (_, true) => grad.apply_op2_no_bwd(&weight, &InputGradientProduct)?,
            _ => grad.matmul(&weight.to_dtype(grad.dtype())?)?,
        };
        gradient.reshape(x.shape()).map(Some)
    }

    fn weight_gradient(self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !weight.track_op() {
            return Ok(None);
        }
        // In the wider dtype: gradients of f32 master weights must not be rounded to bf16 on the way.
        let dtype = wider(weight.dtype(), grad.dtype());
        let x = rows(&x.detach())?;
        let grad = rows(grad)?;
        #[cfg(feature = "cuda")]
        if dtype == DType::F32
            && let Some(product) = crate::cuda::transposed_product(&grad, &x)?
        {
            return product.to_dtype(weight.dtype()).map(Some);
        }
        let x = x.to_dtype(dtype)?;
        let grad = grad.to_dtype(dtype)?;
        let product = match is_f32_on_cpu(&grad) {
            true => grad.detach().apply_op2_no_bwd(&x, &WeightGradientProduct(GemmMode::detect(self.precision)))?,
            false => grad.t()?.matmul(&x)?,
        };
        product.to_dtype(weight.dtype()).map(Some)
    }
}

/// [`gemm::product`] in the dtype of x, with the bias converted to it.
fn by_gemm_of<E: Element<Work = f32>>(
    x: StorageRef,
    weight: StorageRef,
    bias: Option<StorageRef>,
    shape: GemmShape,
    mode: GemmMode,
) -> Result<CpuStorage> {
    let x = elements::<E>(x)?;
    let bias = bias.map(elements::<E>).transpose()?;
    let bias = bias.as_deref();
    let out = match weight.0 {
        // Masters of a model in bf16 are rounded, as its weights are.
        CpuStorage::F32(_) if E::DTYPE == DType::F32 => {
            let weight = WeightRows::Dense(contiguous::<f32>(weight.0, weight.1)?);
            gemm::product(GemmOperands { x: &x, weight, bias }, shape, mode)
        }
        CpuStorage::BF16(_) => {
            let weight = WeightRows::Dense(contiguous::<bf16>(weight.0, weight.1)?);
            gemm::product(GemmOperands { x: &x, weight, bias }, shape, mode)
        }
        _ => {
            let weight = elements::<E>(weight)?;
            gemm::product(GemmOperands { x: &x, weight: WeightRows::Dense(&weight), bias }, shape, mode)
        }
    };
    Ok(E::to_cpu_storage_owned(out))
}

/// The elements of a tensor in another dtype.
fn elements<'a, E: Element<Work = f32>>((storage, layout): StorageRef<'a>) -> Result<Cow<'a, [E]>> {
    if storage.dtype() == E::DTYPE {
        return contiguous(storage, layout).map(Cow::Borrowed);
    }
    match storage {
        CpuStorage::F32(_) => Ok(converted(contiguous::<f32>(storage, layout)?)),
        CpuStorage::BF16(_) => Ok(converted(contiguous::<bf16>(storage, layout)?)),
        _ => E::cpu_storage_data(storage.to_dtype(layout, E::DTYPE)?).map(Cow::Owned),
    }
}

fn converted<'a, W: Element<Work = f32>, E: Element<Work = f32>>(values: &[W]) -> Cow<'a, [E]> {
    values.par_iter().map(|value| E::store(value.load())).collect()
}

fn add_bias<S: BackendStorage>((out, shape): (S, Shape), bias: (&S, &Layout)) -> Result<(S, Shape)> {
    let converted = bias.0.to_dtype(bias.1, out.dtype())?;
    let broadcast = Layout::contiguous(bias.1.shape()).broadcast_as(shape.clone())?;
    let sum = out.binary_impl::<op::Add>(&converted, &Layout::contiguous(shape.clone()), &broadcast)?;
    Ok((sum, shape))
}

/// grad w by [`gemm`].
struct LinearInputGradient {
    shape: GemmShape,
    mode: GemmMode,
}

impl LinearInputGradient {
    fn run<E: Element<Work = f32>>(&self, grad: StorageRef, weight: StorageRef) -> Result<(CpuStorage, Shape)> {
        let Self { shape, mode } = *self;
        let grad = contiguous::<E>(grad.0, grad.1)?;
        let out = match weight.0 {
            CpuStorage::F32(_) if E::DTYPE == DType::F32 => {
                gemm::matmul(grad, contiguous::<f32>(weight.0, weight.1)?, shape, mode)
            }
            CpuStorage::BF16(_) => gemm::matmul(grad, contiguous::<bf16>(weight.0, weight.1)?, shape, mode),
            _ => gemm::matmul(grad, &elements::<E>(weight)?, shape, mode),
        };
        Ok((E::to_cpu_storage_owned(out), (shape.rows, shape.outputs).into()))
    }
}

impl CustomOp2 for LinearInputGradient {
    fn name(&self) -> &'static str {
        "linear gradient of x"
    }

    fn cpu_fwd(&self, grad: &CpuStorage, lg: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        match grad {
            CpuStorage::BF16(_) => self.run::<bf16>((grad, lg), (w, lw)),
            CpuStorage::F32(_) => self.run::<f32>((grad, lg), (w, lw)),
            _ => bail!("{}: expected f32 or bf16", self.name()),
        }
    }
}

fn is_f32_on_cpu(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cpu()
}

/// a b, of contiguous matrices, a in f32.
struct InputGradientProduct;

impl CustomOp2 for InputGradientProduct {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        let (inner, columns) = lb.shape().dims2()?;
        let rows = la.shape().dims2()?.0;
        let b = elements::<f32>((b, lb))?;
        let product = strided_product(matrix(a, la)?, StridedMatrix::new(&b, inner, columns));
        Ok((CpuStorage::F32(product), (rows, columns).into()))
    }
}

/// aᵀ b, of contiguous f32 matrices.
struct WeightGradientProduct(GemmMode);

impl CustomOp2 for WeightGradientProduct {
    fn name(&self) -> &'static str {
        "transposed product"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        let a = matrix(a, la)?;
        let b = matrix(b, lb)?;
        let shape = GemmShape { rows: a.columns, inputs: a.rows, outputs: b.columns };
        let product = match self.0.multiplies_pairs(DType::F32) && shape.is_faster_than_candle(DType::F32, self.0) {
            true => gemm::matmul(&a.transposed_values(), b.values, shape, self.0),
            false => strided_product(a.transposed(), b),
        };
        Ok((CpuStorage::F32(product), (shape.rows, shape.outputs).into()))
    }
}

fn matrix<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<StridedMatrix<'a>> {
    let (rows, columns) = layout.shape().dims2()?;
    Ok(StridedMatrix::new(contiguous::<f32>(storage, layout)?, rows, columns))
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
