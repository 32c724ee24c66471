//! From prompt to image on assets/mini-flux, compared with FluxPipeline stage by stage. fixtures/pipeline/export.py
//! describes the fixture.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::{ImageSize, Prompt};
use clearform_runtime::{GenerateRequest, Pipeline, PipelineOptions};
use clearform_sampling::{Guidance, Start, StepAction, denoise};
use clearform_weights::Checkpoint;
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;
use support::{assert_close, fixture, tensors};

const FIXTURE: &str = "pipeline/expected.safetensors";
/// Largest difference of a pixel, of 255.
const PIXEL_BOUND: u8 = 2;

#[test]
fn every_stage_equals_that_of_flux_pipeline() {
    let expected = tensors(FIXTURE);
    for (number, image) in images().iter().enumerate() {
        check_stages(&pipeline(), &request(image), &Expected { tensors: &expected, number });
    }
}

#[test]
fn images_equal_those_of_flux_pipeline() {
    let expected = tensors(FIXTURE);
    for (number, image) in images().iter().enumerate() {
        let generated = pipeline().generate(&request(image), &mut |_| StepAction::Continue).unwrap();
        let want = Expected { tensors: &expected, number }.get("image");
        let want = want.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let got = generated.iter().flat_map(|image| image.as_raw()).copied().collect::<Vec<_>>();
        assert_eq!(got.len(), want.len());
        let largest = got.iter().zip(&want).map(|(got, want)| got.abs_diff(*want)).max().unwrap();
        assert!(largest <= PIXEL_BOUND, "image {number}: pixels differ by up to {largest} of 255");
    }
}

#[test]
fn an_impossible_size_is_rejected() {
    let error = pipeline().initial_latents(0, 1, ImageSize { height: 128, width: 130 }).unwrap_err().to_string();
    assert!(error.contains("multiples of 8") && error.contains("the nearest are 136 and 128"), "{error}");
}

fn check_stages(pipeline: &Pipeline, request: &GenerateRequest, expected: &Expected) {
    let latents = pipeline.initial_latents(request.seed, request.batch, request.size.unwrap()).unwrap();
    let largest = (&latents.tensor - expected.get("noise")).unwrap().abs().unwrap().max_all().unwrap();
    assert!(largest.to_scalar::<f32>().unwrap() <= 1e-6, "noise differs");

    let prompts = pipeline.encode(std::slice::from_ref(&request.prompt)).unwrap();
    assert_close(prompts.text.as_ref().unwrap(), expected.get("text"), 1e-5, "T5");
    assert_close(prompts.pooled.as_ref().unwrap(), expected.get("pooled"), 1e-5, "CLIP");

    let schedule = pipeline.schedule(request.steps, &latents).unwrap();
    assert_eq!(schedule.sigmas(), expected.get("sigmas").to_vec1::<f32>().unwrap());

    let conditions = pipeline.conditions(&prompts, &latents, request.guidance).unwrap();
    let guidance = Guidance::SingleEvaluation(conditions);
    let denoiser = pipeline.load_transformer(&AttentionPlan::full(), Some(DType::F32)).unwrap();
    let start = Start::from_noise(latents.tensor);
    let last = denoise(denoiser.as_ref(), start, &schedule, &guidance, &mut |_| StepAction::Continue);
    assert_close(&last.unwrap(), expected.get("latents"), 1e-4, "last latents");
}

struct Expected<'a> {
    tensors: &'a HashMap<String, Tensor>,
    number: usize,
}

impl<'a> Expected<'a> {
    fn get(&self, name: &str) -> &'a Tensor {
        let name = format!("{}/{name}", self.number);
        self.tensors.get(&name).unwrap_or_else(|| panic!("the fixture has no {name}"))
    }
}

fn pipeline() -> Pipeline {
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/mini-flux/base");
    let options = PipelineOptions {
        plan: Some(AttentionPlan::full()),
        dtype: Some(DType::F32),
        ..PipelineOptions::default_options().unwrap()
    };
    Pipeline::open(&model, options).unwrap()
}

/// The settings of the images, from the fixture's metadata.
fn images() -> Vec<Value> {
    let checkpoint = Checkpoint::open(fixture(FIXTURE)).unwrap();
    serde_json::from_str(&checkpoint.metadata()["pictures"]).unwrap()
}

fn request(image: &Value) -> GenerateRequest {
    let integer = |key: &str| image[key].as_u64().unwrap();
    GenerateRequest {
        prompt: Prompt::Text(image["prompt"].as_str().unwrap().to_owned()),
        negative: None,
        size: Some(ImageSize { height: integer("height") as usize, width: integer("width") as usize }),
        steps: integer("steps") as usize,
        guidance: image["guidance"].as_f64().unwrap(),
        true_cfg_scale: 1.0,
        seed: integer("seed"),
        batch: image["batch"].as_u64().map_or(1, |batch| batch as usize),
        control_images: Vec::new(),
        control_mask: None,
    }
}
