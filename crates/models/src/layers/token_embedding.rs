//! [`TokenEmbedding`]: the vectors of a vocabulary, which stay in memory as they are stored.

use crate::Result;
use crate::weight_builder::WeightBuilder;
use candle_core::{DType, Device, Tensor};
use clearform_weights::BaseWeight;

/// `torch.nn.Embedding`.
pub(crate) struct TokenEmbedding(BaseWeight);

impl TokenEmbedding {
    /// Loads the tensor `name` of (vocabulary, width).
    pub(crate) fn load(builder: &WeightBuilder, name: &str, shape: [usize; 2]) -> Result<Self> {
        builder.base_weight(name, &shape).map(Self)
    }

    /// # Shapes
    /// ids (tokens), each below the size of the vocabulary -> (tokens, width) in f32.
    pub(crate) fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let matrix = match &self.0 {
            BaseWeight::Dense(tensor) => return Ok(tensor.index_select(ids, 0)?.to_dtype(DType::F32)?),
            BaseWeight::Quantized(matrix) => matrix,
        };
        let ids = ids.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        let [_, width] = matrix.shape();
        let mut rows = vec![0.0; ids.len() * width];
        for (row, id) in rows.chunks_exact_mut(width).zip(&ids) {
            matrix.dequantize(*id as usize, row);
        }
        Ok(Tensor::from_vec(rows, (ids.len(), width), &Device::Cpu)?)
    }
}
