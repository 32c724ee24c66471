//! Models that are similar to a supported family are refused, and the error states why.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{Hints, LayoutError};
use common::models::{Model, SMALL};
use common::{Fake, detect};
use serde_json::json;

const SANA: &[&str] = &[
    "x_embedder.proj.weight",
    "t_block.1.weight",
    "y_embedder.y_proj.fc1.weight",
    "attention_y_norm.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.cross_attn.q_linear.weight",
    "blocks.0.cross_attn.kv_linear.weight",
    "blocks.0.mlp.inverted_conv.conv.weight",
    "final_layer.scale_shift_table",
];
const SANA_OF_DIFFUSERS: &[&str] = &[
    "scale_shift_table",
    "patch_embed.proj.weight",
    "time_embed.linear.weight",
    "caption_projection.linear_1.weight",
    "caption_norm.weight",
    "transformer_blocks.0.attn2.to_k.weight",
    "transformer_blocks.0.ff.conv_inverted.weight",
];

/// A model in a layout, with further tensors of another model.
fn with(family: &'static str, layout: &str, others: &[&str]) -> Fake {
    let mut source = Model::new(family, SMALL).foreign(layout);
    others.iter().for_each(|name| source.put(name, &[4, 4]));
    source
}

/// A model in a layout, without the tensors whose names contain `text`.
fn without(family: &'static str, layout: &str, text: &str) -> Fake {
    let mut source = Model::new(family, SMALL).foreign(layout);
    source.tensors.retain(|name, _| !name.contains(text));
    source
}

/// Two models in one file.
fn both(first: Fake, second: Fake) -> Fake {
    Fake { tensors: first.tensors.into_iter().chain(second.tensors).collect() }
}

#[test]
fn unsupported_models_are_named() {
    for (source, expected) in [
        (
            with("pixart", "original", &["blocks.0.mlp.inverted_conv.conv.weight"]),
            "Sana, whose attention is linear already",
        ),
        (with("pixart", "original", &["attention_y_norm.weight"]), "Sana, whose attention is linear already"),
        (
            with("pixart", "diffusers", &["transformer_blocks.0.ff.conv_inverted.weight"]),
            "Sana, whose attention is linear",
        ),
        (Fake::of(SANA), "there is nothing for CLEAR to make linear"),
        (Fake::of(SANA).with_prefix("model.diffusion_model."), "Sana, whose attention is linear already"),
        (Fake::of(SANA_OF_DIFFUSERS), "Sana, whose attention is linear already"),
        (Fake::of(SANA_OF_DIFFUSERS).with_prefix("transformer."), "Sana, whose attention is linear already"),
        (Fake::of(&["x_embedder.proj.weight", "mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight"]), "HunyuanDiT"),
        (Fake::of(&["pos_embed.proj.weight", "text_embedding_padding", "blocks.0.attn1.norm_q.bias"]), "HunyuanDiT"),
        (Fake::of(&["double_layers.0.attn.w2q.weight", "cond_seq_linear.weight", "positional_encoding"]), "AuraFlow"),
        (
            Fake::of(&["register_tokens", "pos_embed.pos_embed", "joint_transformer_blocks.0.attn.add_q_proj.weight"]),
            "AuraFlow",
        ),
        (with("sd3", "diffusers", &["controlnet_blocks.0.weight", "pos_embed_input.proj.weight"]), "a ControlNet"),
        (with("pixart", "original", &["controlnet.0.copied_block.attn.qkv.weight"]), "a ControlNet"),
        (Fake::of(&["transformer_blocks.0.attn1.to_q.lora_A.weight", "adaln_single.linear.lora_B.weight"]), "a LoRA"),
        (Fake::of(&["base_model.model.transformer_blocks.0.attn2.to_k.lora_A.default.weight"]), "a LoRA"),
        (Fake::of(&["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"]), "a LoRA"),
        (
            with("sd3", "comfy", &["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight"]),
            "a model with scaled weights",
        ),
        (with("pixart", "diffusers", &["transformer_blocks.0.attn1.to_q.weight.absmax"]), "bitsandbytes"),
        (with("sd3", "diffusers", &["transformer_blocks.0.attn.to_q.wscales"]), "SVDQuant"),
        (without("minrf", "original", "y_embedder"), "minrf in layout original: 4 of 5 signature tensors"),
        (both(Fake::of(&["cap_embedder.0.weight"]), without("minrf", "original", "init_conv")), "Lumina 2"),
        (
            Fake::of(&[
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
                "time_embedding.linear_1.bias",
            ]),
            "U-Net",
        ),
        (
            with("dit", "diffusers", &["adaln_single.linear.weight"]),
            "it has \"adaln_single.linear.weight\", which belongs",
        ),
        (
            with("dit", "original", &["blocks.0.cross_attn.q_linear.weight"]),
            "it has \"blocks.0.cross_attn.q_linear.weight\", which belongs to another model",
        ),
        (with("sit", "original", &["blocks.0.mlp.w12.weight"]), "it has \"blocks.0.mlp.w12.weight\", which belongs"),
        (with("sd3", "original", &["double_blocks.0.img_attn.qkv.weight"]), "which belongs to another model"),
        (with("sd3", "diffusers", &["single_transformer_blocks.0.attn.to_q.weight"]), "which belongs to another model"),
        (with("minrf", "original", &["noise_refiner.0.attention.qkv.weight"]), "which belongs to another model"),
    ] {
        let error = detect(&source, None, &Hints::default()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
        let ambiguous = expected.starts_with("minrf");
        assert_eq!(matches!(error, LayoutError::Ambiguous { .. }), ambiguous, "{message}");
    }
}

/// A file that fits several families is never taken for one of them.
#[test]
fn several_families_that_fit_are_listed() {
    for (source, families) in [
        (with("dit", "original", &[]), ["dit", "sit"]),
        (with("sit", "diffusers", &[]), ["dit", "sit"]),
        (without("dit", "original", "embedding_table"), ["dit", "sit"]),
        (without("dit", "diffusers", "embedding_table"), ["dit", "sit"]),
        (both(with("sd3", "original", &[]), with("minrf", "original", &[])), ["minrf", "sd3"]),
        (both(with("sd3", "comfy", &[]), with("dit", "original", &[])), ["sd3", "sit"]),
        (both(with("pixart", "diffusers", &[]), with("minrf", "original", &[])), ["minrf", "pixart"]),
    ] {
        let error = detect(&source, None, &Hints::default()).unwrap_err();
        assert!(matches!(error, LayoutError::Ambiguous { .. }), "{error:?}");
        let message = error.to_string();
        assert!(families.iter().all(|family| message.contains(&format!("{family:?}"))), "{message}");
        assert!(message.contains("--family"), "{message}");
    }
}

#[test]
fn a_missing_class_table_is_reported_or_its_size_required() {
    let config = Model::new("dit", SMALL).config;
    let mut without_classes = config.clone();
    without_classes["num_embeds_ada_norm"] = json!(null);
    let source = without("dit", "original", "embedding_table");
    let error = detect(&source, Some(&without_classes), &Hints::default()).unwrap_err().to_string();
    for expected in
        ["\"num_embeds_ada_norm\" cannot be determined", "missing [\"y_embedder.embedding_table.weight\"]", "--config"]
    {
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
    let identified = detect(&source, Some(&config), &Hints::default()).unwrap();
    let problems = identified.canonical(&source).load_report().problems().join("\n");
    assert!(problems.contains("tensor \"y_embedder.embedding_table.weight\" is missing"), "{problems}");
}

/// The whole signature of a layout, and a tensor that no such model has.
#[test]
fn further_tensors_of_a_complete_model_are_reported() {
    for (family, layout, name) in [
        ("flux", "diffusers", "pos_embed.pos_embed"),
        ("sd3", "diffusers", "transformer_blocks.1.attn2.to_q.weight"),
        ("sd3", "diffusers", "transformer_blocks.2.attn.to_add_out.weight"),
        ("sd3", "original", "joint_blocks.2.context_block.mlp.fc1.weight"),
        ("sd3", "original", "joint_blocks.1.context_block.attn3.ln_q.weight"),
        ("pixart", "original", "blocks.0.attn.sr.weight"),
        ("pixart", "diffusers", "transformer_blocks.0.norm1.linear.weight"),
        ("minrf", "original", "layers.0.attention.wq.bias"),
    ] {
        let source = with(family, layout, &[name]);
        let (_, canonical) = Model::new(family, SMALL).open(&source);
        let problems = canonical.load_report().problems().join("\n");
        assert!(problems.contains(&format!("{name:?}")), "{name}: {problems}");
        assert!(matches!(canonical.require_complete(), Err(LayoutError::Incomplete(_))), "{name}");
    }
}
