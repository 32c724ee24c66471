//! The training loop: against its steps written out, interrupted and not, and whether it learns.

use crate::support::{FLOW, models, sample_set, sample_settings, settings, values};
use candle_core::{DType, Device, Tensor};
use clearform_distill::{
    Activations, Batch, Batches, CheckpointDir, DistillSettings, Distilled, Gradients, HeldOut, LossEntry,
    LossSettings, Losses, Optimizer, ResumeMode, SampleSet, SampleSettings, TeacherStudent, TrainingData,
    TrainingOutcome, TrainingProgress, backward, distill, prediction_error, steps_within,
};
use clearform_sampling::TorchGenerator;
use clearform_testkit::{assert_close, relative_error};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

fn train(
    folder: &Path,
    set: &SampleSet,
    start: ResumeMode,
    observe: &mut dyn FnMut(&TrainingProgress) -> ControlFlow<()>,
) -> TrainingOutcome {
    let checkpoint_dir = CheckpointDir { folder: folder.to_owned(), checkpoint_every: 2, resume: start };
    distill(&models("clear:r=2,d=2", DType::F32), on(set), &settings(), &checkpoint_dir, observe).unwrap()
}

/// Training on `set` alone.
fn on(set: &SampleSet) -> TrainingData<'_> {
    TrainingData { samples: set, held_out: None }
}

fn finished(outcome: TrainingOutcome) -> Distilled {
    match outcome {
        TrainingOutcome::Finished(distilled) => distilled,
        TrainingOutcome::Stopped { step } => panic!("stopped at {step}"),
    }
}

/// All steps in one run, without a look at the progress.
fn train_at_once(folder: &Path, models: &TeacherStudent, set: &SampleSet, settings: &DistillSettings) -> Distilled {
    let checkpoint_dir = CheckpointDir { folder: folder.to_owned(), checkpoint_every: 100, resume: ResumeMode::Fresh };
    finished(distill(models, on(set), settings, &checkpoint_dir, &mut |_| ControlFlow::Continue(())).unwrap())
}

fn assert_equal(got: &Distilled, wanted: &Distilled) {
    assert_eq!(got.tensors.iter().count(), wanted.tensors.iter().count());
    for ((name, got), (wanted_name, wanted)) in got.tensors.iter().zip(wanted.tensors.iter()) {
        assert_eq!(name, wanted_name);
        assert!(values(got).iter().map(|x| x.to_bits()).eq(values(wanted).iter().map(|x| x.to_bits())), "{name}");
    }
    let losses = |distilled: &Distilled| {
        distilled.entries.iter().map(|entry| (entry.step, entry.losses.total)).collect::<Vec<_>>()
    };
    assert_eq!(losses(got), losses(wanted));
}

/// Mean gradient and mean total loss of the next `count` batches, each weighted equally.
fn mean_gradient(
    models: &TeacherStudent,
    batches: &mut Batches,
    settings: &DistillSettings,
) -> (f64, BTreeMap<String, Tensor>) {
    let count = settings.accumulation as f64;
    let mut loss = 0.0;
    let mut sums = Gradients::new();
    for _ in 0..settings.accumulation {
        let batch = batches.draw().unwrap();
        let (losses, gradients) = backward(models, &batch, &settings.loss, Activations::Keep).unwrap();
        loss += losses.total / count;
        for (name, gradient) in gradients {
            let sum = sums.remove(&name).map_or(Ok(gradient.clone()), |sum| sum + gradient).unwrap();
            sums.insert(name, sum);
        }
    }
    (loss, sums.into_iter().map(|(name, sum)| (name, (sum / count).unwrap())).collect())
}

/// Three steps of [`distill`] with everything that a step may do, against the same steps written out here.
#[test]
fn steps_are_clipped_descent_on_the_mean_gradient_with_an_average() {
    let folder = tempfile::tempdir().unwrap();
    let plan = "clear:r=2,d=2";
    let trained = models(plan, DType::F32);
    let reference = models(plan, DType::F32);
    let set = sample_set(&folder.path().join("samples"), sample_settings(), &trained);
    let settings = DistillSettings { steps: 3, optimizer: Optimizer::Sgd, clip: Some(0.05), ..settings() };
    let distilled = train_at_once(&folder.path().join("work"), &trained, &set, &settings);

    let mut batches = Batches::new(&set, &settings, &reference, TorchGenerator::new(settings.seed)).unwrap();
    let mut average = reference.snapshot().unwrap();
    let start = reference.snapshot().unwrap();
    // Two steps of warmup times 0.02 + 0.98 (1 + cos(pi step / 3)) / 2, and the decay of the average.
    let rates = [2e-3 * 0.5, 2e-3 * 0.755, 2e-3 * 0.265];
    let decays = [2.0 / 11.0, 3.0 / 12.0, 4.0 / 13.0];
    for (step, (rate, decay)) in rates.into_iter().zip(decays).enumerate() {
        let (loss, gradients) = mean_gradient(&reference, &mut batches, &settings);
        let squares = gradients.values().flat_map(values).map(|value| f64::from(value).powi(2));
        let norm = squares.sum::<f64>().sqrt();
        assert!(norm > 0.05, "step {step} is not clipped: the norm is {norm}");
        let entry = distilled.entries[step];
        for (what, got, wanted) in
            [("loss", entry.losses.total, loss), ("norm", entry.norm, norm), ("rate", entry.rate, rate)]
        {
            assert!((got - wanted).abs() < 1e-5 * wanted, "step {step}: {what} {got}, wanted {wanted}");
        }
        let before = reference.snapshot().unwrap();
        let scale = rate * 0.05 / norm;
        let stepped = before
            .iter()
            .map(|(name, before)| (name.clone(), (before - gradients[name].affine(scale, 0.0).unwrap()).unwrap()));
        reference.restore(&stepped.collect()).unwrap();
        for (name, master) in reference.masters() {
            let moved = (average[name].affine(decay, 0.0).unwrap() + master.affine(1.0 - decay, 0.0).unwrap()).unwrap();
            average.insert(name.clone(), moved.detach());
        }
    }
    let change = |to: &Tensor, name: &str| (to - &start[name]).unwrap();
    for (name, average) in &average {
        let (_, got) = distilled.tensors.iter().find(|(found, _)| *found == name).unwrap();
        // The change alone, since a weight that did not move at all would be close to one that hardly moved.
        assert_close(name, &change(got, name), &change(average, name), 2e-3);
        // The student has the result when training ends.
        assert_eq!(values(trained.masters()[name].as_tensor()), values(got), "{name}");
    }
}

#[test]
fn a_resumed_training_ends_with_the_same_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let set = sample_set(&at("samples"), sample_settings(), &models("full", DType::F32));
    let proceed = &mut |_: &TrainingProgress| ControlFlow::Continue(());
    let straight = finished(train(&at("straight"), &set, ResumeMode::Fresh, proceed));
    assert_eq!(straight.entries.len(), 6);
    let start = models("clear:r=2,d=2", DType::F32).snapshot().unwrap();
    assert_eq!(straight.tensors.iter().count(), start.len());
    for (name, tensor) in straight.tensors.iter() {
        let moved = relative_error(tensor, &start[name]).unwrap();
        assert!(moved > 1e-4, "{name} moved by {moved:.1e}: a lost step would hardly be seen");
    }

    let mut stop = |progress: &TrainingProgress| match progress.entry.step {
        3 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    assert!(matches!(train(&at("stopped"), &set, ResumeMode::Fresh, &mut stop), TrainingOutcome::Stopped { step: 3 }));
    assert_equal(&finished(train(&at("stopped"), &set, ResumeMode::Resume, proceed)), &straight);

    // The losses are the state's, whatever becomes of the file that shows them.
    std::fs::remove_file(at("stopped/losses.jsonl")).unwrap();
    assert_equal(&finished(train(&at("stopped"), &set, ResumeMode::Resume, proceed)), &straight);
    let log = std::fs::read_to_string(at("stopped/losses.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 6);

    // Killed in step 5: the checkpoint is that of step 4, and the log is ahead of it.
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
    assert_equal(&finished(train(&at("killed"), &set, ResumeMode::Resume, proceed)), &straight);
    let log = std::fs::read_to_string(at("killed/losses.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 6);

    // Resuming a finished training returns the same result again.
    assert_equal(&finished(train(&at("killed"), &set, ResumeMode::Resume, proceed)), &straight);
}

#[test]
fn a_training_is_not_mixed_with_another() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let models = models("clear:r=2", DType::F32);
    let set = sample_set(&at("samples"), sample_settings(), &models);
    let begin = |settings: &DistillSettings, start| {
        let checkpoint_dir = CheckpointDir { folder: at("work"), checkpoint_every: 1, resume: start };
        distill(&models, on(&set), settings, &checkpoint_dir, &mut |_| ControlFlow::Break(())).map(drop)
    };
    begin(&settings(), ResumeMode::Fresh).unwrap();
    assert!(begin(&settings(), ResumeMode::Fresh).unwrap_err().to_string().contains("pass --resume to continue it"));
    let other = DistillSettings { batch: 3, ..settings() };
    let error = begin(&other, ResumeMode::Resume).unwrap_err().to_string();
    assert!(error.contains("batch: 2, now 3"), "{error}");
    let other = SampleSettings { count: 8, ..sample_settings() };
    let error = SampleSet::create(&at("samples"), other).unwrap_err().to_string();
    assert!(error.contains("count: 7, now 8"), "{error}");
}

#[test]
fn the_loss_falls_and_the_student_approaches_its_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let set = sample_set(&folder.path().join("samples"), sample_settings(), &models);
    let inputs = set.noised(FLOW, 77, 4, &Device::Cpu).unwrap();
    assert_eq!(inputs.iter().map(|input| input.latents.dim(0).unwrap()).collect::<Vec<_>>(), [4, 3]);
    let before = prediction_error(models.teacher(), models.student(), &inputs).unwrap();
    // What records its operations keeps the activations of a whole generation.
    let recorded =
        [models.student(), models.student_with_gradients()].map(|model| model.forward(&inputs[0]).unwrap().track_op());
    assert_eq!(recorded, [false, true]);
    // The teacher's weights are random, so it is far from denoising: that term would hide what the student learns of it.
    let loss = LossSettings { denoising: 0.0, ..LossSettings::default() };
    let settings = DistillSettings { steps: 60, batch: 4, accumulation: 1, ema: None, loss, ..settings() };
    let distilled = train_at_once(&folder.path().join("work"), &models, &set, &settings);
    let after = prediction_error(models.teacher(), models.student(), &inputs).unwrap();
    assert!(after < 0.6 * before, "{before} before, {after} after");

    for LossEntry { step, losses, .. } in &distilled.entries {
        let sum = 0.5 * losses.prediction + 0.5 * losses.attention;
        assert!((losses.total - sum).abs() < 1e-6 * sum, "step {step}: total {}, sum {sum}", losses.total);
    }
    // The first and the last tenth of the steps. They fall to 0.64, 0.54 and 0.59.
    for (what, term, bound) in [
        ("prediction", (|losses| losses.prediction) as fn(&Losses) -> f64, 0.75),
        ("attention", |losses| losses.attention, 0.65),
        ("total", |losses| losses.total, 0.7),
    ] {
        let mean = |entries: &[LossEntry]| entries.iter().map(|entry| term(&entry.losses)).sum::<f64>() / 6.0;
        let first = mean(&distilled.entries[..6]);
        let last = mean(&distilled.entries[54..]);
        assert!(last < bound * first, "{what}: {first} at first, {last} at last");
    }
}

/// Every sample is read before the first step, so none of its files is needed afterwards.
#[test]
fn no_file_of_a_sample_is_opened_by_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let samples = folder.path().join("samples");
    let set = sample_set(&samples, sample_settings(), &models);
    let checkpoint_dir =
        CheckpointDir { folder: folder.path().join("work"), checkpoint_every: 100, resume: ResumeMode::Fresh };
    let mut steps = 0;
    let mut observe = |_: &TrainingProgress| {
        if steps == 0 {
            std::fs::remove_dir_all(&samples).unwrap();
        }
        steps += 1;
        ControlFlow::Continue(())
    };
    finished(distill(&models, on(&set), &settings(), &checkpoint_dir, &mut observe).unwrap());
    assert_eq!(steps, settings().steps);
}

/// The held-out errors are those of predictions at fixed levels with noise of a fixed seed, and training logs what is
/// left of them.
#[test]
fn held_out_errors_are_of_fixed_inputs_and_fall() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let set = sample_set(&folder.path().join("samples"), sample_settings(), &models);
    let unseen = SampleSettings { seed: 1000, count: 6, ..sample_settings() };
    let unseen = sample_set(&folder.path().join("held-out"), unseen, &models);
    let held_out = HeldOut::new(&models, &unseen, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let before = held_out.before().clone();
    assert_eq!(held_out.quick_share(&models).unwrap(), 1.0);

    // The third level by hand: its noise is the third draw of the generator.
    let all: Vec<usize> = (0..6).collect();
    let samples = unseen.read(&all, &Device::Cpu).unwrap();
    let mut generator = TorchGenerator::new(1234);
    let noise = (0..3).map(|_| generator.randn(samples.latents.shape()).unwrap()).last().unwrap();
    let level = Tensor::full(0.5f32, 6, &Device::Cpu).unwrap();
    let batch = Batch::noised(FLOW, &samples.latents, &noise, &level, samples.conditions).unwrap();
    let error = prediction_error(models.teacher(), models.student(), std::slice::from_ref(&batch.input)).unwrap();
    assert!((before.levels[2] - error).abs() < 1e-5 * error, "{} instead of {error}", before.levels[2]);
    let power = values(&models.teacher().forward(&batch.input).unwrap());
    let power = power.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / power.len() as f64;
    assert!((before.power[2] - power).abs() < 1e-5 * power, "{} instead of {power}", before.power[2]);

    let checkpoint_dir =
        CheckpointDir { folder: folder.path().join("work"), checkpoint_every: 100, resume: ResumeMode::Fresh };
    let data = TrainingData { samples: &set, held_out: Some(&held_out) };
    let loss = LossSettings { denoising: 0.0, prediction: 1.0, attention: 0.0, ..LossSettings::default() };
    let settings = DistillSettings { steps: 30, loss, ..settings() };
    let outcome = distill(&models, data, &settings, &checkpoint_dir, &mut |_| ControlFlow::Continue(()));
    let distilled = finished(outcome.unwrap());
    let logged: Vec<(usize, f64)> =
        distilled.entries.iter().filter_map(|entry| Some((entry.step, entry.held_out?))).collect();
    assert_eq!(logged.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (2..=30).step_by(2).collect::<Vec<_>>());
    // The student has the average, which is the result, and the last entry is about it.
    let last = logged.last().unwrap().1;
    assert_eq!(last, held_out.quick_share(&models).unwrap());
    assert!(last < 0.9, "{logged:?}");
    assert!(held_out.errors(&models, &mut |_, _| ControlFlow::Continue(())).unwrap().mean() < 0.9 * before.mean());
}

#[test]
fn a_time_is_turned_into_steps() {
    let folder = tempfile::tempdir().unwrap();
    let models = models("clear:r=2", DType::F32);
    let set = sample_set(folder.path(), sample_settings(), &models);
    assert_eq!(steps_within(1e-9, &models, &set, &settings()).unwrap(), 1);
    assert!(steps_within(60.0, &models, &set, &settings()).unwrap() > 20);
}

/// A training whose end depends on the held-out error stops early, decays its rate before, and is resumed like any other.
#[test]
fn a_training_ends_when_the_held_out_error_is_flat() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let fresh = || models("clear:r=2", DType::F32);
    let set = sample_set(&at("samples"), sample_settings(), &fresh());
    let unseen = sample_set(&at("held-out"), SampleSettings { seed: 1000, ..sample_settings() }, &fresh());
    let held_out = HeldOut::new(&fresh(), &unseen, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let settings = DistillSettings {
        steps: 400,
        until_flat: true,
        accumulation: 1,
        ema: None,
        loss: LossSettings { denoising: 0.0, attention: 0.0, ..LossSettings::default() },
        ..settings()
    };
    let train = |name: &str, resume, stop_at: Option<usize>| {
        let checkpoint_dir = CheckpointDir { folder: at(name), checkpoint_every: 1000, resume };
        let data = TrainingData { samples: &set, held_out: Some(&held_out) };
        let mut observe = |progress: &TrainingProgress| {
            assert_eq!(progress.entries.last(), Some(&progress.entry));
            if stop_at == Some(progress.entry.step) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        distill(&fresh(), data, &settings, &checkpoint_dir, &mut observe).unwrap()
    };
    let straight = finished(train("straight", ResumeMode::Fresh, None));
    let steps = straight.entries.len();
    assert!((80..400).contains(&steps), "{steps} steps");
    let rates: Vec<f64> = straight.entries.iter().map(|entry| entry.rate).collect();
    let constant = rates.iter().filter(|rate| **rate == 2e-3).count();
    assert!((constant as f64 / steps as f64 - 0.75).abs() < 0.03, "{constant} of {steps} steps at the peak");
    assert!(rates[steps - 1] < 1e-4 && straight.entries[steps - 1].held_out.is_some());

    // Stopped after it was found flat: the decay goes on as it began.
    train("stopped", ResumeMode::Fresh, Some(steps - 5));
    assert_equal(&finished(train("stopped", ResumeMode::Resume, None)), &straight);

    let checkpoint_dir = CheckpointDir { folder: at("blind"), checkpoint_every: 1, resume: ResumeMode::Fresh };
    let blind = distill(&fresh(), on(&set), &settings, &checkpoint_dir, &mut |_| ControlFlow::Continue(()));
    assert_eq!(blind.unwrap_err().to_string(), "setting until_flat: needs held-out samples");
}
