//! What unknown and missing tensors resemble.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::LoadReport;
use common::{Flux, TINY, open};
use std::time::{Duration, Instant};

fn load_report(layout: &str, renamed: &[(&str, &str)]) -> LoadReport {
    let mut source = TINY.foreign(layout);
    for (from, to) in renamed {
        let info = source.tensors.remove(*from).unwrap();
        source.put(to, &info.shape);
    }
    open(&source, &TINY.config()).1.load_report().clone()
}

/// (layout, name of the layout, name in the file, whether each points to the other)
#[test]
fn a_tensor_under_another_name_and_the_one_that_is_missing_point_to_each_other() {
    for (layout, right, wrong, near) in [
        ("bfl", "double_blocks.1.img_attn.qkv.weight", "double_blocks.1.img_attn.to_qkv.weight", true),
        ("bfl", "single_blocks.2.linear1.bias", "single_blocks.2.linear_1.bias", true),
        ("bfl", "single_blocks.2.linear1.bias", "lora.single_blocks.2.linear1.bias", true),
        ("bfl", "single_blocks.2.linear1.bias", "b", false),
        ("bfl", "double_blocks.1.img_mlp.0.weight", "double_blocks.0.img_mlp.0.w", false),
        (
            "comfy",
            "model.diffusion_model.double_blocks.0.txt_attn.norm.key_norm.scale",
            "double_blocks.0.txt_attn.norm.key_norm.scale",
            true,
        ),
        ("diffusers", "transformer_blocks.0.attn.to_out.0.weight", "transformer_blocks.0.attn.to_out.weight", true),
    ] {
        let load_report = load_report(layout, &[(right, wrong)]);
        assert!(load_report.missing.iter().all(|missing| missing.in_file() == right), "{wrong}");
        assert_eq!(load_report.suggestions.get(right).map(String::as_str), near.then_some(wrong), "{wrong}");
        if near {
            assert_eq!(load_report.suggestions[wrong], right);
            let complaints = load_report.problems();
            let unmatched = format!("tensor {wrong:?} is not understood: ");
            let found = complaints.iter().find(|one| one.starts_with(&unmatched)).unwrap();
            assert!(found.ends_with(&format!(" (similar: {right:?})")), "{found}");
            assert!(complaints[0].starts_with(&format!("tensor {right:?} is missing")), "{}", complaints[0]);
            assert!(complaints[0].ends_with(&format!(" (similar: {wrong:?})")), "{}", complaints[0]);
        }
    }
}

/// Names that the layout has are not called near to others, whatever is wrong with their tensors.
#[test]
fn a_known_name_of_a_wrong_shape_is_near_to_nothing() {
    let mut source = TINY.foreign("bfl");
    source.put("double_blocks.0.img_attn.qkv.weight", &[7, 16]);
    let (_, canonical) = open(&source, &TINY.config());
    assert_eq!(canonical.load_report().unmatched().count(), 1);
    assert!(canonical.load_report().suggestions.is_empty(), "{:?}", canonical.load_report().suggestions);
}

#[test]
fn a_hundred_thousand_unknown_names_are_answered_in_time() {
    let flux = Flux { double: 19, single: 38, ..TINY };
    let mut source = flux.foreign("bfl");
    source.tensors.retain(|name, _| !name.starts_with("single_blocks.7."));
    for number in 0..100_000 {
        source.put(&format!("single_blocks.7.modulation.linear_{number:06}.weight"), &[4]);
    }
    let start = Instant::now();
    let (_, canonical) = open(&source, &flux.config());
    let load_report = canonical.load_report();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(load_report.unmatched().count(), 100_000);
    assert_eq!(
        load_report.suggestions["single_blocks.7.modulation.linear_000000.weight"],
        "single_blocks.7.modulation.lin.weight"
    );
}
