//! AutoencoderKL, CLIP, T5 and their tokenizers, compared with diffusers and transformers, in the file formats of
//! transformers 4 and 5. fixtures/components/export.py describes the fixtures.
#![allow(clippy::unwrap_used)]

mod support;

use clearform_models::text::{ClipConfig, ClipText, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer};
use clearform_models::vae::{Autoencoder, AutoencoderKl, AutoencoderTiny, TinyConfig, VaeConfig, VaePrecision};
use clearform_testkit::seeded;
use serde_json::Value;
use std::ops::ControlFlow;
use support::{assert_close, bytes, json, tensors, weights};

const BOUND: f64 = 1e-4;

#[test]
fn vae_with_quant_convs() {
    check_vae("vae-quant");
}

#[test]
fn vae_of_flux() {
    check_vae("vae-flux");
}

#[test]
fn vae_without_attention() {
    check_vae("vae-plain");
}

/// diffusers before 0.18 used other names for a VAE's attention. It still reads such files.
#[test]
fn vae_with_older_names() {
    let folder = "components/generation5/vae-quant";
    let older_name = |name: &str| {
        let names = [("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")];
        names.iter().fold(name.to_owned(), |name, (newer, older)| name.replace(newer, older))
    };
    let source = weights(&format!("{folder}/diffusion_pytorch_model.safetensors"));
    let renamed: clearform_weights::InMemoryTensors =
        source.iter().map(|(name, tensor)| (older_name(name), tensor.clone())).collect();
    assert!(renamed.iter().any(|(name, _)| name.ends_with("attentions.0.query.weight")));
    let config = VaeConfig::new(&json(&format!("{folder}/config.json"))).unwrap();
    let vae = AutoencoderKl::build(config, &renamed, VaePrecision::F32).unwrap();
    let expected = tensors(&format!("{folder}/expected.safetensors"));
    assert_close(&vae.decode(&expected["latents"]).unwrap(), &expected["decoded"], BOUND, "decoded");
}

/// In both directions, the encoder's other convolutions included.
#[test]
fn vae_with_products_of_bf16() {
    let folder = "components/generation5/vae-flux";
    let config = VaeConfig::new(&json(&format!("{folder}/config.json"))).unwrap();
    let weights = weights(&format!("{folder}/diffusion_pytorch_model.safetensors"));
    let vae = AutoencoderKl::build(config, &weights, VaePrecision::Bf16).unwrap();
    let expected = tensors(&format!("{folder}/expected.safetensors"));
    assert_close(&vae.encode(&expected["pictures"], None).unwrap(), &expected["latents"], 3e-2, "latents");
    assert_close(&vae.decode(&expected["latents"]).unwrap(), &expected["decoded"], 3e-2, "decoded");
}

fn check_vae(name: &str) {
    let vae = vae(name);
    let expected = tensors(&format!("components/generation5/{name}/expected.safetensors"));
    let [mean, log_variance] = vae.moments(&expected["pictures"], None).unwrap();
    assert_close(&mean, &expected["mean"], BOUND, "mean");
    assert_close(&log_variance, &expected["logvar"], BOUND, "log-variance");
    assert_close(&vae.encode(&expected["pictures"], None).unwrap(), &expected["latents"], BOUND, "latents");
    assert_close(&vae.decode(&expected["latents"]).unwrap(), &expected["decoded"], BOUND, "decoded");
}

#[test]
fn clip_with_prefix_and_legacy_end_token() {
    check_clip("generation4");
}

#[test]
fn clip_without_prefix() {
    check_clip("generation5");
}

fn check_clip(generation: &str) {
    let folder = format!("components/{generation}/text_encoder");
    let config = ClipConfig::new(&json(&format!("{folder}/config.json"))).unwrap();
    let clip = ClipText::build(config, &weights(&format!("{folder}/model.safetensors"))).unwrap();
    let expected = tensors(&format!("{folder}/expected.safetensors"));
    let encoded = clip.encode(&expected["ids"]).unwrap();
    assert_close(&encoded.hidden, &expected["hidden"], BOUND, "hidden");
    assert_close(&encoded.pooled, &expected["pooled"], BOUND, "pooled");
    let too_large = (&expected["ids"] + 10_000.0).unwrap();
    assert!(clip.encode(&too_large).unwrap_err().to_string().contains("use this encoder's tokenizer"));
}

#[test]
fn t5_with_gated_gelu() {
    check_t5("generation4");
}

#[test]
fn t5_with_relu() {
    check_t5("generation5");
}

fn check_t5(generation: &str) {
    let folder = format!("components/{generation}/text_encoder_2");
    let config = T5Config::new(&json(&format!("{folder}/config.json"))).unwrap();
    let t5 = T5Encoder::build(config, &weights(&format!("{folder}/model.safetensors"))).unwrap();
    let expected = tensors(&format!("{folder}/expected.safetensors"));
    assert_close(&t5.encode(&expected["ids"], None).unwrap(), &expected["hidden"], BOUND, "hidden");
}

#[test]
fn t5_finds_its_embedding_under_both_names() {
    let folder = "components/generation4/text_encoder_2";
    let stored = weights(&format!("{folder}/model.safetensors"));
    let expected = tensors(&format!("{folder}/expected.safetensors"));
    let embedding = stored.iter().find(|(name, _)| *name == "shared.weight").unwrap().1.clone();
    let others: Vec<_> = stored.iter().filter(|(_, tensor)| tensor.dims() != embedding.dims()).collect();
    for name in ["shared.weight", "encoder.embed_tokens.weight"] {
        let others = others.iter().map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone()));
        let source =
            others.chain([(name.to_owned(), embedding.clone())]).collect::<clearform_weights::InMemoryTensors>();
        let t5 = T5Encoder::build(T5Config::new(&json(&format!("{folder}/config.json"))).unwrap(), &source).unwrap();
        assert_close(&t5.encode(&expected["ids"], None).unwrap(), &expected["hidden"], BOUND, name);
    }
}

#[test]
fn clip_tokens_from_vocabulary_and_merges() {
    let file = |name: &str| bytes(&format!("components/generation4/tokenizer/{name}"));
    let config = file("tokenizer_config.json");
    let tokenizer = ClipTokenizer::from_vocabulary(&file("vocab.json"), &file("merges.txt"), Some(&config)).unwrap();
    assert_eq!(tokenizer.max_length(), Some(24));
    check_tokens("generation4", "clip", |prompt, length| tokenizer.encode(prompt, length).unwrap());
}

#[test]
fn clip_tokens_from_tokenizer_json() {
    let file = |name: &str| bytes(&format!("components/generation5/tokenizer/{name}"));
    let tokenizer = ClipTokenizer::from_json(&file("tokenizer.json"), Some(&file("tokenizer_config.json"))).unwrap();
    assert_eq!(tokenizer.max_length(), Some(24));
    check_tokens("generation5", "clip", |prompt, length| tokenizer.encode(prompt, length).unwrap());
}

#[test]
fn t5_tokens() {
    for generation in ["generation4", "generation5"] {
        let file = bytes(&format!("components/{generation}/tokenizer_2/tokenizer.json"));
        let tokenizer = T5Tokenizer::from_json(&file).unwrap();
        check_tokens(generation, "t5", |prompt, length| tokenizer.encode(prompt, length).unwrap());
    }
}

/// mini-flux has the same tokenizer in both formats. The library that wrote it adds no space before the first word.
#[test]
fn t5_tokens_from_a_sentencepiece_model() {
    let file = |name: &str| bytes(&format!("../../assets/mini-flux/base/tokenizer_2/{name}"));
    let from_json = T5Tokenizer::from_json(&file("tokenizer.json")).unwrap();
    let config = br#"{"add_prefix_space": false}"#;
    let from_model = T5Tokenizer::from_sentencepiece(&file("spiece.model"), Some(config)).unwrap();
    let tokens = json("components/generation4/tokens.json");
    for prompt in tokens["prompts"].as_array().unwrap().iter().map(|prompt| prompt.as_str().unwrap()) {
        assert_eq!(from_model.encode(prompt, 64).unwrap(), from_json.encode(prompt, 64).unwrap(), "{prompt}");
    }
}

fn check_tokens(generation: &str, kind: &str, encode: impl Fn(&str, usize) -> Vec<u32>) {
    let tokens = json(&format!("components/{generation}/tokens.json"));
    let length = tokens[format!("{kind}_length")].as_u64().unwrap() as usize;
    let rows = |key: &str| tokens[key].as_array().unwrap().clone();
    let prompts = rows("prompts");
    let expected = rows(kind);
    assert_eq!((prompts.len(), expected.len()), (200, 200));
    for (prompt, ids) in prompts.iter().zip(&expected) {
        let got: Vec<Value> = encode(prompt.as_str().unwrap(), length).into_iter().map(Value::from).collect();
        assert_eq!(&got, ids.as_array().unwrap(), "{prompt}");
    }
}

fn vae(name: &str) -> AutoencoderKl {
    let folder = format!("components/generation5/{name}");
    let config = VaeConfig::new(&json(&format!("{folder}/config.json"))).unwrap();
    AutoencoderKl::build(config, &weights(&format!("{folder}/diffusion_pytorch_model.safetensors")), VaePrecision::F32)
        .unwrap()
}

fn tiny_vae() -> AutoencoderTiny {
    let folder = "components/generation5/vae-tiny";
    let config = TinyConfig::new(&json(&format!("{folder}/config.json"))).unwrap();
    AutoencoderTiny::build(
        config,
        &weights(&format!("{folder}/diffusion_pytorch_model.safetensors")),
        VaePrecision::F32,
    )
    .unwrap()
}

#[test]
fn tiny_autoencoder() {
    let vae = tiny_vae();
    let expected = tensors("components/generation5/vae-tiny/expected.safetensors");
    assert_close(&vae.encode(&expected["pictures"], None).unwrap(), &expected["latents"], BOUND, "latents");
    let decoded = vae.decode(&expected["latents"]).unwrap();
    assert_close(&decoded, &expected["decoded"], BOUND, "decoded");
    let latents = seeded("latents", &[2, 16, 25, 31], "tiles/");
    let whole = vae.decode(&latents).unwrap();
    for tile in [4, 7, 24] {
        let tiled = vae.decode_in_tiles(&latents, tile, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
        assert_close(&tiled, &whole, 1e-5, "tiles");
    }
    let cancelled = vae.decode_in_tiles(&latents, 24, &mut |_| ControlFlow::Break(())).unwrap();
    assert!(cancelled.is_none());
    let images = seeded("images", &[2, 3, 200, 248], "tiles/");
    let whole = vae.encode(&images, None).unwrap();
    for tile in [4, 7, 24] {
        assert_close(&vae.encode(&images, Some(tile)).unwrap(), &whole, 1e-5, "latents in tiles");
    }
}

/// Several tiles in each direction, the last of them cut.
#[test]
fn tiles_are_parts_of_the_image() {
    for name in ["vae-quant", "vae-flux", "vae-plain"] {
        let vae = vae(name);
        let latents = seeded("latents", &[1, vae.config().latent_channels, 50, 61], "tiles/");
        let mut seen = Vec::new();
        let tiled = vae.decode_in_tiles(&latents, 24, &mut |progress| {
            seen.push((progress.done, progress.total));
            ControlFlow::Continue(())
        });
        assert_close(&tiled.unwrap().unwrap(), &vae.decode(&latents).unwrap(), 1e-5, name);
        assert_eq!(seen, (1..=9).map(|done| (done, 9)).collect::<Vec<_>>());
        let cancelled = vae.decode_in_tiles(&latents, 24, &mut |_| ControlFlow::Break(())).unwrap();
        assert!(cancelled.is_none());
        let [height, width] = [50, 61].map(|edge| edge * vae.config().downscale());
        let image = seeded("images", &[1, 3, height, width], "tiles/");
        assert_close(&vae.encode(&image, Some(24)).unwrap(), &vae.encode(&image, None).unwrap(), 1e-5, name);
    }
}
