//! [`Blocks`]: the blocks of a transformer, each of which is loaded alone: all at once, or each when it is its turn.

use crate::{ModelError, Result};
use clearform_attention::AttentionPlan;
use clearform_weights::TensorSource;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// A block of a transformer.
pub(crate) trait TransformerBlock: Sized + Send + Sync + 'static {
    /// Sizes of the transformer.
    type Config: Clone + Send + Sync + 'static;

    /// Loads block `index` with the attention that `plan` assigns to it. Reads the tensors of this block and no others.
    fn load(config: &Self::Config, source: &dyn TensorSource, plan: &AttentionPlan, index: usize) -> Result<Self>;
}

/// The blocks of a transformer, by index. Models ask for a block where they compute with it, and keep none.
pub(crate) enum Blocks<B: TransformerBlock> {
    InMemory(Vec<Arc<B>>),
    Streamed(StreamedBlocks<B>),
}

impl<B: TransformerBlock> Blocks<B> {
    /// Loads blocks 0 to `count` - 1, or lets them be streamed if `source` is to be read so.
    pub(crate) fn load(
        count: usize,
        config: &B::Config,
        source: &dyn TensorSource,
        plan: &AttentionPlan,
    ) -> Result<Self> {
        if let Some(source) = source.streamed() {
            let loader = BlockLoader { config: config.clone(), source, plan: plan.clone() };
            return Ok(Self::Streamed(StreamedBlocks { count, loader: Arc::new(loader), state: Mutex::default() }));
        }
        let load = |index| B::load(config, source, plan, index).map(Arc::new);
        Ok(Self::InMemory((0..count).map(load).collect::<Result<_>>()?))
    }

    /// Block `index`, or an error if there is none.
    pub(crate) fn get(&self, index: usize) -> Result<Arc<B>> {
        let no_block = || ModelError::bad_input("index", format!("there is no block {index}"));
        match self {
            Self::InMemory(blocks) => blocks.get(index).cloned().ok_or_else(no_block),
            Self::Streamed(blocks) if index < blocks.count => blocks.get(index),
            Self::Streamed(_) => Err(no_block()),
        }
    }
}

/// Blocks that are read when they are needed. While one computes, a thread reads the next; after the last one that is the
/// first, for the next evaluation.
pub(crate) struct StreamedBlocks<B: TransformerBlock> {
    count: usize,
    loader: Arc<BlockLoader<B::Config>>,
    state: Mutex<StreamState<B>>,
}

/// What a block is loaded from.
struct BlockLoader<C> {
    config: C,
    source: Arc<dyn TensorSource>,
    plan: AttentionPlan,
}

/// The block that was asked for last, and the one that is being read.
struct StreamState<B> {
    current: Option<(usize, Arc<B>)>,
    next: Option<(usize, JoinHandle<Result<B>>)>,
}

impl<B> Default for StreamState<B> {
    fn default() -> Self {
        Self { current: None, next: None }
    }
}

impl<B: TransformerBlock> StreamedBlocks<B> {
    fn get(&self, index: usize) -> Result<Arc<B>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, block)) = state.current.as_ref().filter(|(current, _)| *current == index) {
            return Ok(block.clone());
        }
        // Released before the next is in memory, unless a caller still computes with it.
        state.current = None;
        let read = state.next.take().map(|(next, reading)| (next, reading.join()));
        let block = match read {
            Some((next, Ok(block))) if next == index => block?,
            // Asked for out of order.
            _ => self.loader.load(index)?,
        };
        let block = Arc::new(block);
        state.current = Some((index, block.clone()));
        if self.count > 1 {
            let next = (index + 1) % self.count;
            let loader = self.loader.clone();
            // Without a thread the next block is read when it is asked for.
            let reading = thread::Builder::new().name("next block".to_owned()).spawn(move || loader.load(next));
            state.next = reading.ok().map(|reading| (next, reading));
        }
        Ok(block)
    }
}

impl<C> BlockLoader<C> {
    fn load<B: TransformerBlock<Config = C>>(&self, index: usize) -> Result<B> {
        B::load(&self.config, self.source.as_ref(), &self.plan, index)
    }
}
