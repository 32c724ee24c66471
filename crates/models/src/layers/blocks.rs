//! [`Blocks`]: the blocks of a transformer, each of which is loaded alone.

use crate::{ModelError, Result};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;

/// A block of a transformer.
pub(crate) trait TransformerBlock: Sized {
    /// Sizes of the transformer.
    type Config;

    /// Loads block `index` with the attention that `plan` assigns to it. Reads the tensors of this block and no others.
    fn load(config: &Self::Config, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self>;
}

/// The blocks of a transformer, by index. All are in memory; a variant that reads each block when it is its turn
/// (streaming) will be added, so models ask for a block where they compute with it, and keep none.
pub(crate) struct Blocks<B> {
    in_memory: Vec<B>,
}

impl<B: TransformerBlock> Blocks<B> {
    /// Loads blocks 0 to `count` - 1.
    pub(crate) fn load(
        count: usize,
        config: &B::Config,
        source: &dyn TensorSource,
        plan: &AttentionPlan,
    ) -> Result<Self> {
        let in_memory = (0..count).map(|index| B::load(config, source, plan, index)).collect::<Result<_>>()?;
        Ok(Self { in_memory })
    }

    /// Block `index`, or an error if there is none.
    pub(crate) fn get(&self, index: usize) -> Result<&B> {
        let block = self.in_memory.get(index);
        block.ok_or_else(|| ModelError::bad_input("index", format!("there is no block {index}")))
    }
}
