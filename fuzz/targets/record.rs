//! clearform.toml: as the record of a portable model with few files, and as an attention plan.
#![no_main]

use clearform_attention::AttentionPlan;
use clearform_fuzz::SCRATCH;
use clearform_portable_model::{ModelRecord, PortableModel};
use libfuzzer_sys::fuzz_target;

const LAYER: &str = "transformer_blocks.0.attn";

fuzz_target!(|bytes: &[u8]| {
    SCRATCH.write("config.json", b"{}");
    SCRATCH.write(ModelRecord::FILE, bytes);
    let folder = SCRATCH.folder();
    if let Ok(model) = PortableModel::open(folder) {
        model.record().plan().iter().for_each(build);
    }
    let _ = PortableModel::verify(folder);
    if let Ok(text) = std::str::from_utf8(bytes) {
        AttentionPlan::from_toml(text).iter().for_each(build);
        text.parse().iter().for_each(build);
    }
});

fn build(plan: &AttentionPlan) {
    assert_eq!(AttentionPlan::from_toml(&plan.to_toml()).ok().as_ref(), Some(plan));
    let _ = plan.build(LAYER, &|_| Ok(None), Default::default());
}
