//! Published models of each family: their tensors, the settings that are read from them, and those that must be
//! declared.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{Hints, Identified, Inspection, LayoutError, Sidecar, detect_source};
use clearform_weights::TensorSource;
use common::models::{Dims, Model, SMALL};
use common::{Fake, detect, manifests};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A published model.
fn published(name: &str) -> Model {
    let dims = |depth, heads, head_dim| Dims {
        depth,
        heads,
        head_dim,
        channels: 4,
        patch: 2,
        norms: true,
        dual: false,
        more: false,
    };
    let sd3 = |depth: usize, heads: usize, norms: bool, max: usize, dual: &[usize]| {
        let mut model = Model::new("sd3", Dims { norms, channels: 16, ..dims(depth, heads, 64) });
        for (key, value) in [
            ("sample_size", json!(128)),
            ("joint_attention_dim", json!(4096)),
            ("pooled_projection_dim", json!(2048)),
            ("out_channels", json!(16)),
            ("pos_embed_max_size", json!(max)),
            ("dual_attention_layers", json!(dual)),
        ] {
            model.config[key] = value;
        }
        model
    };
    let latent = |family, more, size: usize| {
        let mut model = Model::new(family, Dims { more, ..dims(28, 16, 72) });
        model.config["sample_size"] = size.into();
        if family == "pixart" {
            model.config["caption_channels"] = 4096.into();
        } else {
            model.config["num_embeds_ada_norm"] = 1000.into();
        }
        model
    };
    match name {
        "sd3-medium" => sd3(24, 24, false, 192, &[]),
        "sd3.5-medium" => sd3(24, 24, true, 384, &(0..13).collect::<Vec<_>>()),
        "sd3.5-large" => sd3(38, 38, true, 192, &[]),
        "pixart-alpha-1024" => latent("pixart", true, 128),
        "pixart-sigma" => latent("pixart", false, 128),
        "dit-xl-2-256" => latent("dit", false, 32),
        "sit-xl-2-512" => latent("sit", false, 64),
        other => panic!("{other}"),
    }
}

fn only(config: &Value, keys: &[&str]) -> Value {
    keys.iter().map(|key| ((*key).to_owned(), config[*key].clone())).collect::<serde_json::Map<_, _>>().into()
}

/// (model, keys that no tensor of diffusers' layout shows, tensors in diffusers' and in the original layout,
/// parameters)
#[test]
fn published_models_are_recognised() {
    type Case = (&'static str, &'static [&'static str], usize, usize, u64);
    let cases: [Case; 7] = [
        ("sd3-medium", &[], 683, 491, 2_084_951_104),
        ("sd3.5-medium", &[], 909, 665, 2_469_663_936),
        ("sd3.5-large", &[], 1227, 923, 8_146_280_768),
        ("pixart-alpha-1024", &["sample_size"], 611, 443, 611_349_152),
        ("pixart-sigma", &["sample_size"], 603, 435, 610_856_096),
        ("dit-xl-2-256", &["_class_name", "sample_size"], 538, 291, 749_826_464),
        ("sit-xl-2-512", &["_class_name", "sample_size"], 538, 291, 749_826_464),
    ];
    for (name, declared, count, foreign_count, parameters) in cases {
        let model = published(name);
        let canonical = model.canonical();
        assert_eq!(canonical.tensors.len(), count, "{name}");
        let declared = only(&model.config, declared);
        for layout in manifests().layouts(model.family) {
            let source = model.foreign(&layout);
            assert_eq!(source.tensors.len(), if layout == "diffusers" { count } else { foreign_count }, "{name}");
            let identified = detect(&source, Some(&declared), &Hints::default()).unwrap();
            let found = (identified.family.as_str(), identified.layout.as_str(), identified.variant.name.as_str());
            assert_eq!(found, (model.family, layout.as_str(), name));
            assert_eq!(identified.pixels_per_token(), 16);
            let [heads, head_dim] = ["num_attention_heads", "attention_head_dim"].map(|key| model.config[key].as_u64());
            let width = identified.size("width").map(|width| width as u64);
            assert_eq!(width, heads.zip(head_dim).map(|(heads, head_dim)| heads * head_dim), "{name}");
            let mut expected = model.config.clone();
            if layout == "original" && model.family == "dit" {
                (expected["norm_eps"], expected["downscale_freq_shift"]) = (json!(1e-6), json!(0));
            }
            assert_eq!(identified.config, expected, "{name} {layout}");
            let mapped = identified.canonical(&source).require_complete().unwrap();
            assert_eq!(mapped.tensors(), canonical.tensors(), "{name} {layout}");
            let inspection = Inspection::new(&identified, &mapped);
            assert_eq!(inspection.parameters, parameters, "{name}");
            assert_eq!(
                inspection.trained_side_pixels,
                model.config["sample_size"].as_u64().map(|size| 8 * size as usize)
            );
        }
    }
}

/// Names and shapes as the libraries write them.
#[test]
fn shapes_are_those_of_the_published_models() {
    let cases: &[(&str, &str, &[usize])] = &[
        ("sd3-medium", "pos_embed.pos_embed", &[1, 36864, 1536]),
        ("sd3-medium", "transformer_blocks.0.norm1.linear.weight", &[9216, 1536]),
        ("sd3-medium", "transformer_blocks.22.norm1_context.linear.bias", &[9216]),
        ("sd3-medium", "transformer_blocks.23.norm1_context.linear.weight", &[3072, 1536]),
        ("sd3-medium", "proj_out.weight", &[64, 1536]),
        ("sd3.5-medium", "transformer_blocks.12.norm1.linear.weight", &[13824, 1536]),
        ("sd3.5-medium", "transformer_blocks.13.norm1.linear.weight", &[9216, 1536]),
        ("sd3.5-medium", "transformer_blocks.12.attn2.norm_k.weight", &[64]),
        ("sd3.5-medium", "pos_embed.pos_embed", &[1, 147_456, 1536]),
        ("sd3.5-large", "transformer_blocks.37.attn.norm_added_q.weight", &[64]),
        ("sd3.5-large", "transformer_blocks.36.ff_context.net.0.proj.weight", &[9728, 2432]),
        ("pixart-alpha-1024", "adaln_single.emb.resolution_embedder.linear_1.weight", &[384, 256]),
        ("pixart-alpha-1024", "adaln_single.emb.aspect_ratio_embedder.linear_2.bias", &[384]),
        ("pixart-sigma", "caption_projection.linear_1.weight", &[1152, 4096]),
        ("pixart-sigma", "transformer_blocks.27.scale_shift_table", &[6, 1152]),
        ("pixart-sigma", "adaln_single.linear.weight", &[6912, 1152]),
        ("dit-xl-2-256", "transformer_blocks.27.norm1.emb.class_embedder.embedding_table.weight", &[1001, 1152]),
        ("dit-xl-2-256", "proj_out_1.weight", &[2304, 1152]),
        ("dit-xl-2-256", "proj_out_2.bias", &[32]),
    ];
    for (name, tensor, shape) in cases {
        assert_eq!(published(name).canonical().info(tensor).unwrap().shape, *shape, "{name} {tensor}");
    }
    // The published counts are of models without a caption projection.
    for (name, count) in [("pixart-alpha-1024", 607), ("pixart-sigma", 599)] {
        let names = published(name).canonical().tensors.into_keys();
        assert_eq!(names.filter(|name| !name.starts_with("caption_projection.")).count(), count);
    }
    let large = published("sd3.5-large").canonical();
    for absent in ["transformer_blocks.37.attn.to_add_out.bias", "transformer_blocks.37.ff_context.net.2.weight"] {
        assert_eq!(large.info(absent), None);
    }
}

#[test]
fn the_config_has_every_key_of_the_family() {
    for family in ["dit", "minrf", "pixart", "sd3", "sit"] {
        let model = Model::new(family, SMALL);
        let source = model.canonical();
        assert_eq!(model.open(&source).0.config, model.config);
    }
    let minrf = Model::new("minrf", SMALL);
    let source = minrf.canonical();
    for (name, shape) in [
        ("init_conv_seq.0.weight", &[12, 4, 5, 5][..]),
        ("init_conv_seq.2.bias", &[12]),
        ("init_conv_seq.3.weight", &[12, 12, 5, 5]),
        ("x_embedder.weight", &[24, 48]),
        ("y_embedder.embedding_table.weight", &[11, 24]),
        ("layers.2.attention.q_norm.bias", &[24]),
        ("layers.2.feed_forward.w2.weight", &[24, 56]),
        ("layers.0.adaLN_modulation.1.weight", &[144, 24]),
        ("final_layer.linear.weight", &[16, 24]),
        ("final_layer.adaLN_modulation.1.bias", &[48]),
    ] {
        assert_eq!(source.info(name).unwrap().shape, shape, "{name}");
    }
    let wide = Model::new("minrf", Dims { heads: 16, head_dim: 128, depth: 1, ..SMALL }).canonical();
    assert_eq!(wide.info("y_embedder.embedding_table.weight").unwrap().shape, [11, 1024]);
    assert_eq!(wide.info("layers.0.adaLN_modulation.1.weight").unwrap().shape, [12288, 1024]);
    let (identified, _) = minrf.open(&source);
    assert_eq!((identified.pixels_per_token(), identified.size("width")), (2, Some(24)));
    assert_eq!(identified.depths(), BTreeMap::from([("n_layers".to_owned(), 3)]));
    assert!(identified.components().is_empty());
}

#[test]
fn components_that_a_pipeline_may_lack_stand_apart() {
    let names = |family| {
        let model = Model::new(family, SMALL);
        let identified = model.open(&model.canonical()).0;
        (identified.components().join(" "), identified.optional_components().join(" "))
    };
    let sd3 = "scheduler text_encoder text_encoder_2 tokenizer tokenizer_2 vae".to_owned();
    assert_eq!(names("sd3"), (sd3, "text_encoder_3 tokenizer_3".to_owned()));
    assert_eq!(names("pixart"), ("scheduler text_encoder tokenizer vae".to_owned(), String::new()));
    assert_eq!(names("dit"), ("vae".to_owned(), "scheduler".to_owned()));
    assert_eq!(names("sit"), ("vae".to_owned(), String::new()));
}

#[test]
fn components_of_an_all_in_one_file_are_skipped_for_a_reason() {
    let model = Model::new("sd3", SMALL);
    let mut source = model.foreign("comfy");
    let components = [
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.scaled_fp8",
        "first_stage_model.decoder.conv_in.weight",
    ];
    components.iter().for_each(|name| source.put(name, &[1]));
    let (identified, canonical) = model.open(&source);
    assert_eq!((identified.layout.as_str(), identified.prefix.as_str()), ("comfy", "model.diffusion_model."));
    let skipped: Vec<(&str, &str)> = canonical.load_report().skipped().collect();
    assert_eq!(skipped.len(), 4);
    assert!(skipped.iter().all(|(name, why)| components.contains(name) && why.ends_with("not the transformer")));
    canonical.require_complete().unwrap();
}

fn sampled(mut model: Model, change: &[(&str, Value)]) -> Identified {
    change.iter().for_each(|(key, value)| model.config[*key] = value.clone());
    let source = model.canonical();
    detect(&source, Some(&model.config), &Hints::default()).unwrap()
}

#[test]
fn variants_have_their_sampling_defaults() {
    let pixart = |change: &[(&str, Value)]| sampled(published("pixart-sigma"), change);
    let size = |size: usize| ("sample_size", json!(size));
    let cases = [
        (sampled(published("sd3-medium"), &[]), "sd3-medium", 28, 7.0, 333, ""),
        (sampled(published("sd3.5-medium"), &[]), "sd3.5-medium", 40, 4.5, 333, ""),
        (sampled(published("sd3.5-large"), &[]), "sd3.5-large", 28, 3.5, 333, "sd3.5-large-turbo"),
        (sampled(Model::new("sd3", SMALL), &[]), "custom", 28, 7.0, 333, ""),
        (pixart(&[size(128)]), "pixart-sigma", 20, 4.5, 300, ""),
        (pixart(&[size(256)]), "pixart-sigma", 20, 4.5, 300, ""),
        (pixart(&[size(64)]), "pixart-alpha", 20, 4.5, 120, "pixart-sigma"),
        (pixart(&[size(32)]), "pixart-alpha", 20, 4.5, 120, "pixart-sigma"),
        (pixart(&[("use_additional_conditions", json!(true))]), "pixart-alpha-1024", 20, 4.5, 120, ""),
        (sampled(published("dit-xl-2-256"), &[]), "dit-xl-2-256", 50, 4.0, 0, ""),
        (sampled(published("dit-xl-2-256"), &[size(64)]), "dit-xl-2-512", 50, 4.0, 0, ""),
        (sampled(Model::new("dit", SMALL), &[]), "custom", 50, 4.0, 0, ""),
        (sampled(Model::new("sit", SMALL), &[]), "custom", 50, 4.0, 0, ""),
        (sampled(Model::new("minrf", SMALL), &[]), "custom", 50, 2.0, 0, ""),
    ];
    for (identified, name, steps, guidance, text_tokens, other) in cases {
        let defaults = identified.variant.defaults;
        assert_eq!(identified.variant.name, name);
        assert_eq!((defaults.steps, defaults.guidance, defaults.text_tokens), (steps, guidance, text_tokens), "{name}");
        assert_eq!(defaults.evaluations, 2, "{name}");
        let note = identified.notes.iter().find(|note| note.contains("--variant")).map_or("", String::as_str);
        let expected = format!("using {name} (choose another with --variant {other})");
        assert_eq!(note.ends_with(&expected), !other.is_empty(), "{note}");
        assert_eq!(note.is_empty(), other.is_empty(), "{name}");
    }
}

/// Settings that no tensor shows are never guessed.
#[test]
fn settings_that_change_the_result_are_required() {
    let (sd3, pixart, dit, minrf) = ("sd3", "pixart", "dit", "minrf");
    let dims = |heads, head_dim| Dims { heads, head_dim, norms: false, dual: false, ..SMALL };
    for (model, declared, key, why) in [
        (Model::new(sd3, dims(2, 32)), &[][..], "attention_head_dim", "64 for {\"width\":[1536,2432]} only"),
        (Model::new(pixart, dims(3, 8)), &["sample_size"], "attention_head_dim", "72 for {\"width\":1152}"),
        (Model::new(pixart, dims(16, 72)), &[], "sample_size", "positions are computed from it and not stored"),
        (Model::new(dit, dims(16, 72)), &["_class_name"], "sample_size", "positions are computed from it"),
        (
            Model::new(dit, dims(3, 8)),
            &["_class_name", "sample_size"],
            "attention_head_dim",
            "no tensor shows the heads",
        ),
        (Model::new(minrf, dims(8, 32)), &[], "n_heads", "no tensor shows the heads"),
        (Model::new(minrf, dims(32, 8)), &[], "n_heads", "4 for {\"dim\":64}, 16 for {\"dim\":512}"),
    ] {
        let source = model.canonical();
        let error = detect(&source, Some(&only(&model.config, declared)), &Hints::default()).unwrap_err();
        assert!(matches!(error, LayoutError::Ambiguous { .. }), "{error:?}");
        let message = error.to_string();
        for expected in [&format!("{key:?} cannot be determined"), why, "pass the model's config.json with --config"] {
            assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
        }
        model.open(&source).1.require_complete().unwrap();
    }
    let other = json!({ "_class_name": "FluxTransformer2DModel" });
    let error = detect(&Model::new(sd3, dims(2, 32)).canonical(), Some(&other), &Hints::default()).unwrap_err();
    assert!(error.to_string().contains("config.json is for the class \"FluxTransformer2DModel\""), "{error}");
}

#[test]
fn published_heads_are_assumed_and_reported() {
    for (family, heads, head_dim, key, assumed) in [
        ("dit", 16, 72, "num_attention_heads", "attention_head_dim 72"),
        ("dit", 16, 64, "num_attention_heads", "attention_head_dim 64"),
        ("dit", 12, 64, "num_attention_heads", "attention_head_dim 64"),
        ("sit", 6, 64, "num_attention_heads", "attention_head_dim 64"),
        ("pixart", 16, 72, "num_attention_heads", "attention_head_dim 72"),
        ("minrf", 4, 16, "n_heads", "n_heads 4"),
        ("minrf", 16, 32, "n_heads", "n_heads 16"),
    ] {
        let model = Model::new(family, Dims { heads, head_dim, depth: 1, ..SMALL });
        let source = model.canonical();
        let declared = only(&model.config, &["_class_name", "sample_size"]);
        let identified = detect(&source, Some(&declared), &Hints::default()).unwrap();
        assert_eq!(identified.config[key], heads, "{family}");
        let note = format!("{assumed} is assumed, as in the published models");
        assert!(identified.notes.contains(&note), "{:?} does not have {note:?}", identified.notes);
    }
}

/// The position embeddings of the original layout are not used, but they show the sample size.
#[test]
fn stored_position_embeddings_show_the_sample_size() {
    for family in ["dit", "pixart", "sit"] {
        let model = Model::new(family, Dims { heads: 16, head_dim: 72, depth: 1, ..SMALL });
        let mut source = model.foreign("original");
        source.put("pos_embed", &[1, 1024, 1152]);
        if family == "pixart" {
            source.put("y_embedder.y_embedding", &[120, 11]);
        }
        let hints = Hints { family: Some(family.to_owned()), ..Hints::default() };
        let identified = detect(&source, None, &hints).unwrap();
        assert_eq!(identified.config["sample_size"], 64, "{family}");
        let canonical = identified.canonical(&source).require_complete().unwrap();
        let skipped: Vec<&str> = canonical.load_report().skipped().map(|(name, _)| name).collect();
        assert_eq!(skipped.len(), if family == "pixart" { 2 } else { 1 });
        assert_eq!(canonical.tensors(), model.canonical().tensors());
        let declared = detect(&source, Some(&model.config), &Hints::default()).unwrap();
        let problems = declared.canonical(&source).load_report().problems().join("\n");
        assert_eq!(problems, "\"sample_size\" is 16 in config.json, 64 from the shape of \"pos_embed\"");
        source.put("pos_embed", &[1, 1023, 1152]);
        let error = detect(&source, None, &hints).unwrap_err().to_string();
        assert!(
            error.contains("\"sample_size\" cannot be determined") && error.contains("do not give a whole number"),
            "{error}"
        );
    }
}

/// Sigma's smallest model differs from alpha's only in the empty caption, and computes its position embeddings
/// differently.
#[test]
fn empty_captions_distinguish_pixart_sigma_from_alpha() {
    for (side, tokens, variant, interpolation) in [
        (32, 120, "pixart-alpha", json!(null)),
        (32, 300, "pixart-sigma", json!(0.5)),
        (64, 300, "pixart-sigma", json!(null)),
        (128, 300, "pixart-sigma", json!(null)),
    ] {
        let mut source = published("pixart-sigma").foreign("original");
        source.put("pos_embed", &[1, side * side / 4, 1152]);
        source.put("y_embedder.y_embedding", &[tokens, 4096]);
        let identified = detect(&source, None, &Hints::default()).unwrap();
        assert_eq!(identified.variant.name, variant, "{side} {tokens}");
        assert_eq!(identified.config["interpolation_scale"], interpolation, "{side} {tokens}");
        assert_eq!(identified.variant.defaults.text_tokens, tokens);
    }
}

/// Without the empty caption, the scale of positions tells Sigma's smallest model, or the pipeline, or the user.
#[test]
fn the_smallest_pixart_sigma_is_told_or_asked_about() {
    let model = published("pixart-sigma");
    let source = model.canonical();
    let authors = model.foreign("original");
    let stated = |variant: Option<&str>, pipeline: Option<&str>| Hints {
        variant: variant.map(str::to_owned),
        pipeline: pipeline.map(str::to_owned),
        ..Hints::default()
    };
    let asks = "choose another with --variant pixart-sigma";
    for (scale, hints, variant, tokens, note) in [
        (json!(null), Hints::default(), "pixart-alpha", 120, asks),
        (json!(1), Hints::default(), "pixart-alpha", 120, asks),
        (json!(0.5), Hints::default(), "pixart-sigma", 300, ""),
        (json!(null), stated(None, Some("PixArtSigmaPipeline")), "pixart-sigma", 300, ""),
        (json!(null), stated(None, Some("PixArtAlphaPipeline")), "pixart-alpha", 120, ""),
        (json!(null), stated(Some("pixart-sigma"), None), "pixart-sigma", 300, ""),
        (json!(null), stated(Some("pixart-alpha"), Some("PixArtSigmaPipeline")), "pixart-alpha", 120, ""),
    ] {
        let mut config = model.config.clone();
        config["sample_size"] = 32.into();
        config["interpolation_scale"] = scale.clone();
        let found = detect(&source, Some(&config), &hints).unwrap();
        let case = format!("{scale} {hints:?}: {:?}", found.notes);
        assert_eq!((found.variant.name.as_str(), found.variant.defaults.text_tokens), (variant, tokens), "{case}");
        let ambiguity = found.notes.iter().find(|note| note.contains("--variant")).map_or("", String::as_str);
        assert!(ambiguity.contains(note) && ambiguity.is_empty() == note.is_empty(), "{case}");
        assert_eq!(found.config["interpolation_scale"], scale, "{case}");
        let of_authors = json!({ "sample_size": 32 });
        let found = detect(&authors, Some(&of_authors), &hints).unwrap();
        let expected = if found.variant.name == "pixart-sigma" { json!(0.5) } else { Value::Null };
        assert_eq!(found.config["interpolation_scale"], expected, "{case}");
    }
}

/// DiT and SiT have the same tensors.
#[test]
fn dit_and_sit_are_distinguished_by_class_or_by_hint() {
    let numerics = |identified: &Identified| {
        (identified.config["norm_eps"].as_f64().unwrap(), identified.config["downscale_freq_shift"].as_u64().unwrap())
    };
    let model = Model::new("dit", Dims { heads: 16, head_dim: 72, depth: 1, ..SMALL });
    for (layout, class, hint, family, expected) in [
        ("diffusers", "DiTTransformer2DModel", None, "dit", (1e-5, 1)),
        ("diffusers", "Transformer2DModel", None, "dit", (1e-5, 1)),
        ("original", "DiTTransformer2DModel", None, "dit", (1e-6, 0)),
        ("diffusers", "SiTTransformer2DModel", None, "sit", (1e-6, 0)),
        ("original", "SiTTransformer2DModel", None, "sit", (1e-6, 0)),
        ("original", "", Some("sit"), "sit", (1e-6, 0)),
        ("diffusers", "DiTTransformer2DModel", Some("sit"), "sit", (1e-6, 0)),
        ("diffusers", "", Some("dit"), "dit", (1e-5, 1)),
    ] {
        let source = model.foreign(layout);
        let mut config = json!({ "sample_size": 32 });
        if !class.is_empty() {
            config["_class_name"] = class.into();
        }
        let hints = Hints { family: hint.map(str::to_owned), ..Hints::default() };
        let identified = detect(&source, Some(&config), &hints).unwrap();
        assert_eq!((identified.family.as_str(), numerics(&identified)), (family, expected), "{layout} {class}");
        let name = if family == "dit" { "DiTTransformer2DModel" } else { "SiTTransformer2DModel" };
        assert_eq!(identified.config["_class_name"], name);
        identified.canonical(&source).require_complete().unwrap();
        let again = detect(&model.canonical(), Some(&identified.config), &Hints::default()).unwrap();
        assert_eq!((again.config, again.family), (identified.config, identified.family));
    }
    let unknown = json!({ "_class_name": "HunyuanDiT2DModel", "sample_size": 32 });
    let error = detect(&model.canonical(), Some(&unknown), &Hints::default()).unwrap_err();
    assert!(error.to_string().contains("choose with --family"), "{error}");
    let declared = json!({ "_class_name": "DiTTransformer2DModel", "sample_size": 32, "norm_eps": 3e-4 });
    let identified = detect(&model.foreign("original"), Some(&declared), &Hints::default()).unwrap();
    assert_eq!(numerics(&identified), (3e-4, 0));
}

#[test]
fn the_old_class_of_diffusers_is_pixart_or_dit_by_the_tensors() {
    for family in ["dit", "pixart"] {
        let mut model = Model::new(family, SMALL);
        let class = model.config["_class_name"].clone();
        model.config["_class_name"] = "Transformer2DModel".into();
        for key in ["use_additional_conditions", "interpolation_scale", "out_channels"] {
            model.config[key] = Value::Null;
        }
        let source = Model::new(family, SMALL).canonical();
        let (identified, canonical) = model.open(&source);
        assert_eq!((&identified.config["_class_name"], identified.family.as_str()), (&class, family));
        assert_eq!(identified.config["out_channels"], 8);
        canonical.require_complete().unwrap();
    }
}

#[test]
fn a_declared_interpolation_scale_is_used_and_else_left_to_the_class() {
    let model = Model::new("pixart", SMALL);
    let source = model.canonical();
    assert_eq!(model.open(&source).0.config["interpolation_scale"], Value::Null);
    let mut config = model.config.clone();
    config["interpolation_scale"] = json!(0.5);
    let identified = detect(&source, Some(&config), &Hints::default()).unwrap();
    assert_eq!(identified.config["interpolation_scale"], 0.5);
}

#[test]
fn config_json_is_compared_with_the_tensors() {
    for (family, key, value, expected) in [
        (
            "sd3",
            "qk_norm",
            json!("layer_norm"),
            "\"qk_norm\" is \"layer_norm\" in config.json, \"rms_norm\" from the tensor",
        ),
        (
            "sd3",
            "dual_attention_layers",
            json!([0]),
            "\"dual_attention_layers\" is [0] in config.json, [0,2] from the numbers",
        ),
        ("sd3", "dual_attention_layers", json!("x"), "\"dual_attention_layers\" is \"x\" in config.json, [0,2]"),
        ("sd3", "pos_embed_max_size", json!(6), "\"pos_embed_max_size\" is 6 in config.json, 5 from the shape of"),
        ("sd3", "out_channels", json!(4), "\"out_channels\" is 4 in config.json, 5 from the shape of \"proj_out"),
        ("pixart", "use_additional_conditions", json!(false), "is false in config.json, true from the tensor"),
        (
            "pixart",
            "num_attention_heads",
            json!(4),
            "\"num_attention_heads\" is 4 in config.json, 3 from width / attention",
        ),
        ("pixart", "_class_name", json!("SiTTransformer2DModel"), "\"_class_name\" is \"SiTTransformer2DModel\""),
        ("dit", "num_embeds_ada_norm", json!(11), "\"num_embeds_ada_norm\" is 11 in config.json, 10 from the shape of"),
        (
            "minrf",
            "patch_size",
            json!(4),
            "\"patch_size\" is 4 in config.json, 2 from the shape of \"x_embedder.weight\"",
        ),
        ("minrf", "n_layers", json!(4), "tensor \"layers.3.attention.wq.weight\" is missing"),
    ] {
        let mut model = Model::new(family, SMALL);
        let source = model.canonical();
        model.config[key] = value;
        let problems = model.open(&source).1.load_report().problems().join("\n");
        assert!(problems.contains(expected), "{key}: {problems:?} does not contain {expected:?}");
    }
}

#[test]
fn absurd_values_in_config_json_are_reported() {
    let absurd = [json!(u64::MAX), json!(-1), json!(1e300), json!([]), json!({}), json!("x"), json!(true)];
    for family in ["dit", "minrf", "pixart", "sd3"] {
        let model = Model::new(family, SMALL);
        let source = model.canonical();
        for key in model.config.as_object().unwrap().keys() {
            for value in &absurd {
                let float = ["norm_eps", "interpolation_scale"].contains(&key.as_str());
                let fits = *value == model.config[key] || (float && value.as_f64().is_some_and(|number| number > 0.0));
                let mut config = model.config.clone();
                config[key] = value.clone();
                let wrong = match detect(&source, Some(&config), &Hints::default()) {
                    Ok(identified) => {
                        let canonical = identified.canonical(&source);
                        let _ = Inspection::new(&identified, &canonical).to_string();
                        !canonical.load_report().is_complete()
                    }
                    Err(error) => matches!(error, LayoutError::Ambiguous { .. }),
                };
                assert_eq!(wrong, !fits, "{family} {key} {value}");
            }
        }
    }
}

#[test]
fn a_list_of_more_blocks_than_any_model_has_is_refused() {
    let mut model = Model::new("sd3", SMALL);
    let source = model.canonical();
    model.config["dual_attention_layers"] = vec![0; 10_001].into();
    let error = detect(&source, Some(&model.config), &Hints::default()).unwrap_err().to_string();
    assert!(error.ends_with("0, expected at most 10000 numbers; fix it") && error.len() < 250, "{error}");
}

#[test]
fn the_metadata_of_a_file_may_hold_the_config() {
    let model = Model::new("sit", SMALL);
    let source: Fake = model.foreign("original");
    let metadata = BTreeMap::from([("config".to_owned(), model.config.to_string())]);
    let sidecar = Sidecar { config: None, metadata: &metadata };
    let identified = detect_source(&source, sidecar, &manifests(), &Hints::default()).unwrap();
    assert_eq!((identified.family.as_str(), &identified.config), ("sit", &model.config));
}
