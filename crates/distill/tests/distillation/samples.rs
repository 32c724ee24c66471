//! The sample set: what its files contain, resuming it, and what training draws from it.

use crate::support::{
    HEIGHT, TEXT, WIDTH, encode, image_ids, models, sample_set, sample_settings, sampling_spec, settings, text_ids,
    values,
};
use candle_core::{DType, Device, Tensor};
use clearform_distill::{Batches, ClassifierFree, DistillSettings, SampleSet, SampleSettings, Samples};
use clearform_models::{Conditions, Denoiser, Prompt};
use clearform_sampling::{Guidance, Start, StepAction, TorchGenerator, denoise};
use clearform_testkit::assert_close;
use std::ops::ControlFlow;

const PROMPTS: [&str; 3] = ["cat", "dog", "sun"];

fn guided_settings() -> SampleSettings {
    let guidance = ClassifierFree { scale: 3.0, unconditional: Prompt::Text(String::new()), channels: None };
    SampleSettings { classifier_free: Some(guidance), ..sample_settings() }
}

fn conditions(prompt: &str) -> Conditions {
    let encoded = encode(&[Prompt::Text(prompt.to_owned())]).unwrap();
    Conditions { image_ids: Some(image_ids()), text_ids: Some(text_ids()), ..encoded }
}

/// The latents of sample `index`, denoised alone from its own noise, without the set.
fn denoised_alone(teacher: &dyn Denoiser, index: usize, guidance: &Guidance) -> Tensor {
    let seed = sample_settings().seed + index as u64;
    let noise = TorchGenerator::new(seed).randn((1, HEIGHT * WIDTH, 8)).unwrap();
    let start = Start::from_noise(noise);
    denoise(teacher, start, &sampling_spec().schedule, guidance, &mut |_| StepAction::Continue).unwrap()
}

fn assert_samples(set: &SampleSet, teacher: &dyn Denoiser, guidance: impl Fn(&str) -> Guidance) {
    for index in 0..set.settings().count {
        let Samples { latents, conditions: found } = set.read(&[index], &Device::Cpu).unwrap();
        let prompt = PROMPTS[index % 3];
        let wanted = denoised_alone(teacher, index, &guidance(prompt));
        assert_close(&format!("latents of sample {index}"), &latents, &wanted, 1e-6);
        let wanted = conditions(prompt);
        assert_eq!(values(&found.text.unwrap()), values(&wanted.text.unwrap()), "text of sample {index}");
        assert_eq!(values(&found.pooled.unwrap()), values(&wanted.pooled.unwrap()), "pooled of sample {index}");
    }
}

#[test]
fn samples_are_what_denoising_each_alone_gives() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("full", DType::F32);
    let set = sample_set(folder.path(), sample_settings(), &models);
    assert_samples(&set, models.teacher(), |prompt| Guidance::SingleEvaluation(conditions(prompt)));
}

#[test]
fn guided_samples_are_what_denoising_each_alone_gives() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("full", DType::F32);
    let set = sample_set(folder.path(), guided_settings(), &models);
    let guidance = |prompt: &str| {
        let positive = conditions(prompt);
        Guidance::ClassifierFree { positive, negative: conditions(""), scale: 3.0, channels: None }
    };
    assert_samples(&set, models.teacher(), guidance);
}

#[test]
fn a_deleted_batch_is_generated_again_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("full", DType::F32);
    let set = sample_set(folder.path(), sample_settings(), &models);
    let path = folder.path().join("batch-00001.safetensors");
    let before = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(!set.is_complete());
    let mut reported = Vec::new();
    set.generate(models.teacher(), &sampling_spec(), &mut |done, all| {
        reported.push((done, all));
        ControlFlow::Continue(())
    })
    .unwrap();
    // At first, after each of the two steps, and at last.
    assert_eq!(reported, [(4, 7), (4, 7), (4, 7), (7, 7)]);
    assert_eq!(std::fs::read(&path).unwrap(), before);

    // Sample 4 has prompt 1; samples are returned in the order of the request.
    let read = set.read(&[4, 0], &Device::Cpu).unwrap();
    assert_eq!(read.latents.dims(), [2, 24, 8]);
    let wanted = encode(&["dog", "cat"].map(|prompt| Prompt::Text(prompt.to_owned()))).unwrap();
    assert_eq!(values(&read.conditions.text.unwrap()), values(&wanted.text.unwrap()));
    assert_eq!(values(&read.conditions.image_ids.unwrap()), values(&image_ids()));
    assert_eq!(values(&read.conditions.text_ids.unwrap()), [0.0; TEXT * 3]);
    assert_eq!(values(&set.read(&[0], &Device::Cpu).unwrap().latents), values(&read.latents)[24 * 8..]);
}

/// A tenth of the training samples is unconditional, so that the student learns both evaluations of guidance.
#[test]
fn a_tenth_of_a_guided_batch_is_unconditional() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let set = sample_set(folder.path(), guided_settings(), &models);
    let settings = DistillSettings { batch: 100, ..settings() };
    let drawn = Batches::new(&set, &settings, &models, TorchGenerator::new(1)).unwrap().draw().unwrap();
    let unconditional = values(&conditions("").pooled.unwrap());
    let known: Vec<Vec<f32>> = PROMPTS.iter().map(|prompt| values(&conditions(prompt).pooled.unwrap())).collect();
    let pooled = values(&drawn.input.conditions.pooled.unwrap());
    let absent = pooled.chunks(16).filter(|row| *row == unconditional).count();
    let present = pooled.chunks(16).filter(|row| known.iter().any(|known| known == row)).count();
    assert_eq!(absent + present, 100);
    // The standard deviation of 100 draws at 0.1 is 3.
    assert!((4..=18).contains(&absent), "{absent} of 100");
}
