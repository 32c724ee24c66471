//! From prompt or class to image, compared with StableDiffusion3Pipeline, PixArtSigmaPipeline and DiTPipeline stage by
//! stage. The models are assembled from the configs in fixtures/pipelines, seeded weights, and mini-flux's tokenizers.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::{ImageSize, Prompt};
use clearform_runtime::{ControlImages, GenerateRequest, GuidanceScales, ImageBatch, Pipeline, PipelineOptions};
use clearform_sampling::{StepAction, StepProgress};
use clearform_testkit::assemble_pipeline;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use support::{assert_close, fixture, json, tensors};
use tempfile::TempDir;

/// Largest difference of a pixel, of 255.
const PIXEL_BOUND: u8 = 2;

#[test]
fn dit_images_equal_those_of_diffusers() {
    let model = assemble("dit");
    check_image("dit", &pipeline(model.path()));
    check_latents("dit", &pipeline(model.path()), &["0", "4"]);
}

#[test]
fn pixart_images_equal_those_of_diffusers() {
    let model = assemble("pixart");
    let pipeline = pipeline(model.path());
    let expected = expected("pixart");
    let request = request("pixart");
    let encoded = pipeline.encode(&[request.prompt, request.negative.unwrap()]).unwrap();
    for (row, name) in ["", "negative_"].into_iter().enumerate() {
        let sample = encoded.samples(row, 1).unwrap();
        let mask = &expected[&format!("{name}prompt_attention_mask")];
        assert_close(&sample.text_mask.unwrap(), mask, 0.0, "mask");
        // Padding is masked in the transformer, so its embeddings do not matter: here they are zero.
        let masked = |text: &Tensor| text.broadcast_mul(&mask.unsqueeze(2).unwrap()).unwrap();
        assert_close(&sample.text.unwrap(), &masked(&expected[&format!("{name}prompt_embeds")]), 1e-5, "T5");
    }
    check_image("pixart", &pipeline);
    check_latents("pixart", &pipeline, &["0", "4"]);
}

#[test]
fn sd3_images_equal_those_of_diffusers() {
    let model = assemble("sd3");
    let pipeline_with_t5 = pipeline(model.path());
    let expected = expected("sd3");
    let request = request("sd3");
    let encoded = pipeline_with_t5.encode(&[request.prompt.clone(), request.negative.clone().unwrap()]).unwrap();
    for (row, name) in ["", "negative_"].into_iter().enumerate() {
        let sample = encoded.samples(row, 1).unwrap();
        assert_close(&sample.text.unwrap(), &expected[&format!("{name}prompt_embeds")], 1e-5, "text");
        assert_close(&sample.pooled.unwrap(), &expected[&format!("{name}pooled_prompt_embeds")], 1e-5, "pooled");
    }
    let latents = pipeline_with_t5.initial_latents(request.seed, 1, request.size.unwrap()).unwrap();
    let schedule = pipeline_with_t5.schedule(request.steps, &latents).unwrap();
    assert_close(&Tensor::new(schedule.sigmas(), &Device::Cpu).unwrap(), &expected["sigmas"], 1e-6, "sigmas");
    check_image("sd3", &pipeline_with_t5);
    check_latents("sd3", &pipeline_with_t5, &["0", "3"]);

    for component in ["text_encoder_3", "tokenizer_3"] {
        fs::remove_dir_all(model.path().join(component)).unwrap();
    }
    let text = pipeline(model.path()).encode(&[request.prompt]).unwrap().text.unwrap();
    let wanted = &expected["without_t5/prompt_embeds"];
    let clip = wanted.dim(1).unwrap();
    assert_close(&text.narrow(1, 0, clip).unwrap(), wanted, 1e-5, "text without T5");
    let rest = text.narrow(1, clip, text.dim(1).unwrap() - clip).unwrap().abs().unwrap().sum_all().unwrap();
    assert_eq!(rest.to_scalar::<f32>().unwrap(), 0.0);
}

/// Compares the image with that of the fixture, pixel by pixel.
fn check_image(name: &str, pipeline: &Pipeline) {
    let image = pipeline.generate(&request(name), &mut |_| StepAction::Continue).unwrap().remove(0);
    let wanted = image::open(fixture(&format!("pipelines/{name}/picture.png"))).unwrap().to_rgb8();
    assert_eq!(image.dimensions(), wanted.dimensions());
    let largest = image.iter().zip(wanted.iter()).map(|(got, want)| got.abs_diff(*want)).max().unwrap();
    assert!(largest <= PIXEL_BOUND, "{name}: pixels differ by up to {largest} of 255");
}

/// Compares the initial noise, and the latents after some steps.
fn check_latents(name: &str, pipeline: &Pipeline, steps: &[&str]) {
    let expected = expected(name);
    let request = request(name);
    let latents = pipeline.initial_latents(request.seed, 1, request.size.unwrap()).unwrap();
    assert_close(&latents.tensor, &expected["latents/initial"], 1e-6, "noise");
    let prompts = pipeline.encode_prompts(&[request.prompt], request.negative.as_ref()).unwrap();
    let schedule = pipeline.schedule(request.steps, &latents).unwrap();
    let scales = GuidanceScales::new(request.guidance);
    let batch = ImageBatch { latents, prompts, schedule, scales, controls: ControlImages::default() };
    let denoiser = pipeline.load_transformer(&AttentionPlan::full(), Some(DType::F32)).unwrap();
    let mut seen = BTreeMap::new();
    let mut record = |step: &StepProgress| {
        seen.insert(step.done - 1, step.latents.clone());
        StepAction::Continue
    };
    pipeline.prepare(batch).unwrap().denoise(denoiser.as_ref(), &mut record).unwrap();
    for step in steps {
        let wanted = &expected[&format!("latents/{step}")];
        assert_close(&seen[&step.parse().unwrap()], wanted, 1e-4, &format!("{name}: latents after step {step}"));
    }
}

/// A model folder in the format of diffusers.
fn assemble(name: &str) -> TempDir {
    let model = TempDir::new().unwrap();
    assemble_pipeline(&fixture("").join("../.."), name, model.path());
    model
}

fn pipeline(model: &Path) -> Pipeline {
    let options = PipelineOptions {
        plan: Some(AttentionPlan::full()),
        dtype: Some(DType::F32),
        ..PipelineOptions::default_options().unwrap()
    };
    Pipeline::open(model, options).unwrap()
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    tensors(&format!("pipelines/{name}/expected.safetensors"))
}

fn request(name: &str) -> GenerateRequest {
    let request: Value = json(&format!("pipelines/{name}/request.json"));
    let integer = |key: &str| request[key].as_u64();
    let prompt = |key: &str| request[key].as_str().map(|prompt| Prompt::Text(prompt.to_owned()));
    GenerateRequest {
        prompt: prompt("prompt").unwrap_or_else(|| Prompt::Class(integer("class").unwrap() as u32)),
        negative: prompt("negative_prompt"),
        size: Some(ImageSize {
            height: integer("height").unwrap() as usize,
            width: integer("width").unwrap() as usize,
        }),
        steps: integer("steps").unwrap() as usize,
        guidance: request["guidance"].as_f64().unwrap(),
        true_cfg_scale: 1.0,
        seed: integer("seed").unwrap(),
        batch: 1,
        control_images: Vec::new(),
        control_mask: None,
    }
}
