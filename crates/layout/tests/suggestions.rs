//! Similar names: which tensor an unknown or missing one was probably meant to be.
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

/// (layout, name in the layout, name in the file, whether they are similar)
#[test]
fn a_renamed_tensor_and_the_missing_one_are_suggested_for_each_other() {
    for (layout, right, wrong, similar) in [
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
        assert_eq!(load_report.suggestions.get(right).map(String::as_str), similar.then_some(wrong), "{wrong}");
        if similar {
            assert_eq!(load_report.suggestions[wrong], right);
            let problems = load_report.problems();
            let unmatched = format!("tensor {wrong:?} is not understood: ");
            let found = problems.iter().find(|problem| problem.starts_with(&unmatched)).unwrap();
            assert!(found.ends_with(&format!(" (maybe {right:?})")), "{found}");
            assert!(problems[0].starts_with(&format!("tensor {right:?} is missing")), "{}", problems[0]);
            assert!(problems[0].ends_with(&format!(" (maybe {wrong:?})")), "{}", problems[0]);
        }
    }
}

/// Nothing is suggested for a name that the layout has, whatever is wrong with its tensor.
#[test]
fn nothing_is_suggested_for_a_known_name() {
    let mut source = TINY.foreign("bfl");
    source.put("double_blocks.0.img_attn.qkv.weight", &[7, 16]);
    let (_, canonical) = open(&source, &TINY.config());
    assert_eq!(canonical.load_report().unmatched().count(), 1);
    assert!(canonical.load_report().suggestions.is_empty(), "{:?}", canonical.load_report().suggestions);
}

#[test]
fn a_hundred_thousand_unknown_names_are_reported_in_time() {
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
