//! FLUX in its layouts: what is detected, what each tensor becomes, and that both directions keep every bit.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{Dequantized, Hints, Inspection, LayoutError, Manifests, detect_source};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource, save};
use common::{Fake, Flux, TINY, detect, manifests, open};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

const DEV: Flux = Flux { double: 19, single: 38, heads: 24, head_dim: 128, channels: 64, guidance: true };

#[test]
fn flux1_dev_is_recognised_in_every_layout() {
    let diffusers = DEV.diffusers();
    assert_eq!(diffusers.tensors.len(), 1160);
    for (layout, count, prefix) in [("diffusers", 1160, ""), ("bfl", 780, ""), ("comfy", 780, "model.diffusion_model.")]
    {
        let source = DEV.foreign(layout);
        assert_eq!(source.tensors.len(), count, "{layout}");
        let identified = detect(&source, None, &Hints::default()).unwrap();
        assert_eq!((identified.layout.as_str(), identified.prefix.as_str()), (layout, prefix));
        assert_eq!((identified.family.as_str(), identified.variant.name.as_str()), ("flux", "dev"));
        let expected = json!({
            "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": 64,
            "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": true,
            "axes_dims_rope": [16, 56, 56],
        });
        assert_eq!(identified.config, expected, "{layout}");
        let canonical = identified.canonical(&source).require_complete().unwrap();
        assert_eq!(canonical.tensors(), diffusers.tensors(), "{layout}");
        let inspection = Inspection::new(&identified, &canonical);
        assert_eq!((inspection.parameters, inspection.bytes), (11_901_408_320, 23_802_816_640));
        assert!(inspection.is_complete() && inspection.to_string().ends_with("\ncomplete"));
    }
    let schnell = Flux { guidance: false, ..DEV }.foreign("bfl");
    assert_eq!(schnell.tensors.len(), 776);
}

#[test]
fn models_are_exported_under_the_names_of_black_forest_labs() {
    let names: BTreeSet<String> = TINY.foreign("bfl").tensors.into_keys().collect();
    for name in [
        "double_blocks.1.img_attn.norm.key_norm.scale",
        "double_blocks.0.txt_attn.qkv.bias",
        "double_blocks.0.img_mlp.2.weight",
        "double_blocks.1.txt_mod.lin.weight",
        "single_blocks.2.linear1.weight",
        "single_blocks.2.linear2.bias",
        "single_blocks.0.modulation.lin.bias",
        "final_layer.adaLN_modulation.1.weight",
        "guidance_in.in_layer.weight",
        "vector_in.out_layer.bias",
        "img_in.weight",
    ] {
        assert!(names.contains(name), "{name}");
    }
}

/// (canonical, foreign, rows of the foreign tensor, in multiples of the width)
#[test]
fn tensors_are_the_rows_that_the_reference_uses() {
    type Rows = &'static [(usize, usize)];
    let cases: [(&str, &str, Rows); 9] = [
        ("transformer_blocks.1.attn.to_q.weight", "double_blocks.1.img_attn.qkv.weight", &[(0, 1)]),
        ("transformer_blocks.1.attn.to_v.bias", "double_blocks.1.img_attn.qkv.bias", &[(2, 3)]),
        ("transformer_blocks.0.attn.add_k_proj.weight", "double_blocks.0.txt_attn.qkv.weight", &[(1, 2)]),
        ("single_transformer_blocks.2.attn.to_k.weight", "single_blocks.2.linear1.weight", &[(1, 2)]),
        ("single_transformer_blocks.2.proj_mlp.weight", "single_blocks.2.linear1.weight", &[(3, 7)]),
        ("single_transformer_blocks.0.proj_mlp.bias", "single_blocks.0.linear1.bias", &[(3, 7)]),
        ("norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight", &[(1, 2), (0, 1)]),
        ("norm_out.linear.bias", "final_layer.adaLN_modulation.1.bias", &[(1, 2), (0, 1)]),
        ("single_transformer_blocks.1.norm.linear.weight", "single_blocks.1.modulation.lin.weight", &[(0, 3)]),
    ];
    let source = TINY.foreign("bfl");
    let (_, canonical) = open(&source, &TINY.config());
    for (name, foreign, rows) in cases {
        let raw = source.read(foreign).unwrap();
        let row = raw.bytes.len() / raw.shape[0] * TINY.heads * TINY.head_dim;
        let expected: Vec<u8> = rows.iter().flat_map(|(from, to)| raw.bytes[from * row..to * row].to_vec()).collect();
        let got = canonical.read(name).unwrap();
        assert_eq!(got.bytes, expected, "{name}");
        assert_eq!(got.shape, canonical.info(name).unwrap().shape);
    }
}

#[test]
fn prefixes_are_stripped_and_put_back() {
    for (layout, prefixes) in [
        ("diffusers", &["transformer.", "model.diffusion_model.", "model."][..]),
        ("bfl", &["model.", "transformer.", "net."]),
        ("comfy", &["diffusion_model.", "model.model."]),
    ] {
        let plain = TINY.foreign(if layout == "comfy" { "bfl" } else { layout });
        for prefix in prefixes {
            let source = plain.with_prefix(prefix);
            let (identified, canonical) = open(&source, &TINY.config());
            assert_eq!((identified.layout.as_str(), identified.prefix.as_str()), (layout, *prefix));
            assert_eq!(canonical.require_complete().unwrap().tensors(), TINY.diffusers().tensors());
        }
    }
}

#[test]
fn components_of_an_all_in_one_file_are_skipped_for_a_reason() {
    let mut source = TINY.foreign("comfy");
    let components =
        ["text_encoders.clip_l.x.weight", "vae.decoder.conv_in.weight", "first_stage_model.x", "conditioner.y"];
    components.iter().for_each(|name| source.put(name, &[1]));
    let (_, canonical) = open(&source, &TINY.config());
    let skipped: BTreeMap<&str, &str> = canonical.load_report().skipped().collect();
    assert_eq!(skipped.keys().copied().collect::<BTreeSet<_>>(), BTreeSet::from(components));
    assert!(skipped.values().all(|reason| reason.ends_with("a component, not the transformer")));
    canonical.require_complete().unwrap();
}

#[test]
fn variants_are_detected_by_shapes() {
    let flux = |channels, guidance| Flux { channels, guidance, ..TINY };
    for (flux, expected, steps, guidance, tokens, ambiguous) in [
        (flux(64, true), "dev", 28, 3.5, 512, true),
        (flux(64, false), "schnell", 4, 0.0, 256, false),
        (flux(384, true), "fill", 50, 30.0, 512, false),
        (flux(128, true), "canny", 50, 30.0, 512, true),
        (flux(196, true), "flex2", 28, 3.5, 512, false),
        (flux(17, true), "custom", 28, 3.5, 512, false),
    ] {
        let (identified, _) = open(&flux.diffusers(), &flux.config());
        let variant = &identified.variant;
        assert_eq!(variant.name, expected);
        let defaults = (variant.defaults.steps, variant.defaults.guidance, variant.defaults.text_tokens);
        assert_eq!(defaults, (steps, guidance, tokens), "{expected}");
        assert_eq!(identified.notes.iter().any(|note| note.contains("--variant")), ambiguous, "{expected}");
        assert_eq!(identified.config["out_channels"], 64, "{expected}");
    }
}

#[test]
fn a_variant_may_be_requested() {
    let source = TINY.diffusers();
    let request = |name: &str| {
        let hints = Hints { variant: Some(name.to_owned()), ..Hints::default() };
        detect(&source, Some(&TINY.config()), &hints)
    };
    let kontext = request("kontext").unwrap();
    assert_eq!((kontext.variant.name.as_str(), kontext.variant.defaults.guidance), ("kontext", 2.5));
    assert_eq!(kontext.notes, request("dev").unwrap().notes);
    let note =
        "the tensors do not fit the requested variant \"fill\"; its sampling defaults are used all the same".to_owned();
    assert!(request("fill").unwrap().notes.contains(&note));
    let error = request("dve").unwrap_err().to_string();
    assert!(error.starts_with("unknown variant \"dve\"; choose one of [\"dev\", "), "{error}");
    assert!(error.contains("\"schnell\""), "{error}");
}

/// (layout, a change of the tensors, problems that the load report must have)
#[test]
fn every_problem_is_reported() {
    type Change = fn(&mut Fake);
    let cases: [(&str, Change, &[&str]); 10] = [
        (
            "diffusers",
            |fake| drop(fake.tensors.remove("transformer_blocks.1.attn.to_k.bias")),
            &["tensor \"transformer_blocks.1.attn.to_k.bias\" is missing"],
        ),
        (
            "diffusers",
            |fake| drop(fake.tensors.remove("x_embedder.weight")),
            &["tensor \"x_embedder.weight\" is missing"],
        ),
        (
            "diffusers",
            |fake| fake.put("transformer_blocks.0.ff.net.2.weight", &[16, 63]),
            &[
                "tensor \"transformer_blocks.0.ff.net.2.weight\" has the wrong shape",
                "expected [16, 64], found [16, 63]",
            ],
        ),
        (
            "diffusers",
            |fake| fake.put("x_embedder.weight", &[16, 65]),
            &[
                "\"x_embedder.weight\" has the wrong shape",
                "\"in_channels\" is 64 in config.json, 65 from the shape of",
            ],
        ),
        (
            "diffusers",
            |fake| fake.put("x_embedder.bias", &[15]),
            &["tensor \"x_embedder.bias\" has the wrong shape: \"x_embedder.bias\" expected [16], found [15]"],
        ),
        ("diffusers", |fake| fake.put("surprise.weight", &[1]), &["tensor \"surprise.weight\" is not understood"]),
        (
            "diffusers",
            |fake| fake.put("transformer_blocks.2.attn.to_q.weight", &[16, 16]),
            &["\"transformer_blocks.2.attn.to_q.weight\" is not understood", "a model of these sizes does not have"],
        ),
        (
            "bfl",
            |fake| drop(fake.tensors.remove("double_blocks.1.img_attn.qkv.weight")),
            &[
                "\"double_blocks.1.img_attn.qkv.weight\" is missing (needed for \"transformer_blocks.1.attn.to_k.weight\", ",
                "\"transformer_blocks.1.attn.to_v.weight\"",
            ],
        ),
        (
            "bfl",
            |fake| fake.put("double_blocks.1.img_attn.qkv.weight", &[47, 16]),
            &["\"double_blocks.1.img_attn.qkv.weight\" is not understood: its shape [47, 16] cannot be split"],
        ),
        (
            "comfy",
            |fake| fake.put("model.diffusion_model.final_layer.linear.weight", &[64, 17]),
            &["\"model.diffusion_model.final_layer.linear.weight\" has the wrong shape", "found [64, 17]"],
        ),
    ];
    for (layout, change, expected) in cases {
        let mut source = TINY.foreign(layout);
        change(&mut source);
        let (identified, canonical) = open(&source, &TINY.config());
        let problems = canonical.load_report().problems().join("\n");
        for expected in expected {
            assert!(problems.contains(expected), "{layout}: {problems:?} does not contain {expected:?}");
        }
        let inspection = Inspection::new(&identified, &canonical);
        assert!(!inspection.is_complete() && inspection.to_string().ends_with("NOT complete"));
        assert_eq!(inspection.problems().join("\n"), problems);
        assert!(matches!(canonical.require_complete(), Err(LayoutError::Incomplete(_))));
    }
}

#[test]
fn a_missing_block_is_reported_without_a_config() {
    let flux = Flux { head_dim: 128, heads: 1, double: 4, ..TINY };
    let mut source = flux.foreign("bfl");
    source.tensors.retain(|name, _| !name.starts_with("double_blocks.2."));
    let identified = detect(&source, None, &Hints::default()).unwrap();
    assert_eq!(identified.depths()["num_layers"], 4);
    let canonical = identified.canonical(&source);
    assert!(canonical.load_report().missing.iter().all(|missing| missing.name.starts_with("transformer_blocks.2.")));
    assert_eq!(canonical.load_report().missing.len(), 32);
}

#[test]
fn an_unknown_size_is_required_and_the_missing_tensor_named() {
    let mut source = TINY.foreign("bfl");
    source.tensors.remove("img_in.weight");
    let error = detect(&source, None, &Hints::default()).unwrap_err().to_string();
    for expected in ["\"in_channels\" cannot be determined", "missing [\"img_in.weight\"]", "--config"] {
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}

#[test]
fn config_json_is_compared_with_the_tensors() {
    for (key, value, expected) in [
        ("attention_head_dim", json!(16), "\"attention_head_dim\" is 16 in config.json, 8 from the shape of"),
        ("num_attention_heads", json!(3), "\"num_attention_heads\" is 3 in config.json, 2 from width"),
        ("in_channels", json!("64"), "\"in_channels\" is \"64\" in config.json, 64 from the shape of"),
        ("guidance_embeds", json!(false), "\"guidance_embeds\" is false in config.json, true from the tensor"),
        (
            "axes_dims_rope",
            json!([2, 2, 2]),
            "\"axes_dims_rope\" is [2,2,2] in the configuration, 8 from attention_head_dim",
        ),
        ("_class_name", json!("SD3Transformer2DModel"), "\"_class_name\" is \"SD3Transformer2DModel\" in config.json"),
        ("num_layers", json!(3), "tensor \"transformer_blocks.2.norm1.linear.weight\" is missing"),
        ("num_layers", json!(1), "tensor \"transformer_blocks.1.norm1.linear.weight\" is not understood"),
    ] {
        let mut config = TINY.config();
        config[key] = value;
        let source = TINY.diffusers();
        let (_, canonical) = open(&source, &config);
        let problems = canonical.load_report().problems().join("\n");
        assert!(problems.contains(expected), "{key}: {problems:?} does not contain {expected:?}");
    }
}

#[test]
fn absurd_sizes_in_config_json_are_reported() {
    let source = TINY.diffusers();
    for key in ["num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "joint_attention_dim"] {
        for value in [json!(u64::MAX), json!(-1), json!(1e300), json!([]), json!({}), json!("x")] {
            let mut config = TINY.config();
            config[key] = value;
            let wrong = match detect(&source, Some(&config), &Hints::default()) {
                Ok(identified) => {
                    let canonical = identified.canonical(&source);
                    let _ = Inspection::new(&identified, &canonical).to_string();
                    !canonical.load_report().is_complete()
                }
                Err(error) => matches!(error, LayoutError::Ambiguous { .. }),
            };
            assert!(wrong, "{key} {config}");
        }
    }
}

#[test]
fn rope_axes_come_from_config_or_metadata_or_the_published_size() {
    let source = TINY.diffusers();
    let detect = |metadata: &[(&str, &str)], hints: Hints| {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let sidecar = clearform_layout::Sidecar { config: None, metadata: &metadata };
        detect_source(&source, sidecar, &manifests(), &hints)
    };
    let error = detect(&[], Hints::default()).unwrap_err().to_string();
    assert!(error.contains("axes_dims_rope") && error.contains("--config"), "{error}");
    for metadata in [("axes_dims_rope", "[4,2,2]"), ("config", r#"{"axes_dims_rope":[4,2,2]}"#)] {
        assert_eq!(detect(&[metadata], Hints::default()).unwrap().config["axes_dims_rope"], json!([4, 2, 2]));
    }
    let hints = Hints { config: Some(json!({"axes_dims_rope": [2, 4, 2]})), ..Hints::default() };
    assert_eq!(detect(&[], hints).unwrap().config["axes_dims_rope"], json!([2, 4, 2]));
}

#[test]
fn learned_pooling_of_clear_belongs_to_the_model_and_survives_export() {
    let mut source = TINY.diffusers();
    source.put("transformer_blocks.1.attn.processor.spatial_weight", &[1, 1, 1, 4, 1, 4, 1]);
    source.put("single_transformer_blocks.0.attn.processor.spatial_weight", &[1, 1, 1, 4, 1, 4, 1]);
    let (identified, canonical) = open(&source, &TINY.config());
    let exported = identified.to_layout("bfl", canonical.require_complete().unwrap()).unwrap();
    assert_eq!(exported.load_report().unmatched().count(), 0);
    let back = Fake::like(&exported);
    let (_, again) = open(&back, &TINY.config());
    assert_eq!(again.require_complete().unwrap().tensors(), source.tensors());
}

#[test]
fn a_full_size_file_is_inspected_by_its_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flux1-dev.safetensors");
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, info) in DEV.foreign("bfl").tensors {
        let end = offset + info.shape.iter().product::<usize>() * 2;
        header.insert(name, json!({"dtype": "BF16", "shape": info.shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let header = serde_json::Value::Object(header).to_string();
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8 + (header.len() + offset) as u64).unwrap();
    let checkpoint = Dequantized::open(&path, &manifests()).unwrap();
    let identified = clearform_layout::detect(&checkpoint, &manifests(), &Hints::default()).unwrap();
    let canonical = identified.canonical(&checkpoint).require_complete().unwrap();
    let inspection = Inspection::new(&identified, &canonical);
    assert_eq!(inspection.parameters, 11_901_408_320);
    assert_eq!(inspection.estimates[0].image_tokens, 4096);
    let json = serde_json::to_value(&inspection).unwrap();
    assert_eq!((&json["complete"], &json["depth"]["num_single_layers"]), (&json!(true), &json!(38)));
    let norm = canonical.read("transformer_blocks.18.attn.norm_added_k.weight").unwrap();
    assert_eq!((norm.shape, norm.bytes), (vec![128], vec![0; 256]));
}

/// A teacher and a student must hold their common weights only once.
#[test]
fn whole_tensors_of_a_source_in_memory_share_its_storage() {
    let bytes = |name: &str| TINY.foreign("bfl").read(name).unwrap().bytes;
    let in_memory = InMemoryTensors::load(&TINY.foreign("bfl"), None, &candle_core::Device::Cpu).unwrap();
    let source = TINY.foreign("bfl");
    let identified = detect(&source, Some(&TINY.config()), &Hints::default()).unwrap();
    let canonical = identified.canonical(in_memory.clone()).require_complete().unwrap();
    let shared = canonical.tensor("proj_out.weight").unwrap();
    let original = in_memory.tensor("final_layer.linear.weight").unwrap();
    assert!(std::ptr::eq(&*shared.storage_and_layout().0, &*original.storage_and_layout().0));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("canonical.safetensors");
    save(&path, &canonical, &BTreeMap::new()).unwrap();
    let read = Checkpoint::open(&path).unwrap().read("transformer_blocks.0.attn.to_q.bias").unwrap().bytes;
    assert_eq!(read, bytes("double_blocks.0.img_attn.qkv.bias")[..32]);
}

#[test]
fn errors_on_unknown_layouts_and_families_list_the_choices() {
    let canonical = TINY.diffusers();
    let identified = open(&canonical, &TINY.config()).0;
    let error = identified.to_layout("kohya", &canonical).unwrap_err().to_string();
    assert_eq!(error, "unknown layout \"kohya\"; choose one of [\"diffusers\", \"bfl\", \"comfy\"]");
    let hints = Hints { family: Some("fluks".to_owned()), ..Hints::default() };
    let error = detect(&canonical, None, &hints).unwrap_err().to_string();
    assert_eq!(error, format!("unknown family \"fluks\"; choose one of {:?}", common::models::FAMILIES));
    assert_eq!(Manifests::embedded().unwrap().families(), common::models::FAMILIES);
}
