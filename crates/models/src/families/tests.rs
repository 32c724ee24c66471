//! What holds for the blocks of every family.

use super::dit::{DitConfig, blocks::DitBlock};
use super::flux::{FluxConfig, blocks::FluxBlock};
use super::minrf::{MinrfConfig, blocks::MinrfBlock};
use super::pixart::{PixartConfig, blocks::PixartBlock};
use super::sd3::{Sd3Config, blocks::JointBlock};
use crate::layers::TransformerBlock;
use clearform_attention::AttentionPlan;
use clearform_weights::{Dtype, RawTensor, Result, TensorInfo, TensorSource};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Mutex;

const WIDTH: usize = 8;
const CLASSES: usize = 3;

/// Has a tensor of every name and records those that are read.
#[derive(Default)]
struct RecordingSource {
    read: Mutex<BTreeSet<String>>,
}

impl TensorSource for RecordingSource {
    fn tensors(&self) -> Vec<TensorInfo> {
        Vec::new()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let shape = match name.rsplit_once("transformer_blocks.1.").map(|(_, parameter)| parameter) {
            Some("scale_shift_table") => vec![6, WIDTH],
            Some("norm1.emb.class_embedder.embedding_table.weight") => vec![CLASSES + 1, WIDTH],
            _ => vec![1],
        };
        Some(TensorInfo { name: name.to_owned(), dtype: Dtype::F32, shape })
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        self.read.lock().unwrap().insert(name.to_owned());
        let info = self.info(name).unwrap();
        Ok(RawTensor { bytes: vec![0; info.byte_count() as usize], dtype: info.dtype, shape: info.shape })
    }
}

/// Names of the tensors that block `index` reads.
fn read_by<B: TransformerBlock>(config: &B::Config, index: usize) -> BTreeSet<String> {
    let source = RecordingSource::default();
    B::load(config, &source, &AttentionPlan::full(), index).map(|_| ()).unwrap();
    source.read.into_inner().unwrap()
}

/// The source has the optional tensors too: norms of queries and keys, SD 3.5's second attention. SiT has DiT's blocks.
#[test]
fn a_block_reads_its_own_tensors_alone() {
    let sizes: Value = json!({
        "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4,
        "num_embeds_ada_norm": CLASSES, "axes_dims_rope": [0, 2, 2],
    });
    let flux = FluxConfig::new(&sizes).unwrap();
    let cases = [
        ("transformer_blocks.1.", 32, read_by::<FluxBlock>(&flux, 1)),
        ("single_transformer_blocks.1.", 14, read_by::<FluxBlock>(&flux, 3)),
        ("transformer_blocks.1.", 42, read_by::<JointBlock>(&Sd3Config::new(&sizes).unwrap(), 1)),
        ("transformer_blocks.1.", 23, read_by::<PixartBlock>(&PixartConfig::new(&sizes).unwrap(), 1)),
        ("transformer_blocks.1.", 21, read_by::<DitBlock>(&DitConfig::new(&sizes).unwrap(), 1)),
        ("layers.1.", 24, read_by::<MinrfBlock>(&MinrfConfig::new(&sizes).unwrap(), 1)),
    ];
    for (block, count, read) in cases {
        let foreign: Vec<&String> = read.iter().filter(|name| !name.starts_with(block)).collect();
        assert!(foreign.is_empty(), "{block} reads {foreign:?}");
        assert_eq!(read.len(), count, "{block} reads {read:?}");
    }
}
