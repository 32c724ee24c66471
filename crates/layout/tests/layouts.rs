//! What holds for every layout of every family: it is distinguished from all others, and both directions keep every
//! bit.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{CanonicalSource, Hints, RowSegment, TensorOutcome};
use clearform_weights::TensorSource;
use common::models::{Dims, FAMILIES, Model, SMALL};
use common::{Fake, detect, manifests};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn dims() -> impl Strategy<Value = Dims> {
    let channels = prop::sample::select(vec![64usize, 128, 196, 384, 5, 4]);
    (1usize..5, 1usize..4, 1usize..5, channels, 1usize..4, any::<(bool, bool, bool)>()).prop_map(
        |(depth, heads, quarter, channels, patch, (norms, dual, more))| Dims {
            depth,
            heads,
            head_dim: 4 * quarter,
            channels,
            patch,
            norms,
            dual,
            more,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_layout_comes_back_bit_for_bit(dims in dims()) {
        for family in FAMILIES {
            let model = Model::new(family, dims);
            let all = model.canonical();
            for layout in manifests().layouts(family) {
                let source = model.foreign(&layout);
                let (identified, canonical) = model.open(&source);
                prop_assert_eq!((identified.family.as_str(), identified.layout.as_str()), (family, layout.as_str()));
                prop_assert_eq!(&identified.config, &model.config);
                let canonical = canonical.require_complete().unwrap();
                prop_assert_eq!(canonical.tensors(), all.tensors());
                used_once(&source, &canonical);
                let back = identified.to_layout(&layout, &canonical).unwrap();
                prop_assert_eq!(back.tensors(), source.tensors());
                for name in source.tensors.keys() {
                    prop_assert_eq!(back.read(name).unwrap(), source.read(name).unwrap());
                }
            }
        }
    }
}

/// The tensors as GGUF lists them: without leading extents of 1.
fn as_in_gguf(source: &Fake) -> Fake {
    let mut trimmed = Fake::default();
    for (name, info) in &source.tensors {
        let ones = info.shape.iter().take_while(|extent| **extent == 1).count();
        trimmed.put(name, &info.shape[ones.min(info.shape.len().saturating_sub(1))..]);
    }
    trimmed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn leading_extents_of_one_are_restored(dims in dims()) {
        for family in FAMILIES {
            let model = Model::new(family, dims);
            let all = model.canonical();
            for layout in manifests().layouts(family) {
                let source = model.foreign(&layout);
                let trimmed = as_in_gguf(&source);
                let (identified, canonical) = model.open(&trimmed);
                prop_assert_eq!(&identified.config, &model.config);
                let canonical = canonical.require_complete().unwrap();
                prop_assert_eq!(canonical.tensors(), all.tensors());
                let (_, plain) = model.open(&source);
                for name in all.tensors.keys() {
                    prop_assert_eq!(canonical.read(name).unwrap(), plain.read(name).unwrap());
                }
            }
        }
    }
}

/// Positions that are computed and not used still show the size of the images.
#[test]
fn sizes_are_read_from_positions_with_and_without_their_leading_extent() {
    for shape in [&[1, 64, 24][..], &[64, 24]] {
        let model = Model::new("pixart", SMALL);
        let mut source = model.foreign("original");
        source.put("pos_embed", shape);
        let mut config = model.config.clone();
        config.as_object_mut().unwrap().remove("sample_size");
        let identified = detect(&source, Some(&config), &Hints::default()).unwrap();
        assert_eq!(identified.config["sample_size"], 16, "{shape:?}");
    }
}

/// Every input is used, and every output has one input. Outputs hold the inputs' bytes, once for each copy.
fn used_once(source: &Fake, canonical: &CanonicalSource<&Fake>) {
    let outcomes = &canonical.load_report().outcomes;
    assert!(outcomes.values().all(|outcome| matches!(outcome, TensorOutcome::Used { .. })));
    assert!(outcomes.keys().eq(source.tensors.keys()));
    let size = |info: Option<clearform_weights::TensorInfo>| info.unwrap().shape.iter().product::<usize>();
    let mut outputs = Vec::new();
    let mut copied = 0;
    for (name, outcome) in outcomes {
        let TensorOutcome::Used { names } = outcome else { continue };
        let copies = names.iter().filter(|output| size(canonical.info(output)) == size(source.info(name))).count();
        copied += copies.saturating_sub(1) * size(source.info(name));
        outputs.extend(names);
    }
    let distinct: BTreeSet<&String> = outputs.iter().copied().collect();
    assert_eq!((outputs.len(), distinct.len()), (canonical.tensors().len(), canonical.tensors().len()));
    let total =
        |source: &dyn TensorSource| -> usize { source.tensors().into_iter().map(|info| size(Some(info))).sum() };
    assert_eq!(total(source) + copied, total(canonical));
}

/// (family, canonical name, name in the original layout, number of equal parts of its rows, parts of the canonical
/// tensor)
#[test]
fn tensors_are_the_rows_that_the_references_use() {
    type Rows = &'static [(usize, usize)];
    let cases: &[(&str, &str, &str, usize, Rows)] = &[
        (
            "sd3",
            "transformer_blocks.0.norm1.linear.bias",
            "joint_blocks.0.x_block.adaLN_modulation.1.bias",
            1,
            &[(0, 1)],
        ),
        (
            "sd3",
            "transformer_blocks.1.norm1_context.linear.weight",
            "joint_blocks.1.context_block.adaLN_modulation.1.weight",
            1,
            &[(0, 1)],
        ),
        (
            "sd3",
            "transformer_blocks.2.norm1_context.linear.weight",
            "joint_blocks.2.context_block.adaLN_modulation.1.weight",
            2,
            &[(1, 2), (0, 1)],
        ),
        (
            "sd3",
            "transformer_blocks.2.norm1_context.linear.bias",
            "joint_blocks.2.context_block.adaLN_modulation.1.bias",
            2,
            &[(1, 2), (0, 1)],
        ),
        ("sd3", "norm_out.linear.bias", "final_layer.adaLN_modulation.1.bias", 2, &[(1, 2), (0, 1)]),
        ("sd3", "transformer_blocks.1.attn.to_k.weight", "joint_blocks.1.x_block.attn.qkv.weight", 3, &[(1, 2)]),
        (
            "sd3",
            "transformer_blocks.2.attn.add_v_proj.bias",
            "joint_blocks.2.context_block.attn.qkv.bias",
            3,
            &[(2, 3)],
        ),
        ("sd3", "transformer_blocks.2.attn2.to_q.weight", "joint_blocks.2.x_block.attn2.qkv.weight", 3, &[(0, 1)]),
        ("sd3", "transformer_blocks.0.attn2.norm_k.weight", "joint_blocks.0.x_block.attn2.ln_k.weight", 1, &[(0, 1)]),
        (
            "sd3",
            "transformer_blocks.1.attn.norm_added_q.weight",
            "joint_blocks.1.context_block.attn.ln_q.weight",
            1,
            &[(0, 1)],
        ),
        ("sd3", "time_text_embed.text_embedder.linear_2.weight", "y_embedder.mlp.2.weight", 1, &[(0, 1)]),
        ("sd3", "pos_embed.pos_embed", "pos_embed", 1, &[(0, 1)]),
        (
            "sd3",
            "transformer_blocks.1.ff_context.net.2.weight",
            "joint_blocks.1.context_block.mlp.fc2.weight",
            1,
            &[(0, 1)],
        ),
        ("pixart", "transformer_blocks.2.attn1.to_v.weight", "blocks.2.attn.qkv.weight", 3, &[(2, 3)]),
        ("pixart", "transformer_blocks.1.attn2.to_k.bias", "blocks.1.cross_attn.kv_linear.bias", 2, &[(0, 1)]),
        ("pixart", "transformer_blocks.1.attn2.to_v.weight", "blocks.1.cross_attn.kv_linear.weight", 2, &[(1, 2)]),
        ("pixart", "transformer_blocks.0.attn2.to_out.0.weight", "blocks.0.cross_attn.proj.weight", 1, &[(0, 1)]),
        ("pixart", "scale_shift_table", "final_layer.scale_shift_table", 1, &[(0, 1)]),
        ("pixart", "transformer_blocks.0.scale_shift_table", "blocks.0.scale_shift_table", 1, &[(0, 1)]),
        ("pixart", "adaln_single.linear.weight", "t_block.1.weight", 1, &[(0, 1)]),
        ("pixart", "adaln_single.emb.resolution_embedder.linear_1.bias", "csize_embedder.mlp.0.bias", 1, &[(0, 1)]),
        ("pixart", "adaln_single.emb.aspect_ratio_embedder.linear_2.weight", "ar_embedder.mlp.2.weight", 1, &[(0, 1)]),
        ("pixart", "caption_projection.linear_2.weight", "y_embedder.y_proj.fc2.weight", 1, &[(0, 1)]),
        ("dit", "transformer_blocks.2.attn1.to_k.bias", "blocks.2.attn.qkv.bias", 3, &[(1, 2)]),
        ("dit", "transformer_blocks.2.norm1.linear.weight", "blocks.2.adaLN_modulation.1.weight", 1, &[(0, 1)]),
        ("dit", "proj_out_1.weight", "final_layer.adaLN_modulation.1.weight", 1, &[(0, 1)]),
        ("dit", "proj_out_2.weight", "final_layer.linear.weight", 1, &[(0, 1)]),
        (
            "dit",
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.bias",
            "t_embedder.mlp.2.bias",
            1,
            &[(0, 1)],
        ),
        (
            "dit",
            "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias",
            "t_embedder.mlp.2.bias",
            1,
            &[(0, 1)],
        ),
        (
            "sit",
            "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight",
            "y_embedder.embedding_table.weight",
            1,
            &[(0, 1)],
        ),
        ("sit", "transformer_blocks.1.ff.net.0.proj.weight", "blocks.1.mlp.fc1.weight", 1, &[(0, 1)]),
    ];
    for (family, name, foreign, parts, rows) in cases {
        let model = Model::new(family, SMALL);
        let source = model.foreign("original");
        let (_, canonical) = model.open(&source);
        let raw = source.read(foreign).unwrap();
        let part = raw.bytes.len() / parts;
        let expected: Vec<u8> = rows.iter().flat_map(|(from, to)| raw.bytes[from * part..to * part].to_vec()).collect();
        assert_eq!(canonical.read(name).unwrap().bytes, expected, "{name}");
    }
}

#[test]
fn every_prefix_of_every_layout_is_stripped() {
    for (layout, prefixes) in [
        ("diffusers", &["", "transformer.", "model.diffusion_model.", "model.", "net."][..]),
        ("original", &["", "model."]),
        ("comfy", &["model.diffusion_model.", "diffusion_model.", "model.model."]),
    ] {
        for family in FAMILIES.into_iter().filter(|family| *family != "flux") {
            if !manifests().layouts(family).iter().any(|known| known == layout) {
                continue;
            }
            let model = Model::new(family, SMALL);
            let plain = model.foreign(if layout == "comfy" { "original" } else { layout });
            for prefix in prefixes {
                let source = plain.with_prefix(prefix);
                let (identified, canonical) = model.open(&source);
                assert_eq!((identified.layout.as_str(), identified.prefix.as_str()), (layout, *prefix), "{family}");
                assert_eq!(canonical.require_complete().unwrap().tensors(), model.canonical().tensors());
            }
        }
    }
}

#[test]
fn learned_pooling_of_clear_belongs_to_every_model_and_survives_export() {
    for (family, names) in [
        ("sd3", &["transformer_blocks.1.attn", "transformer_blocks.2.attn2"][..]),
        ("pixart", &["transformer_blocks.1.attn1"]),
        ("dit", &["transformer_blocks.1.attn1"]),
        ("sit", &["transformer_blocks.2.attn1"]),
        ("minrf", &["layers.2.attention"]),
    ] {
        let model = Model::new(family, SMALL);
        let mut source = model.canonical();
        names.iter().for_each(|name| source.put(&format!("{name}.processor.spatial_weight"), &[1, 1, 1, 4, 1, 4, 1]));
        let (identified, canonical) = model.open(&source);
        let exported = identified.to_layout("original", canonical.require_complete().unwrap()).unwrap();
        assert_eq!(exported.load_report().unmatched().count(), 0);
        let back = Fake::like(&exported);
        assert_eq!(model.open(&back).1.require_complete().unwrap().tensors(), source.tensors(), "{family}");
    }
    let model = Model::new("sd3", SMALL);
    let mut source = model.canonical();
    source.put("transformer_blocks.1.attn2.processor.spatial_weight", &[1, 1, 1, 4, 1, 4, 1]);
    let problems = model.open(&source).1.load_report().problems().join("\n");
    assert!(problems.contains("\"transformer_blocks.1.attn2.processor.spatial_weight\" is not understood"));
}

/// A layout that stores one embedder for all blocks cannot hold embedders that training made different.
#[test]
fn copies_that_differ_are_not_merged() {
    let model = Model::new("dit", SMALL);
    let source = model.canonical();
    let identified = model.open(&source).0;
    let exported = identified.to_layout("original", &source).unwrap();
    let error = exported.read("y_embedder.embedding_table.weight").unwrap_err().to_string();
    assert!(error.contains("transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"), "{error}");
    assert!(error.contains("it differs from \"transformer_blocks.0."), "{error}");
    assert_eq!(exported.tensor("t_embedder.mlp.0.bias").unwrap_err().to_string().matches("differs").count(), 1);
    exported.read("blocks.1.attn.qkv.weight").unwrap();
}

/// The parameter map of a layout gives the same rows as mapping a checkpoint of that layout, and covers every row.
#[test]
fn parameter_maps_agree_with_checkpoints() {
    for family in FAMILIES {
        let model = Model::new(family, SMALL);
        let rows = |info: &clearform_weights::TensorInfo| info.shape[0];
        for layout in manifests().layouts(family) {
            let source = model.foreign(&layout);
            let (identified, canonical) = model.open(&source);
            let map = identified.parameter_map();
            let mut covered = 0;
            for (name, info) in &source.tensors {
                let parameter = map.find(name).unwrap_or_else(|| panic!("{name}"));
                assert_eq!(parameter.shape, info.shape, "{name}");
                let theirs = source.read(name).unwrap().bytes;
                let row = theirs.len() / rows(info);
                for RowSegment { from, canonical: to_name, to } in &parameter.segments {
                    let ours = canonical.read(to_name).unwrap().bytes;
                    let to = to * row..(to + from.len()) * row;
                    assert_eq!(theirs[from.start * row..from.end * row], ours[to], "{name} in {to_name}");
                    covered += from.len();
                }
            }
            assert_eq!(covered, canonical.tensors().iter().map(rows).sum::<usize>(), "{family} {layout}");
        }
    }
}

/// A model without one tensor is still recognised, and the missing tensor is reported.
#[test]
fn a_missing_tensor_is_named_in_every_layout() {
    for family in FAMILIES {
        let model = Model::new(family, SMALL);
        for layout in manifests().layouts(family) {
            let whole = model.foreign(&layout);
            for name in whole.tensors.keys() {
                let mut source = whole.clone();
                source.tensors.remove(name);
                match detect(&source, Some(&model.config), &Hints::default()) {
                    Ok(identified) => {
                        let problems = identified.canonical(&source).load_report().problems().join("\n");
                        assert_eq!(identified.family, family, "{layout} {name}");
                        assert!(problems.contains(&format!("tensor {name:?} is missing")), "{name}: {problems}");
                    }
                    Err(error) => assert!(error.to_string().contains(name.as_str()), "{layout} {name}: {error}"),
                }
            }
        }
    }
}
