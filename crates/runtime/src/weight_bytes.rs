//! [`WeightBytes`]: what the weights of a component take in memory.

use candle_core::DType;
use clearform_weights::{TensorSource, held_bytes};
use std::collections::BTreeMap;

/// Bytes of a component's weights as they are held in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WeightBytes {
    /// All of them.
    pub total: u64,
    /// Those of the largest block.
    pub largest_block: u64,
    /// Those of no block.
    pub outside: u64,
}

impl WeightBytes {
    /// Those of `source`, whose plain tensors are converted to `dtype`.
    pub fn of(source: &dyn TensorSource, dtype: Option<DType>) -> Self {
        let mut blocks: BTreeMap<String, u64> = BTreeMap::new();
        let mut bytes = Self::default();
        for info in source.tensors() {
            let held = held_bytes(source, &info, dtype);
            bytes.total += held;
            match block_of(&info.name) {
                Some(block) => *blocks.entry(block.to_owned()).or_default() += held,
                None => bytes.outside += held,
            }
        }
        Self { largest_block: blocks.into_values().max().unwrap_or(0), ..bytes }
    }

    /// What is in memory while blocks are streamed: one that computes and the next.
    pub fn streamed(self) -> u64 {
        self.total.min(self.outside + 2 * self.largest_block)
    }
}

/// The block that a tensor belongs to: what its name begins with, up to the first number.
fn block_of(name: &str) -> Option<&str> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let mut end = 0;
    for part in name.split('.') {
        end += part.len();
        if is_number(part) {
            return Some(&name[..end]);
        }
        end += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use clearform_weights::InMemoryTensors;

    #[test]
    fn streamed_weights_are_those_outside_of_blocks_and_two_blocks() {
        let tensors =
            [("embed.weight", 10), ("blocks.0.a.weight", 20), ("blocks.0.b.2.bias", 5), ("blocks.1.a.weight", 7)];
        let tensor = |count: usize| Tensor::zeros(count, DType::F32, &Device::Cpu).unwrap();
        let source: InMemoryTensors =
            tensors.into_iter().map(|(name, count)| (name.to_owned(), tensor(count))).collect();
        let bytes = WeightBytes::of(&source, None);
        assert_eq!(bytes, WeightBytes { total: 4 * 42, largest_block: 4 * 25, outside: 4 * 10 });
        assert_eq!(bytes.streamed(), 4 * 42);
        assert_eq!(WeightBytes::of(&source, Some(DType::BF16)).total, 2 * 42);
        assert_eq!(WeightBytes { total: 1000, ..bytes }.streamed(), 4 * 10 + 2 * 4 * 25);
    }
}
