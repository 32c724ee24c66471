//! [`RelativePositions`]: the learned bias of attention scores by the distance between two tokens.

use super::T5Config;
use crate::Result;
use crate::weight_builder::WeightBuilder;
use candle_core::{DType, Tensor};

/// A bias for every head and bucket of distances (T5, section 2.1).
#[derive(Debug, Clone)]
pub(super) struct RelativePositions {
    /// (buckets, heads).
    table: Tensor,
    max_distance: usize,
}

impl RelativePositions {
    /// The name of the table in `T5Attention`.
    pub(super) const TABLE: &'static str = "relative_attention_bias.weight";

    pub(super) fn load(builder: &WeightBuilder, config: &T5Config) -> Result<Self> {
        let table = builder.shaped(Self::TABLE, &[config.buckets, config.heads])?;
        Ok(Self { table, max_distance: config.max_distance })
    }

    /// What is added to the scores of every query and key (`T5Attention.compute_bias`).
    ///
    /// # Shapes
    /// The result is (heads, tokens, tokens) in f32.
    pub(super) fn bias(&self, tokens: usize) -> Result<Tensor> {
        let (buckets, heads) = self.table.dims2()?;
        // The bucket of key - query, for key - query from 1 - tokens to tokens - 1.
        let last = tokens as i64 - 1;
        let by_distance: Vec<u32> =
            (-last..=last).map(|distance| bucket(distance, buckets, self.max_distance)).collect();
        let indices: Vec<u32> =
            (0..tokens).rev().flat_map(|first| by_distance[first..first + tokens].iter().copied()).collect();
        let indices = Tensor::from_vec(indices, tokens * tokens, self.table.device())?;
        let by_head = self.table.to_dtype(DType::F32)?.t()?.contiguous()?; // (heads, buckets)
        Ok(by_head.index_select(&indices, 1)?.reshape((heads, tokens, tokens))?)
    }
}

/// The bucket of a key `distance` tokens after the query: half of the buckets for keys after it, half for the others; in
/// each half one bucket per distance at first, then wider ones, up to `max_distance`
/// (`T5Attention._relative_position_bucket` with `bidirectional`, in f32 as there).
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> u32 {
    let half = buckets / 2;
    let exact = half / 2;
    let first = if distance > 0 { half } else { 0 };
    let distance = distance.unsigned_abs() as usize;
    if distance < exact {
        return (first + distance) as u32;
    }
    let range = (max_distance as f64 / exact as f64).ln() as f32;
    let wider = (distance as f32 / exact as f32).ln() / range * (half - exact) as f32;
    (first + (exact + wider as usize).min(half - 1)) as u32
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// From transformers with 32 buckets and a maximum distance of 128.
    #[test]
    fn distances_beyond_eight_share_buckets() {
        for (distance, expected) in [(0, 0), (7, 7), (11, 8), (12, 9), (15, 9), (16, 10), (23, 11), (32, 12)] {
            assert_eq!(bucket(-distance, 32, 128), expected, "{distance} before");
            let after = if distance == 0 { 0 } else { expected + 16 };
            assert_eq!(bucket(distance, 32, 128), after, "{distance} after");
        }
        for (distance, expected) in [(45, 12), (46, 13), (64, 14), (90, 14), (91, 15), (127, 15), (5000, 15)] {
            assert_eq!(bucket(-distance, 32, 128), expected, "{distance} before");
        }
    }

    #[test]
    fn rows_are_queries_and_columns_are_keys() {
        let table = Tensor::arange(0f32, 16., &Device::Cpu).unwrap().reshape((8, 2)).unwrap();
        let bias = RelativePositions { table, max_distance: 16 }.bias(3).unwrap().to_vec3::<f32>().unwrap();
        // Buckets of distances -2 to 2 are 2, 1, 0, 5 and 6; head 1 has the odd values.
        assert_eq!(bias[0], [[0., 10., 12.], [2., 0., 10.], [4., 2., 0.]]);
        assert_eq!(bias[1], [[1., 11., 13.], [3., 1., 11.], [5., 3., 1.]]);
    }
}
