//! From prompt or class to picture against StableDiffusion3Pipeline, PixArtSigmaPipeline and DiTPipeline, stage by stage.
//! The models are put together here: configs from fixtures/pipelines, seeded weights, mini-flux's tokenizers.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::{ImageSize, Prompt};
use clearform_runtime::{Adapters, GenerateRequest, Pipeline, PipelineOptions, ReadOptions};
use clearform_sampling::denoise;
use clearform_testkit::assemble_pipeline;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use support::{assert_close, fixture, json, tensors};
use tempfile::TempDir;

/// Levels of 255 that a pixel may differ by.
const PIXEL_BOUND: u8 = 2;

#[test]
fn dit_pictures_are_those_of_diffusers() {
    let model = assemble("dit");
    check_picture("dit", &pipeline(model.path()));
    check_latents("dit", &pipeline(model.path()), &["0", "4"]);
}

#[test]
fn pixart_pictures_are_those_of_diffusers() {
    let model = assemble("pixart");
    let pipeline = pipeline(model.path());
    let (expected, request) = (expected("pixart"), request("pixart"));
    let encoded = pipeline.encode(&[request.prompt, request.negative.unwrap()]).unwrap();
    for (row, name) in ["", "negative_"].into_iter().enumerate() {
        let one = encoded.samples(row, 1).unwrap();
        let mask = &expected[&format!("{name}prompt_attention_mask")];
        assert_close(&one.text_mask.unwrap(), mask, 0.0, "mask");
        // Padding is hidden, so what diffusers computes of it does not count.
        let counted = |text: &Tensor| text.broadcast_mul(&mask.unsqueeze(2).unwrap()).unwrap();
        assert_close(&one.text.unwrap(), &counted(&expected[&format!("{name}prompt_embeds")]), 1e-5, "T5");
    }
    check_picture("pixart", &pipeline);
    check_latents("pixart", &pipeline, &["0", "4"]);
}

#[test]
fn sd3_pictures_are_those_of_diffusers() {
    let model = assemble("sd3");
    let pipeline_with = pipeline(model.path());
    let (expected, request) = (expected("sd3"), request("sd3"));
    let encoded = pipeline_with.encode(&[request.prompt.clone(), request.negative.clone().unwrap()]).unwrap();
    for (row, name) in ["", "negative_"].into_iter().enumerate() {
        let one = encoded.samples(row, 1).unwrap();
        assert_close(&one.text.unwrap(), &expected[&format!("{name}prompt_embeds")], 1e-5, "text");
        assert_close(&one.pooled.unwrap(), &expected[&format!("{name}pooled_prompt_embeds")], 1e-5, "pooled");
    }
    let latents = pipeline_with.initial_latents(request.seed, 1, request.size.unwrap()).unwrap();
    let schedule = pipeline_with.schedule(request.steps, &latents).unwrap();
    assert_close(&Tensor::new(schedule.sigmas(), &Device::Cpu).unwrap(), &expected["sigmas"], 1e-6, "sigmas");
    check_picture("sd3", &pipeline_with);
    check_latents("sd3", &pipeline_with, &["0", "3"]);

    for part in ["text_encoder_3", "tokenizer_3"] {
        fs::remove_dir_all(model.path().join(part)).unwrap();
    }
    let text = pipeline(model.path()).encode(&[request.prompt]).unwrap().text.unwrap();
    let wanted = &expected["without_t5/prompt_embeds"];
    let clip = wanted.dim(1).unwrap();
    assert_close(&text.narrow(1, 0, clip).unwrap(), wanted, 1e-5, "text without T5");
    let rest = text.narrow(1, clip, text.dim(1).unwrap() - clip).unwrap().abs().unwrap().sum_all().unwrap();
    assert_eq!(rest.to_scalar::<f32>().unwrap(), 0.0);
}

/// The picture of the fixture, pixel by pixel.
fn check_picture(name: &str, pipeline: &Pipeline) {
    let picture = pipeline.generate(&request(name), &mut |_| {}).unwrap().remove(0);
    let wanted = image::open(fixture(&format!("pipelines/{name}/picture.png"))).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), wanted.dimensions());
    let largest = picture.iter().zip(wanted.iter()).map(|(got, want)| got.abs_diff(*want)).max().unwrap();
    assert!(largest <= PIXEL_BOUND, "{name}: pixels differ by up to {largest} of 255");
}

/// Noise, and what is left of it after some steps.
fn check_latents(name: &str, pipeline: &Pipeline, steps: &[&str]) {
    let (expected, request) = (expected(name), request(name));
    let latents = pipeline.initial_latents(request.seed, 1, request.size.unwrap()).unwrap();
    assert_close(&latents.tensor, &expected["latents/initial"], 1e-6, "noise");
    let (encoded, without) = pipeline.encode_guided(&[request.prompt]).unwrap();
    let without = match &request.negative {
        Some(negative) => Some(pipeline.encode(std::slice::from_ref(negative)).unwrap()),
        None => without,
    };
    let guidance = pipeline.guidance_for(&encoded, without.as_ref(), &latents, request.guidance).unwrap();
    let schedule = pipeline.schedule(request.steps, &latents).unwrap();
    let denoiser = pipeline.load_transformer(&AttentionPlan::full(), Some(DType::F32)).unwrap();
    let mut seen = BTreeMap::new();
    let mut watch = |step: &clearform_sampling::StepProgress| drop(seen.insert(step.done - 1, step.latents.clone()));
    denoise(denoiser.as_ref(), &latents.tensor, &schedule, &guidance, &mut watch).unwrap();
    for step in steps {
        let wanted = &expected[&format!("latents/{step}")];
        assert_close(&seen[&step.parse().unwrap()], wanted, 1e-4, &format!("{name}: latents after step {step}"));
    }
}

/// A model folder as diffusers would have it.
fn assemble(name: &str) -> TempDir {
    let model = TempDir::new().unwrap();
    assemble_pipeline(&fixture("").join("../.."), name, model.path());
    model
}

fn pipeline(model: &Path) -> Pipeline {
    let options = PipelineOptions {
        reading: ReadOptions::default_options().unwrap(),
        components: None,
        plan: Some(AttentionPlan::full()),
        dtype: Some(DType::F32),
        device: Device::Cpu,
        guided_channels: None,
        adapters: Adapters::default(),
    };
    Pipeline::open(model, options).unwrap()
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    tensors(&format!("pipelines/{name}/expected.safetensors"))
}

fn request(name: &str) -> GenerateRequest {
    let request: Value = json(&format!("pipelines/{name}/request.json"));
    let number = |key: &str| request[key].as_u64();
    let prompt = |key: &str| request[key].as_str().map(|prompt| Prompt::Text(prompt.to_owned()));
    GenerateRequest {
        prompt: prompt("prompt").unwrap_or_else(|| Prompt::Class(number("class").unwrap() as u32)),
        negative: prompt("negative_prompt"),
        size: Some(ImageSize { height: number("height").unwrap() as usize, width: number("width").unwrap() as usize }),
        steps: number("steps").unwrap() as usize,
        guidance: request["guidance"].as_f64().unwrap(),
        true_cfg_scale: 1.0,
        seed: number("seed").unwrap(),
        batch: 1,
        control_images: Vec::new(),
    }
}
