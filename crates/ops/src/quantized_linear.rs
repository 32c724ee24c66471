//! [`quantized_linear`]: a linear layer whose weight stays in the format of its file. Of many rows of x, some rows of the
//! weight at a time are dequantised and multiplied as others are; of few rows each row as it is read.

use crate::gemm::{self, GemmMode, GemmOperands, GemmShape, WeightRows};
use crate::kernel::contiguous;
use crate::matrix_rows::{StorageRef, add_rows, row_count, with_channels};
use crate::simd::{CpuFeatures, Element};
use crate::strided_product::{StridedMatrix, strided_product_to};
use candle_core::backend::BackendStorage as _;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use clearform_weights::{ProductPrecision, QuantizedMatrix};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// Values of the weight that are dequantised at a time for a product in f32: 16 MiB, little beside a model, and enough
/// outputs for a product at the full rate.
const MOST_VALUES: usize = 1 << 22;

/// x wᵀ + b.
///
/// # Shapes
/// x (.., inputs) on the CPU, weight (outputs, inputs), bias (outputs) -> (.., outputs).
///
/// # Errors
/// Shapes that contradict each other, or x on a GPU or in a dtype other than f32 and bf16.
pub(crate) fn quantized_linear(x: &Tensor, weight: &Arc<QuantizedMatrix>, bias: Option<&Tensor>) -> Result<Tensor> {
    let [outputs, inputs] = weight.shape();
    if x.dim(D::Minus1)? != inputs || bias.is_some_and(|bias| bias.dims() != [outputs]) {
        let bias = bias.map(Tensor::dims);
        bail!("linear: x {:?} and bias {bias:?} do not match weight {:?}", x.dims(), weight.shape());
    }
    let op = QuantizedLinear(weight.clone());
    let x = x.contiguous()?;
    match bias {
        None => x.apply_op1_no_bwd(&op),
        Some(bias) => x.apply_op2_no_bwd(&bias.to_dtype(x.dtype())?.contiguous()?, &op),
    }
}

struct QuantizedLinear(Arc<QuantizedMatrix>);

impl QuantizedLinear {
    fn run(&self, x: StorageRef, bias: Option<StorageRef>) -> Result<(CpuStorage, Shape)> {
        let [outputs, inputs] = self.0.shape();
        let shape = GemmShape { rows: row_count(x.1), inputs, outputs };
        let out = match x.0.dtype() {
            DType::BF16 => self.by_gemm::<bf16>(x, bias, shape)?,
            DType::F32 if shape.has_few_rows() || CpuFeatures::detect().is_avx2_only() => {
                self.by_gemm::<f32>(x, bias, shape)?
            }
            DType::F32 => CpuStorage::F32(self.by_parts(x, bias, shape)?),
            dtype => bail!("linear: x in {dtype:?} and a quantised weight; expected f32 or bf16"),
        };
        Ok((out, with_channels(x.1, outputs)))
    }

    fn by_gemm<E: Element<Work = f32>>(
        &self,
        (x, lx): StorageRef,
        bias: Option<StorageRef>,
        shape: GemmShape,
    ) -> Result<CpuStorage> {
        let x = contiguous::<E>(x, lx)?;
        let bias = bias.map(|(bias, layout)| contiguous::<E>(bias, layout)).transpose()?;
        let operands = GemmOperands { x, weight: WeightRows::<E>::Quantized(&self.0), bias };
        Ok(E::to_cpu_storage_owned(gemm::product(operands, shape, GemmMode::detect(ProductPrecision::Full))))
    }

    /// Some outputs at a time, by the product that dense weights in f32 go through.
    fn by_parts(&self, (x, lx): StorageRef, bias: Option<StorageRef>, shape: GemmShape) -> Result<Vec<f32>> {
        let GemmShape { rows, inputs, outputs } = shape;
        let x = StridedMatrix::new(contiguous::<f32>(x, lx)?, rows, inputs);
        let mut out = vec![0.0; rows * outputs];
        let step = (MOST_VALUES / inputs.max(1)).max(1);
        for first in (0..outputs).step_by(step) {
            let count = step.min(outputs - first);
            let weight = self.dequantized(first, count);
            let weight = StridedMatrix::new(&weight, count, inputs).transposed();
            strided_product_to(&mut out[first..], outputs, x, weight);
        }
        if let Some((bias, layout)) = bias {
            add_rows(&mut out, contiguous::<f32>(bias, layout)?);
        }
        Ok(out)
    }

    /// `count` rows of the weight from `first` on.
    fn dequantized(&self, first: usize, count: usize) -> Vec<f32> {
        let [_, inputs] = self.0.shape();
        let mut values = vec![0.0; count * inputs];
        let rows = values.par_chunks_mut(inputs.max(1)).enumerate();
        rows.for_each(|(row, values)| self.0.dequantize(first + row, values));
        values
    }
}

impl CustomOp1 for QuantizedLinear {
    fn name(&self) -> &'static str {
        "quantized linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((x, lx), None)
    }
}

impl CustomOp2 for QuantizedLinear {
    fn name(&self) -> &'static str {
        "quantized linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((x, lx), Some((b, lb)))
    }
}
