//! The library as a program uses it: options, progress, cancellation, reports.
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor};
use clearform::evaluation::EvaluationOptions;
use clearform::{
    AdapterKind, AdapterOptions, AdapterSpec, ClearformError, CompareOptions, ConvertOptions, GenerateOptions,
    Observer, Progress, Prompt, RgbImage, Stage, TrainingOptions, TransferOptions, compare, convert, generate, inspect,
    transfer,
};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

fn assets(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/mini-flux").join(name)
}

/// Records what it sees, and cancels at one kind of progress.
#[derive(Default)]
struct Recorder {
    stages: Vec<Stage>,
    notes: Vec<String>,
    losses: Vec<f64>,
    cancel_in: Option<(Stage, usize)>,
}

impl Observer for Recorder {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        if self.stages.last() != Some(&progress.stage) {
            self.stages.push(progress.stage);
        }
        assert!(progress.done <= progress.total, "{progress:?}");
        self.losses.extend(progress.loss);
        match self.cancel_in {
            Some((stage, done)) if progress.stage == stage && progress.done >= done => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }

    fn note(&mut self, message: &str) {
        self.notes.push(message.to_owned());
    }
}

/// Two samples and two optimizer steps at a fourth of the native size.
fn quick_training() -> TrainingOptions {
    TrainingOptions {
        sample_count: Some(2),
        held_out: 2,
        sample_steps: Some(1),
        sample_size: Some(64),
        steps: Some(2),
        batch: Some(1),
        ..TrainingOptions::default()
    }
}

fn quick_conversion(output: &Path) -> ConvertOptions {
    ConvertOptions {
        attention: "clear:r=3".parse().unwrap(),
        training: Some(quick_training()),
        ..ConvertOptions::new(assets("base"), output)
    }
}

fn quick_image(model: &Path) -> GenerateOptions {
    let prompt = Prompt::Text("cat face".to_owned());
    GenerateOptions { width: Some(64), height: Some(64), steps: Some(2), ..GenerateOptions::new(model, prompt) }
}

#[test]
fn a_model_is_converted_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let mut recorder = Recorder::default();
    let report = convert(&quick_conversion(&output), &mut recorder).unwrap();
    assert_eq!(
        recorder.stages,
        [Stage::Samples, Stage::Comparing, Stage::Distilling, Stage::Comparing, Stage::Writing]
    );
    assert_eq!(report.losses.iter().map(|entry| entry.losses.total).collect::<Vec<_>>(), recorder.losses);
    assert_eq!((report.losses.len(), report.model.attention.as_str()), (2, "clear:r=3"));
    assert!(inspect(&output, &clearform::SourceOptions::default(), &mut ()).unwrap().is_complete());

    let mut recorder = Recorder::default();
    let generated = generate(&quick_image(&output), &mut recorder).unwrap();
    assert_eq!(recorder.stages, [Stage::Encoding, Stage::Loading, Stage::Denoising, Stage::Decoding]);
    assert!(recorder.notes.iter().all(|note| !note.contains("requested variant")), "{:?}", recorder.notes);
    assert_eq!(generated.images[0].dimensions(), (64, 64));
    assert_eq!(generated.parameters[0].attention, "clear:r=3");
    let path = folder.path().join("cat.png");
    generated.save(std::slice::from_ref(&path)).unwrap();
    assert_eq!(image::open(&path).unwrap().to_rgb8(), generated.images[0]);
    let error = generated.save(&[]).unwrap_err().to_string();
    assert_eq!(error, "expected a path for each of 1 images, found 0");
}

/// Cancelled in any stage, nothing is left but the work folder, and the same call with `resume` continues.
#[test]
fn a_cancelled_conversion_leaves_nothing_half_written_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let mut options = quick_conversion(&output);
    for cancel_in in [(Stage::Samples, 1), (Stage::Distilling, 1), (Stage::Writing, 1)] {
        let mut recorder = Recorder { cancel_in: Some(cancel_in), ..Recorder::default() };
        let error = convert(&options, &mut recorder).unwrap_err();
        assert!(matches!(error, ClearformError::Cancelled), "{cancel_in:?}: {error}");
        assert_eq!(recorder.stages.last(), Some(&cancel_in.0));
        assert!(!output.exists(), "{cancel_in:?}");
        options.training.as_mut().unwrap().resume = true;
    }
    let mut recorder = Recorder::default();
    convert(&options, &mut recorder).unwrap();
    assert!(recorder.losses.is_empty(), "the training was complete, yet {:?} was trained again", recorder.losses);
    let whole = folder.path().join("whole");
    convert(&quick_conversion(&whole), &mut ()).unwrap();
    let file = "transformer/diffusion_pytorch_model.safetensors";
    assert_eq!(std::fs::read(output.join(file)).unwrap(), std::fs::read(whole.join(file)).unwrap());
}

/// Before samples are generated, which may take hours.
#[test]
fn settings_out_of_range_are_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let cases = [
        (TrainingOptions { steps: Some(0), ..quick_training() }, "--steps: expected at least 1, found 0"),
        (TrainingOptions { sample_count: Some(0), ..quick_training() }, "--sample-count: expected at least 1, found 0"),
    ];
    for (training, message) in cases {
        let options = ConvertOptions { training: Some(training), ..quick_conversion(&output) };
        assert_eq!(convert(&options, &mut ()).unwrap_err().to_string(), message);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn an_image_is_cancelled_between_steps() {
    for (stage, done) in [(Stage::Encoding, 0), (Stage::Denoising, 1), (Stage::Decoding, 0)] {
        let mut recorder = Recorder { cancel_in: Some((stage, done)), ..Recorder::default() };
        let error = generate(&quick_image(&assets("base")), &mut recorder).unwrap_err();
        assert!(matches!(error, ClearformError::Cancelled), "{stage:?}: {error}");
        assert_eq!(recorder.stages.last(), Some(&stage));
    }
}

#[test]
fn options_are_serde_values_with_defaults() {
    let json = r#"{"source": "FLUX.1-dev", "output": "out"}"#;
    let options: ConvertOptions = serde_json::from_str(json).unwrap();
    assert_eq!(options, ConvertOptions::new("FLUX.1-dev", "out"));
    let text = serde_json::to_string(&options).unwrap();
    assert!(text.contains(r#""attention":"clear:r=16""#) && text.contains(r#""device":"cpu""#), "{text}");
    assert_eq!(serde_json::from_str::<ConvertOptions>(&text).unwrap(), options);
    let error = serde_json::from_str::<ConvertOptions>(r#"{"source": "a", "output": "b", "radios": 3}"#).unwrap_err();
    assert!(error.to_string().contains("unknown field `radios`"), "{error}");
    let adapters = r#"{"adapters": [{"path": "style.safetensors", "kind": "lora", "strength": 0.5}]}"#;
    let adapters: AdapterOptions = serde_json::from_str(adapters).unwrap();
    assert_eq!(adapters.to_string(), "--lora style.safetensors:0.5");
    // NaN is no JSON, but a value of the library's.
    let spec = AdapterSpec::new("style.safetensors", AdapterKind::Lora).with_strength(f64::NAN);
    let error = AdapterOptions::new([spec]).open().unwrap_err().to_string();
    assert!(error.contains("style.safetensors: the strength: expected a number from -1000 to 1000"), "{error}");
}

/// A transformer that takes a control image itself, as FLUX.1-Canny does: mini-flux with a LoRA that widens its input.
fn control_model(folder: &Path, attention: &str) -> PathBuf {
    let lora = folder.join("control-lora.safetensors");
    let tensor = |value: f32, shape: (usize, usize)| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let down = Tensor::cat(&[tensor(0.02, (2, 16)), tensor(0.3, (2, 16))], 1).unwrap();
    let tensors = HashMap::from([("img_in.lora_A.weight", down), ("img_in.lora_B.weight", tensor(0.05, (192, 2)))]);
    candle_core::safetensors::save(&tensors, &lora).unwrap();
    let output = folder.join(format!("control-{}", attention.replace(':', "-")));
    let adapters = AdapterOptions::new([AdapterSpec::new(&lora, AdapterKind::Lora)]);
    let options = ConvertOptions {
        attention: attention.parse().unwrap(),
        training: None,
        adapters,
        ..ConvertOptions::new(assets("base"), &output)
    };
    convert(&options, &mut ()).unwrap();
    output
}

/// `compare` and `transfer` give the control image to both models.
#[test]
fn control_models_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = control_model(folder.path(), "full");
    let student = control_model(folder.path(), "clear:r=2");
    let image = |shade: u8| {
        let path = folder.path().join(format!("{shade}.png"));
        RgbImage::from_pixel(64, 64, image::Rgb([shade; 3])).save(&path).unwrap();
        path
    };
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "cat face\n").unwrap();
    let evaluation = |control_images: Vec<PathBuf>| EvaluationOptions {
        prompts: Some(prompts.clone()),
        control_images,
        size: Some(64),
        steps: Some(2),
        ..EvaluationOptions::default()
    };
    let report = |output: &str, control_images| {
        let output = folder.path().join(output);
        let options = CompareOptions {
            evaluation: evaluation(control_images),
            ..CompareOptions::new(&teacher, &student, output)
        };
        compare(&options, &mut ())
    };
    let black = report("black", vec![image(0)]).unwrap();
    let white = report("white", vec![image(255)]).unwrap();
    assert_ne!(black.psnr, white.psnr, "the control image has no effect");
    assert!(black.attention_error.iter().all(|(_, error)| error.is_finite() && *error > 0.0), "{black:?}");
    let error = report("none", Vec::new()).unwrap_err().to_string();
    assert!(error.contains("the transformer takes one, found none; pass --control-image FILE"), "{error}");
    let error = report("three", vec![image(0), image(1), image(2)]).unwrap_err().to_string();
    assert!(error.contains("expected one image, or one for each of 1 prompts, found 3"), "{error}");

    let output = folder.path().join("transfer");
    let options = TransferOptions {
        evaluation: evaluation(vec![image(255)]),
        ..TransferOptions::new(&teacher, &student, output)
    };
    let report = transfer(&options, &mut ()).unwrap();
    assert_eq!(report.conditions.len(), 1);
    assert!(report.conditions[0].psnr.is_finite(), "{report}");
}
