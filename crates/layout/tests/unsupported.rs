//! Unsupported models are named, and for unknown ones the error lists the nearest layouts.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{Hints, LayoutError};
use clearform_weights::Dtype;
use common::{Fake, TINY, detect};
use serde_json::json;

fn message(source: &Fake) -> String {
    let error = detect(source, None, &Hints::default()).unwrap_err();
    assert!(matches!(error, LayoutError::Unsupported { .. } | LayoutError::Unknown { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn known_models_adapters_and_components_are_named() {
    let cases: &[(&str, &[&str])] = &[
        ("LoRA", &["transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.x.lora_B.weight"]),
        ("LoRA", &["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]),
        (
            "LoRA",
            &["double_blocks.0.processor.qkv_lora1.down.weight", "single_blocks.0.processor.qkv_lora.down.weight"],
        ),
        ("LoRA", &["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"]),
        ("ControlNet", &["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"]),
        ("IP-Adapter", &["ip_adapter_proj_model.proj.weight"]),
        (
            "CLEAR attention patch",
            &["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"],
        ),
        ("Chroma", &["distilled_guidance_layer.in_proj.bias", "double_blocks.0.img_attn.qkv.weight"]),
        ("FLUX.2", &["single_stream_modulation.lin.weight", "img_in.weight"]),
        ("Qwen-Image", &["txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"]),
        ("CLEAR attention patch", &["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn2.to_q.weight"]),
        (
            "CLEAR attention patch",
            &["transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn1.to_out.0.bias"],
        ),
        ("CLEAR attention patch", &["layers.0.attention.wq.weight"]),
        ("HunyuanVideo", &["context_embedder.token_refiner.refiner_blocks.0.norm1.weight", "x_embedder.proj.weight"]),
        ("U-Net", &["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"]),
        ("a VAE", &["decoder.conv_in.weight", "encoder.conv_in.weight"]),
        ("T5 text encoder", &["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"]),
        ("T5 text encoder", &["enc.blk.0.attn_q.weight", "token_embd.weight"]),
        ("CLIP text encoder", &["transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight"]),
        ("a language model", &["blk.0.attn_q.weight", "token_embd.weight"]),
        ("MLX", &["transformer_blocks.0.attn.to_q.scales", "transformer_blocks.0.attn.to_q.biases"]),
        ("mxfp4", &["layers.0.mlp.down_proj_blocks", "layers.0.mlp.down_proj_scales"]),
        ("CLIP text encoder", &["text_model.embeddings.token_embedding.weight"]),
    ];
    for (expected, names) in cases {
        let message = message(&Fake::of(names));
        assert!(message.contains(expected), "{names:?}: {message:?} does not contain {expected:?}");
    }
}

#[test]
fn a_quantised_flux_is_not_taken_for_an_unquantised_one() {
    for (expected, marker) in [
        ("scaled weights", "double_blocks.0.img_attn.qkv.scale_weight"),
        ("scaled weights", "scaled_fp8"),
        ("scaled by blocks", "double_blocks.0.img_attn.qkv.weight_scale_inv"),
        ("nvfp4", "double_blocks.0.img_attn.qkv.weight_scale_2"),
        ("bitsandbytes", "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"),
        ("SVDQuant", "transformer_blocks.0.attn.to_q.wscales"),
        ("GPTQ", "double_blocks.0.img_attn.qkv.qweight"),
        ("SDNQ", "double_blocks.0.img_attn.qkv.zero_point"),
        ("SDNQ", "double_blocks.0.img_attn.qkv.scale"),
        ("SDNQ", "double_blocks.0.img_attn.qkv.svd_up"),
        ("quanto", "double_blocks.0.img_attn.qkv.weight._data"),
        ("torchao", "double_blocks.0.img_attn.qkv.weight:qdata"),
    ] {
        let mut source = TINY.foreign("bfl");
        source.put(marker, &[1]);
        let message = message(&source);
        assert!(message.contains(expected) && message.contains("use the bf16"), "{marker}: {message}");
    }
}

/// A quantised model may have the names of the plain one; its config.json says what it is.
#[test]
fn a_quantised_model_is_named_by_its_config() {
    let mut source = TINY.diffusers();
    let mut config = TINY.config();
    config["quantization_config"] = json!({ "quant_method": "sdnq" });
    assert!(detect(&source, Some(&config), &Hints::default()).is_ok(), "its weights are plain");
    let name = "transformer_blocks.0.attn.to_q.weight";
    source.tensors.get_mut(name).unwrap().dtype = Dtype::I8;
    let error = detect(&source, Some(&config), &Hints::default()).unwrap_err().to_string();
    assert!(error.contains("quantised with \"sdnq\"") && error.contains(name) && error.contains("I8"), "{error}");
}

#[test]
fn errors_on_unknown_models_list_the_nearest_layouts() {
    let message = message(&Fake::of(&["img_in.weight", "a", "b", "c"]));
    assert!(message.contains("flux in layout bfl: 1 of 3 signature tensors"), "{message}");
    assert!(message.contains("single_blocks.0.linear1.weight"), "{message}");
    assert!(self::message(&Fake::of(&["a"])).contains("nearest: none"));
    assert!(self::message(&Fake::default()).contains("nearest: none"));
}
