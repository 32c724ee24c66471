//! Samples and training, interrupted and not.

use crate::support::{FLOW, HEIGHT, TEXT, WIDTH, image_ids, models, text_ids};
use candle_core::{DType, Device, Tensor};
use clearform_distill::{
    Batches, CheckpointDir, ClassifierFree, DistillSettings, Distilled, LearningRate, LossSettings, ResumeMode,
    SampleSet, SampleSettings, SamplingSpec, TeacherStudent, Timesteps, TrainingOutcome, TrainingProgress, distill,
    prediction_error,
};
use clearform_models::{Conditions, Prompt};
use clearform_sampling::{FlowMatchEuler, TorchGenerator};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::Path;

fn sample_settings() -> SampleSettings {
    let prompts = ["cat", "dog", "sun"].map(|prompt| Prompt::Text(prompt.to_owned())).to_vec();
    let size = [48, 32];
    SampleSettings { prompts, count: 7, batch: 3, size, steps: 2, guidance: None, classifier_free: None, seed: 5 }
}

/// Text features that depend on the prompt alone.
fn encode(prompts: &[Prompt]) -> Result<Conditions, Infallible> {
    let one = |prompt: &Prompt, shape: &[usize]| {
        let seed = prompt.to_string().bytes().map(u64::from).sum();
        TorchGenerator::new(seed).randn(shape).unwrap()
    };
    let all = |shape: &[usize]| Tensor::stack(&prompts.iter().map(|prompt| one(prompt, shape)).collect::<Vec<_>>(), 0);
    let (text, pooled) = (all(&[TEXT, 16]).unwrap(), all(&[16]).unwrap());
    Ok(Conditions { text: Some(text), pooled: Some(pooled), ..Conditions::default() })
}

fn sampling_spec() -> SamplingSpec {
    SamplingSpec {
        shape: vec![HEIGHT * WIDTH, 8],
        image_ids: Some(image_ids()),
        text_ids: Some(text_ids()),
        schedule: FlowMatchEuler::default().schedule(2, HEIGHT * WIDTH).unwrap(),
        dtype: DType::F32,
        device: Device::Cpu,
    }
}

fn samples(folder: &Path, models: &TeacherStudent) -> SampleSet {
    let set = SampleSet::create(folder, sample_settings()).unwrap();
    set.encode(&mut encode).unwrap();
    set.draw(models.teacher(), &sampling_spec(), &mut |_, _| ()).unwrap();
    assert!(set.is_complete());
    set
}

fn settings() -> DistillSettings {
    DistillSettings {
        steps: 6,
        batch: 2,
        accumulation: 2,
        ema: Some(0.9),
        timesteps: Timesteps::LogitNormal { mean: 0.0, deviation: 1.0 },
        learning_rate: LearningRate { peak: 2e-3, warmup: 2, ..LearningRate::default() },
        loss: LossSettings { every: 2, ..LossSettings::default() },
        seed: 3,
        ..DistillSettings::default()
    }
}

fn train(
    folder: &Path,
    set: &SampleSet,
    start: ResumeMode,
    observe: &mut dyn FnMut(&TrainingProgress) -> ControlFlow<()>,
) -> TrainingOutcome {
    let checkpoint_dir = CheckpointDir { folder: folder.to_owned(), checkpoint_every: 2, start };
    distill(&models("clear:r=2,d=2", DType::F32), set, &settings(), &checkpoint_dir, observe).unwrap()
}

fn finished(outcome: TrainingOutcome) -> Distilled {
    match outcome {
        TrainingOutcome::Finished(distilled) => distilled,
        TrainingOutcome::Stopped { step } => panic!("stopped at {step}"),
    }
}

fn assert_equal(got: &Distilled, wanted: &Distilled) {
    assert!(got.tensors.iter().count() > 20);
    for ((name, got), (wanted_name, wanted)) in got.tensors.iter().zip(wanted.tensors.iter()) {
        let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(name, wanted_name);
        assert!(bits(got).iter().map(|x| x.to_bits()).eq(bits(wanted).iter().map(|x| x.to_bits())), "{name}");
    }
    // A loss read back from the journal may differ in the last bit of its f64.
    let losses = |distilled: &Distilled| {
        distilled.entries.iter().map(|entry| (entry.step, entry.losses.total as f32)).collect::<Vec<_>>()
    };
    assert_eq!(losses(got), losses(wanted));
}

#[test]
fn resumed_training_ends_with_the_very_same_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let set = samples(&at("samples"), &models("full", DType::F32));
    let go_on = &mut |_: &TrainingProgress| ControlFlow::Continue(());
    let straight = finished(train(&at("straight"), &set, ResumeMode::Fresh, go_on));
    assert_eq!(straight.entries.len(), 6);

    let mut stop = |progress: &TrainingProgress| match progress.entry.step {
        3 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    assert!(matches!(train(&at("stopped"), &set, ResumeMode::Fresh, &mut stop), TrainingOutcome::Stopped { step: 3 }));
    assert_equal(&finished(train(&at("stopped"), &set, ResumeMode::Resume, go_on)), &straight);

    // Killed in step 5: the checkpoint is that of step 4, the journal is ahead of it.
    let kept = at("kept.safetensors");
    let mut kill = |progress: &TrainingProgress| match progress.entry.step {
        5 => {
            std::fs::copy(at("killed/training.safetensors"), &kept).unwrap();
            ControlFlow::Break(())
        }
        _ => ControlFlow::Continue(()),
    };
    train(&at("killed"), &set, ResumeMode::Fresh, &mut kill);
    std::fs::rename(&kept, at("killed/training.safetensors")).unwrap();
    assert_equal(&finished(train(&at("killed"), &set, ResumeMode::Resume, go_on)), &straight);
    let journal = std::fs::read_to_string(at("killed/losses.jsonl")).unwrap();
    assert_eq!(journal.lines().count(), 6);

    // A finished training that is resumed gives what it gave.
    assert_equal(&finished(train(&at("killed"), &set, ResumeMode::Resume, go_on)), &straight);
}

#[test]
fn a_training_is_not_mixed_with_another() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let models = models("clear:r=2", DType::F32);
    let set = samples(&at("samples"), &models);
    let begin = |settings: &DistillSettings, start| {
        let checkpoint_dir = CheckpointDir { folder: at("work"), checkpoint_every: 1, start };
        distill(&models, &set, settings, &checkpoint_dir, &mut |_| ControlFlow::Break(())).map(drop)
    };
    begin(&settings(), ResumeMode::Fresh).unwrap();
    assert!(begin(&settings(), ResumeMode::Fresh).unwrap_err().to_string().contains("--resume"));
    let other = DistillSettings { batch: 3, ..settings() };
    let error = begin(&other, ResumeMode::Resume).unwrap_err().to_string();
    assert!(error.contains("batch: 2, now 3"), "{error}");
    let other = SampleSettings { count: 8, ..sample_settings() };
    let error = SampleSet::create(&at("samples"), other).unwrap_err().to_string();
    assert!(error.contains("count: 7, now 8"), "{error}");
}

#[test]
fn samples_are_made_again_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("full", DType::F32);
    let set = samples(folder.path(), &models);
    let path = folder.path().join("batch-00001.safetensors");
    let before = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(!set.is_complete());
    let mut told = Vec::new();
    set.draw(models.teacher(), &sampling_spec(), &mut |done, all| told.push((done, all))).unwrap();
    assert_eq!(told, [(4, 7), (7, 7)]);
    assert_eq!(std::fs::read(&path).unwrap(), before);

    // Sample 4 is of prompt 1; samples come back in the order they are asked for.
    let read = set.read(&[4, 0], &Device::Cpu).unwrap();
    assert_eq!(read.latents.dims(), [2, 24, 8]);
    let wanted = encode(&["dog", "cat"].map(|prompt| Prompt::Text(prompt.to_owned()))).unwrap();
    assert_eq!(numbers(&read.conditions.text.unwrap()), numbers(&wanted.text.unwrap()));
    assert_eq!(numbers(&read.conditions.image_ids.unwrap()), numbers(&image_ids()));
    assert_eq!(numbers(&set.read(&[0], &Device::Cpu).unwrap().latents), numbers(&read.latents)[24 * 8..]);
}

/// A tenth of training is of what guidance leads away from, so that both of its evaluations are learned.
#[test]
fn guided_sets_teach_the_absence_of_a_subject() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let nothing = Prompt::Text(String::new());
    let guidance = ClassifierFree { scale: 3.0, without: nothing.clone(), channels: None };
    let guided = SampleSettings { classifier_free: Some(guidance), ..sample_settings() };
    let set = SampleSet::create(folder.path(), guided).unwrap();
    set.encode(&mut encode).unwrap();
    set.draw(models.teacher(), &sampling_spec(), &mut |_, _| ()).unwrap();
    assert!(set.is_complete());
    let plain = samples(&folder.path().join("plain"), &models);
    let latents = |set: &SampleSet| numbers(&set.read(&[0], &Device::Cpu).unwrap().latents);
    assert_ne!(latents(&set), latents(&plain));

    let settings = DistillSettings { batch: 100, ..settings() };
    let drawn = Batches::new(&set, &settings, &models, TorchGenerator::new(1)).draw().unwrap();
    let without = numbers(&encode(&[nothing]).unwrap().pooled.unwrap());
    let pooled = numbers(&drawn.input.conditions.pooled.unwrap());
    let absent = pooled.chunks(16).filter(|row| *row == without).count();
    assert!((4..=18).contains(&absent), "{absent} of 100");
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

#[test]
fn the_student_comes_nearer_to_its_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let set = samples(&folder.path().join("samples"), &models);
    let inputs = set.noised(FLOW, 77, 4, &Device::Cpu).unwrap();
    assert_eq!(inputs.iter().map(|input| input.latents.dim(0).unwrap()).collect::<Vec<_>>(), [4, 3]);
    let before = prediction_error(models.teacher(), models.student(), &inputs).unwrap();
    let loss = LossSettings { denoising: 0.0, ..LossSettings::default() };
    let settings = DistillSettings { steps: 60, batch: 4, accumulation: 1, ema: None, loss, ..settings() };
    let checkpoint_dir =
        CheckpointDir { folder: folder.path().join("work"), checkpoint_every: 100, start: ResumeMode::Fresh };
    distill(&models, &set, &settings, &checkpoint_dir, &mut |_| ControlFlow::Continue(())).unwrap();
    let after = prediction_error(models.teacher(), models.student(), &inputs).unwrap();
    assert!(after < 0.6 * before, "{before} before, {after} after");
}
