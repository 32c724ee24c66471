//! The memory that distilling a large model takes, compared with a formula.

use crate::support::folder;
use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_distill::{
    CheckpointDir, DistillSettings, PairSpec, ResumeMode, SampleSet, SampleSettings, SamplingSpec, TeacherStudent,
    TrainingData, TrainingOutcome, distill,
};
use clearform_models::families::flux::Flux;
use clearform_models::{Conditions, ModelFamily as _, Prompt};
use clearform_sampling::FlowMatchEuler;
use clearform_weights::{Checkpoint, InMemoryTensors, ProductPrecision, TensorSource};
use serde_json::json;
use std::convert::Infallible;
use std::ops::ControlFlow;

const EDGE: usize = 16;
const TEXT: usize = 16;
const WIDTH: usize = 3072;
const SINGLE_BLOCKS: usize = 4;
/// Values that a single block holds for each token and each channel of its width, forward and backward.
const ACTIVATIONS: usize = 60;

/// FLUX's width, one double and four single blocks: 0.95 billion parameters in bf16.
/// `cargo test --release -p clearform-distill -- --ignored --nocapture`
#[test]
#[ignore = "takes 6 GB of memory and minutes"]
fn two_gigabytes_are_distilled_in_the_memory_that_the_formula_gives() {
    let weights = large();
    let plan: AttentionPlan = "clear:r=8".parse().unwrap();
    let config = json!({
        "in_channels": 64, "num_layers": 1, "num_single_layers": SINGLE_BLOCKS, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 1024, "pooled_projection_dim": 1024,
        "guidance_embeds": false, "axes_dims_rope": [16, 56, 56], "patch_size": 1,
    });
    let architecture = Flux.parse(&config).unwrap();
    let models = TeacherStudent::build(
        PairSpec { architecture: architecture.as_ref(), plan: &plan, products: ProductPrecision::Full },
        &weights,
        &weights,
    )
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let samples = samples(&folder.path().join("samples"), &models);
    let settings = DistillSettings { steps: 2, batch: 1, ..DistillSettings::default() };
    let checkpoint_dir =
        CheckpointDir { folder: folder.path().join("work"), checkpoint_every: 1, resume: ResumeMode::Fresh };
    let data = TrainingData { samples: &samples, held_out: None };
    let outcome = distill(&models, data, &settings, &checkpoint_dir, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(matches!(outcome, TrainingOutcome::Finished(_)));

    let sizes = weights.iter().map(|(_, tensor)| (tensor.elem_count() * 2, tensor.elem_count() * 4));
    let (model, largest) = sizes.fold((0, 0), |(sum, most), (bytes, single)| (sum + bytes, most.max(single)));
    let masters: usize = models.masters().values().map(|master| master.elem_count() * 4).sum();
    // Master, gradient and two moments; the largest weight in f32 while it is used; one block's activations.
    let formula = model + 4 * masters + largest + (EDGE * EDGE + TEXT) * WIDTH * 4 * ACTIVATIONS;
    let peak = peak();
    let megabytes = |bytes: usize| bytes / 1_000_000;
    eprintln!(
        "model {} MB, masters {} MB: formula {} MB, peak {} MB",
        megabytes(model),
        megabytes(masters),
        megabytes(formula),
        megabytes(peak)
    );
    assert!(model > 1_800_000_000);
    assert!((peak as f64 / formula as f64 - 1.0).abs() < 0.15, "{}", peak as f64 / formula as f64);
}

/// The fixture's tensors at FLUX's width.
fn large() -> InMemoryTensors {
    let fixture = Checkpoint::open(folder().join("weights.safetensors")).unwrap();
    let mut weights = InMemoryTensors::default();
    for info in fixture.tensors() {
        let shape: Vec<usize> = info.shape.iter().map(|&size| enlarged(size)).collect();
        let tensor =
            || Tensor::randn(0f32, 0.02, shape.as_slice(), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        match info.name.strip_prefix("single_transformer_blocks.") {
            Some(rest) if rest.starts_with("0.") => {
                for block in 0..SINGLE_BLOCKS {
                    weights.insert(format!("single_transformer_blocks.{block}.{}", &rest[2..]), tensor());
                }
            }
            Some(_) => {}
            None => weights.insert(info.name, tensor()),
        }
    }
    weights
}

/// The size of FLUX.1 for a size of the fixture, whose width is 48.
fn enlarged(size: usize) -> usize {
    match size {
        256 => 256,
        24 => 128,
        16 => 1024,
        8 => 64,
        multiple => multiple / 48 * WIDTH,
    }
}

fn samples(folder: &std::path::Path, models: &TeacherStudent) -> SampleSet {
    let prompts = vec![Prompt::Text("a".to_owned())];
    let settings = SampleSettings {
        prompts,
        count: 1,
        batch: 1,
        size: [256; 2],
        steps: 1,
        guidance: None,
        classifier_free: None,
        seed: 0,
    };
    let set = SampleSet::create(folder, settings).unwrap();
    let ones = |shape: &[usize]| Some(Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
    let mut encode = |_: &[Prompt]| -> Result<Conditions, Infallible> {
        Ok(Conditions { text: ones(&[1, TEXT, 1024]), pooled: ones(&[1, 1024]), ..Conditions::default() })
    };
    set.encode(&mut encode).unwrap();
    let ids = (0..EDGE * EDGE).flat_map(|token| [0.0, (token / EDGE) as f32, (token % EDGE) as f32]);
    let sampling_spec = SamplingSpec {
        shape: vec![EDGE * EDGE, 64],
        image_ids: Some(Tensor::from_iter(ids, &Device::Cpu).unwrap().reshape((EDGE * EDGE, 3)).unwrap()),
        text_ids: None,
        schedule: FlowMatchEuler::default().schedule(1, EDGE * EDGE).unwrap(),
        dtype: DType::F32,
        device: Device::Cpu,
    };
    set.generate(models.teacher(), &sampling_spec, &mut |_, _| ControlFlow::Continue(())).unwrap();
    set
}

/// Peak resident memory so far, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}
