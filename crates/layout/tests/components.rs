//! VAEs and text encoders: their names and sizes compared with diffusers and transformers, and as components in the
//! file of a transformer.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{
    CanonicalSource, EmbeddedComponent, Hints, Identified, LayoutError, Manifests, Sidecar, TensorOutcome,
    detect_source,
};
use clearform_weights::TensorSource;
use common::models::{Model, SMALL};
use common::{Fake, Flux, TINY, detect};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/component_shapes").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn shape(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).unwrap()
}

fn recognise(kind: &str, source: &Fake, config: &Value) -> Result<Identified, LayoutError> {
    let hints = Hints { family: Some(kind.to_owned()), ..Hints::default() };
    let sidecar = Sidecar { config: Some(config), metadata: &BTreeMap::new() };
    detect_source(source, sidecar, &Manifests::components().unwrap(), &hints)
}

/// `found` and `expected` agree in `keys` and in every other key that both have.
fn assert_agree(found: &Value, expected: &Value, keys: &[&str]) {
    for key in keys {
        assert_eq!(found[key], expected[key], "{key}");
    }
    for (key, value) in found.as_object().unwrap() {
        assert!(expected.get(key).is_none_or(|expected| expected == value), "{key}: {value}");
    }
}

/// Canonical names and shapes by the names of the authors.
type Canonically = BTreeMap<String, (String, Vec<usize>)>;

/// The VAEs of the fixture: (config.json, tensors under the authors' names, what becomes of those).
fn vaes() -> Vec<(Value, Fake, Canonically)> {
    let all = fixture("vae.json").as_array().unwrap().clone();
    let read = |case: Value| {
        let mut source = Fake::default();
        let mut canonical = BTreeMap::new();
        for line in case["tensors"].as_array().unwrap() {
            let name = line[0].as_str().unwrap();
            source.put(name, &shape(&line[1]));
            canonical.insert(name.to_owned(), (line[2].as_str().unwrap().to_owned(), shape(&line[3])));
        }
        (case["config"].clone(), source, canonical)
    };
    all.into_iter().map(read).collect()
}

/// The keys of a VAE's config that no tensor shows.
fn unseen_settings(config: &Value) -> Value {
    json!({ "norm_num_groups": config["norm_num_groups"], "scaling_factor": config["scaling_factor"] })
}

const VAE_KEYS: [&str; 8] = [
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "down_block_types",
    "up_block_types",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
];

#[test]
fn vaes_of_any_depth_are_mapped_as_diffusers_converts_them() {
    for (config, source, expected) in vaes() {
        let identified = recognise("vae", &source, &unseen_settings(&config)).unwrap();
        assert_eq!(
            (identified.layout.as_str(), identified.config["_class_name"].as_str()),
            ("ldm", Some("AutoencoderKL"))
        );
        assert_agree(&identified.config, &config, &VAE_KEYS);
        let canonical = identified.canonical(&source).require_complete().unwrap();
        assert_eq!(canonical.tensors().len(), expected.len());
        for (name, (canonical_name, shape)) in &expected {
            let mapped = canonical.read(canonical_name).unwrap();
            let bytes = source.read(name).unwrap().bytes;
            assert_eq!((&mapped.shape, mapped.bytes), (shape, bytes), "{name} as {canonical_name}");
        }
        let back = identified.to_layout("ldm", &canonical).unwrap();
        assert_eq!(back.tensors(), source.tensors());
        for name in source.tensors.keys() {
            assert_eq!(back.read(name).unwrap(), source.read(name).unwrap(), "{name}");
        }
        let plain = Fake::like(&canonical);
        let identified = recognise("vae", &plain, &unseen_settings(&config)).unwrap();
        assert_eq!(identified.layout, "diffusers");
        assert_agree(&identified.config, &config, &VAE_KEYS);
        assert_eq!(identified.canonical(&plain).require_complete().unwrap().tensors(), canonical.tensors());
    }
}

#[test]
fn every_lost_or_misshapen_tensor_of_a_vae_is_named() {
    for (config, source, _) in vaes() {
        for (name, info) in &source.tensors {
            let mut lost = source.clone();
            let mut wrong = source.clone();
            lost.tensors.remove(name);
            wrong.put(name, &[&info.shape[..], &[2]].concat());
            for damaged in [lost, wrong] {
                let message = match recognise("vae", &damaged, &unseen_settings(&config)) {
                    Ok(identified) => {
                        let canonical = identified.canonical(&damaged);
                        assert!(!canonical.load_report().is_complete(), "{name}");
                        canonical.load_report().problems().join("\n")
                    }
                    Err(error) => error.to_string(),
                };
                assert!(message.contains(name.as_str()), "{name}: {message}");
            }
        }
    }
}

#[test]
fn settings_that_no_tensor_of_a_vae_shows_are_required() {
    let (config, source, _) = vaes().swap_remove(1);
    for (key, reason) in
        [("norm_num_groups", "no tensor shows the groups"), ("scaling_factor", "not stored with the tensors")]
    {
        let mut config = unseen_settings(&config);
        config.as_object_mut().unwrap().remove(key);
        let error = recognise("vae", &source, &config).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains(reason) && error.contains("with --components"), "{error}");
    }
}

fn encoders(kind: &str) -> Vec<(Value, Fake)> {
    let all = fixture("text_encoders.json")[kind].as_array().unwrap().clone();
    let read = |case: Value| {
        let mut source = Fake::default();
        let tensors = case["tensors"].as_object().unwrap().iter();
        tensors.for_each(|(name, sizes)| source.put(name, &shape(sizes)));
        (case["config"].clone(), source)
    };
    all.into_iter().map(read).collect()
}

#[test]
fn t5_is_mapped_as_transformers_names_it() {
    let keys = [
        "architectures",
        "model_type",
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "feed_forward_proj",
        "layer_norm_epsilon",
        "pad_token_id",
        "eos_token_id",
    ];
    for (config, source) in encoders("t5") {
        let mut untied = source.clone();
        untied.tensors.remove("shared.weight");
        for (source, layout) in [(source, "transformers"), (untied, "tied")] {
            let identified = recognise("t5", &source, &json!({})).unwrap();
            assert_eq!(identified.layout, layout);
            assert_agree(&identified.config, &config, &keys);
            let canonical = identified.canonical(&source).require_complete().unwrap();
            assert!(canonical.info("encoder.embed_tokens.weight").is_none());
            let table = if layout == "tied" { "encoder.embed_tokens.weight" } else { "shared.weight" };
            assert_eq!(canonical.read("shared.weight").unwrap(), source.read(table).unwrap());
            assert_eq!(canonical.tensors().len(), if config["feed_forward_proj"] == "relu" { 19 } else { 21 });
        }
    }
}

#[test]
fn clip_is_mapped_as_transformers_names_it() {
    let unseen_settings =
        json!({ "num_attention_heads": 3, "hidden_act": "quick_gelu", "bos_token_id": 1, "eos_token_id": 2 });
    let keys =
        ["architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_norm_eps"];
    for (mut config, mut source) in encoders("clip") {
        config.as_object_mut().unwrap().extend(unseen_settings.as_object().unwrap().clone());
        let mut declared = unseen_settings.clone();
        declared["projection_dim"] = config["projection_dim"].clone();
        let tensors = source.tensors().len();
        source.put("text_model.embeddings.position_ids", &[1, 5]);
        let identified = recognise("clip", &source, &declared).unwrap();
        assert_agree(
            &identified.config,
            &config,
            &[&keys[..], &["projection_dim", "max_position_embeddings"]].concat(),
        );
        let canonical = identified.canonical(&source).require_complete().unwrap();
        let skipped: Vec<_> = canonical.load_report().skipped().collect();
        assert_eq!(skipped, [("text_model.embeddings.position_ids", "position ids, which are computed")]);
        assert_eq!(canonical.tensors().len(), tensors);
    }
    let (_, source) = encoders("clip").swap_remove(0);
    let error = recognise("clip", &source, &json!({})).unwrap_err().to_string();
    assert!(error.contains("num_attention_heads") && error.contains("with --components"), "{error}");
}

/// A text encoder of CLIP with the published vocabulary, `layers` layers and a projection of `projected` rows.
fn clip(width: usize, layers: usize, projected: Option<usize>) -> Fake {
    let mut source = Fake::default();
    source.put("text_model.embeddings.token_embedding.weight", &[49408, width]);
    source.put("text_model.embeddings.position_embedding.weight", &[77, width]);
    let mut layer = |name: String, shape: &[usize]| {
        source.put(&format!("{name}.weight"), shape);
        source.put(&format!("{name}.bias"), &shape[..1]);
    };
    for number in 0..layers {
        let block = format!("text_model.encoder.layers.{number}");
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            layer(format!("{block}.self_attn.{name}"), &[width, width]);
        }
        layer(format!("{block}.mlp.fc1"), &[4 * width, width]);
        layer(format!("{block}.mlp.fc2"), &[width, 4 * width]);
        ["layer_norm1", "layer_norm2"].iter().for_each(|name| layer(format!("{block}.{name}"), &[width]));
    }
    layer("text_model.final_layer_norm".to_owned(), &[width]);
    projected.into_iter().for_each(|rows| source.put("text_projection.weight", &[rows, width]));
    source
}

/// The VAE of FLUX and SD3 under the authors' names: the deepest of the fixture, 32 times as wide, without quant_conv.
fn published_vae() -> Fake {
    let (_, source, _) = vaes().swap_remove(2);
    let mut wide = Fake::default();
    for (name, info) in source.tensors.iter().filter(|(name, _)| !name.contains("quant_conv")) {
        let widened = |(axis, size): (usize, &usize)| match (axis, size) {
            (0, 8) if name.starts_with("encoder.conv_out.") => 32,
            (1, 4) if name == "decoder.conv_in.weight" => 16,
            (0, 4 | 8 | 16) | (1, 4 | 8 | 16) => 32 * size,
            _ => *size,
        };
        let shape: Vec<usize> = info.shape.iter().enumerate().map(widened).collect();
        wide.put(name, &shape);
    }
    wide
}

fn t5() -> Fake {
    encoders("t5").swap_remove(1).1
}

fn all_in_one(mut transformer: Fake, components: &[(&str, &Fake)]) -> Fake {
    for (prefix, component) in components {
        transformer.tensors.extend(component.with_prefix(prefix).tensors);
    }
    transformer
}

fn opened<'a>(file: &'a Fake, component: &EmbeddedComponent) -> (Value, CanonicalSource<impl TensorSource + use<'a>>) {
    let opened = component.open(file, None).unwrap();
    (opened.config, opened.tensors.require_complete().unwrap())
}

#[test]
fn the_components_of_flux_are_found_in_its_file() {
    let clip = clip(768, 2, Some(768));
    let t5 = t5();
    let vae = published_vae();
    let encoder = "text_encoders.clip_l.";
    let components = [
        ("text_encoders.clip_l.transformer.", &clip),
        ("text_encoders.t5xxl.transformer.", &t5),
        ("first_stage_model.", &vae),
    ];
    let mut file = all_in_one(TINY.foreign("comfy"), &components);
    file.put(&format!("{encoder}logit_scale"), &[]);
    let identified = detect(&file, Some(&TINY.config()), &Hints::default()).unwrap();
    let whole = identified.canonical(&file).require_complete().unwrap();
    assert_eq!(whole.tensors(), TINY.diffusers().tensors());
    assert!(whole.load_report().skipped().any(|(name, why)| name.ends_with("logit_scale") && why.contains("training")));
    let embedded = identified.components_in(&file);
    let names: Vec<(&str, &str)> = embedded.iter().map(|found| (found.name.as_str(), found.prefix.as_str())).collect();
    let [(clip_prefix, _), (t5_prefix, _), (vae_prefix, _)] = components;
    assert_eq!(names, [("text_encoder", clip_prefix), ("text_encoder_2", t5_prefix), ("vae", vae_prefix)]);

    let (config, tensors) = opened(&file, &embedded[0]);
    assert_eq!(config["architectures"], json!(["CLIPTextModel"]));
    assert_eq!(
        (&config["num_attention_heads"], &config["hidden_act"], &config["eos_token_id"]),
        (&12.into(), &"quick_gelu".into(), &49407.into())
    );
    let unused = TensorOutcome::Skipped { reason: "FLUX uses the pooled output without projection".to_owned() };
    assert_eq!(tensors.load_report().outcomes["text_projection.weight"], unused);
    assert_eq!(tensors.tensors().len(), clip.tensors.len() - 1);
    let name = "text_model.encoder.layers.1.mlp.fc1.weight";
    assert_eq!(tensors.read(name).unwrap(), file.read(&format!("{encoder}transformer.{name}")).unwrap());

    assert_eq!(opened(&file, &embedded[1]).0["feed_forward_proj"], "gated-gelu");
    let (config, tensors) = opened(&file, &embedded[2]);
    assert_eq!(config["block_out_channels"], json!([128, 256, 512, 512]));
    let settings =
        ["latent_channels", "norm_num_groups", "scaling_factor", "shift_factor"].map(|key| config[key].clone());
    assert_eq!(settings, [json!(16), json!(32), json!(0.3611), json!(0.1159)]);
    assert_eq!((&config["use_quant_conv"], &config["use_post_quant_conv"]), (&false.into(), &false.into()));
    assert_eq!(
        tensors.read("decoder.up_blocks.3.resnets.2.conv2.bias").unwrap().bytes,
        file.read("first_stage_model.decoder.up.0.block.2.conv2.bias").unwrap().bytes
    );
}

/// SD3 uses CLIP-L without projection, which diffusers stores as a projection by the identity; CLIP-G is projected.
#[test]
fn the_components_of_sd3_are_projected_as_in_training() {
    let model = Model::new("sd3", SMALL);
    let clip_l = clip(768, 2, Some(11));
    let clip_g = clip(1280, 2, Some(1280));
    let vae = published_vae();
    let components = [
        ("text_encoders.clip_l.transformer.", &clip_l),
        ("text_encoders.clip_g.transformer.", &clip_g),
        ("vae.", &vae),
    ];
    let file = all_in_one(model.foreign("comfy"), &components);
    let embedded = model.open(&file).0.components_in(&file);
    let names: Vec<&str> = embedded.iter().map(|component| component.name.as_str()).collect();
    assert_eq!(names, ["text_encoder", "text_encoder_2", "vae"]);
    let (config, tensors) = opened(&file, &embedded[0]);
    assert_eq!(config["architectures"], json!(["CLIPTextModelWithProjection"]));
    let identity = tensors.tensor("text_projection.weight").unwrap().to_dtype(candle_core::DType::F32).unwrap();
    let expected = candle_core::Tensor::eye(768, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    assert_eq!(identity.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    let (config, tensors) = opened(&file, &embedded[1]);
    assert_eq!((&config["hidden_act"], &config["num_attention_heads"]), (&"gelu".into(), &20.into()));
    let stored = file.read("text_encoders.clip_g.transformer.text_projection.weight").unwrap();
    assert_eq!(tensors.read("text_projection.weight").unwrap(), stored);
    let (config, _) = opened(&file, &embedded[2]);
    assert_eq!([&config["scaling_factor"], &config["shift_factor"]], [&json!(1.5305), &json!(0.0609)]);

    let mut without = file.clone();
    without.tensors.remove("text_encoders.clip_g.transformer.text_projection.weight");
    let component = embedded[1].open(&without, None).unwrap();
    assert_eq!(component.tensors.load_report().problems(), ["tensor \"text_projection.weight\" is missing"]);
}

#[test]
fn the_latent_scale_of_pixart_depends_on_the_variant() {
    let mut model = Model::new("pixart", SMALL);
    let vae = published_vae();
    let encoder = t5();
    for (conditions, size, expected) in [(true, 128, 0.18215), (false, 64, 0.18215), (false, 128, 0.13025)] {
        model.config["use_additional_conditions"] = conditions.into();
        model.config["sample_size"] = size.into();
        let components = [("vae.", &vae), ("text_encoders.t5xxl.transformer.", &encoder)];
        let file = all_in_one(model.foreign("original"), &components);
        let embedded = model.open(&file).0.components_in(&file);
        assert_eq!((embedded[0].name.as_str(), embedded.len()), ("text_encoder", 2));
        let config = opened(&file, &embedded[1]).0;
        assert_eq!((&config["scaling_factor"], &config["shift_factor"]), (&expected.into(), &Value::Null));
    }
}

#[test]
fn every_problem_of_a_component_is_reported() {
    let vae = published_vae();
    let whole = all_in_one(Flux { guidance: false, ..TINY }.foreign("comfy"), &[("vae.", &vae)]);
    let config = Flux { guidance: false, ..TINY }.config();
    for (name, shape, expected) in [
        ("vae.decoder.mid.attn_1.k.bias", None, "tensor \"decoder.mid.attn_1.k.bias\" is missing"),
        ("vae.decoder.up.1.block.0.nin_shortcut.weight", None, "up_blocks.2.resnets.0.conv_shortcut.weight"),
        ("vae.encoder.conv_in.bias", Some(&[5][..]), "has the wrong shape"),
        ("vae.encoder.strange.weight", Some(&[5]), "\"encoder.strange.weight\" is not understood"),
    ] {
        let mut file = whole.clone();
        file.tensors.remove(name);
        shape.into_iter().for_each(|shape| file.put(name, shape));
        let identified = detect(&file, Some(&config), &Hints::default()).unwrap();
        let component = identified.components_in(&file)[0].open(&file, None).unwrap();
        let problems = component.tensors.load_report().problems().join("\n");
        assert!(problems.contains(expected), "{problems}");
        assert!(matches!(component.tensors.require_complete(), Err(LayoutError::Incomplete(_))));
    }
}
