//! Conversion of a tiny FLUX: the files that are written, the record, and a patch extracted from the result.

#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_convert::{AttentionOverlay, AttentionPatch, ConversionPlan, PatchMode, SourceHashes, TRANSFORMER_FILE};
use clearform_layout::{Dequantized, Hints, Identified, Manifests, detect};
use clearform_portable_model::{CopyMode, Overwrite, PortableModel, StagingDir};
use clearform_weights::{
    Checkpoint, Dtype, InMemoryTensors, RawTensor, TensorInfo, TensorSource, WeightsError, digest,
};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const QUERY: &str = "transformer_blocks.0.attn.to_q.weight";
const POOLED: &str = "single_transformer_blocks.0.attn.processor.spatial_weight";

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/flux/head24")
}

/// A pipeline folder around the fixture's transformer, in f32.
fn source(folder: &Path) -> PathBuf {
    let root = folder.join("source");
    let transformer = root.join("transformer");
    std::fs::create_dir_all(&transformer).unwrap();
    std::fs::copy(fixture().join("config.json"), transformer.join("config.json")).unwrap();
    let weights = transformer.join("diffusion_pytorch_model.safetensors");
    let stored = Checkpoint::open(fixture().join("weights.safetensors")).unwrap();
    let widened = InMemoryTensors::load(&stored, Some(DType::F32), &Device::Cpu).unwrap();
    clearform_weights::save(&weights, &widened, &BTreeMap::new()).unwrap();
    std::fs::create_dir_all(root.join("vae/deep")).unwrap();
    std::fs::write(root.join("vae/deep/config.json"), "{}").unwrap();
    std::fs::write(root.join("model_index.json"), "{\"_class_name\": \"FluxPipeline\"}").unwrap();
    root
}

fn open(path: &Path) -> (Checkpoint, Identified) {
    let manifests = Manifests::embedded().unwrap();
    let checkpoint = Dequantized::open(path, &manifests).unwrap();
    let identified = detect(&checkpoint, &manifests, &Hints::default()).unwrap();
    (Checkpoint::open(path).unwrap(), identified)
}

fn write(plan: &ConversionPlan, checkpoint: &Checkpoint, source: &dyn TensorSource, target: &Path) -> Vec<String> {
    let mut stage = StagingDir::begin(target, Overwrite::Never).unwrap();
    let (_, identified) = open(checkpoint.path());
    let canonical = identified.canonical(checkpoint);
    let mut progress = Vec::new();
    let mut watch = |done, all| {
        progress.push((done, all));
        ControlFlow::Continue(())
    };
    let report = plan.apply(source, canonical.load_report(), &mut stage, &mut watch);
    let report = report.unwrap();
    assert!(report.load_report.is_complete());
    assert_eq!(report.load_report.used(), checkpoint.tensors().len());
    assert!(!target.exists());
    let record = plan.record(SourceHashes::start(checkpoint).wait().unwrap()).unwrap();
    plan.write_card(&record, &stage).unwrap();
    stage.finish(record).unwrap();
    let written = Checkpoint::open(target.join(TRANSFORMER_FILE)).unwrap().tensors();
    let bytes: u64 = written.iter().map(TensorInfo::byte_count).sum();
    assert_eq!(progress.len(), written.len());
    assert_eq!(progress.last(), Some(&(bytes, bytes)));
    assert_eq!(report.parameters, written.iter().map(|info| info.shape.iter().product::<usize>() as u64).sum::<u64>());
    report.added
}

#[test]
fn a_pipeline_becomes_a_portable_model() {
    let folder = tempfile::tempdir().unwrap();
    let root = source(folder.path());
    let (checkpoint, identified) = open(&root.join("transformer"));
    let plan = ConversionPlan::new(&identified, "clear:r=3".parse().unwrap())
        .with_components(vec![root.clone()], CopyMode::Copy);
    let model = folder.path().join("model");
    assert!(write(&plan, &checkpoint, &identified.canonical(&checkpoint), &model).is_empty());

    let opened = PortableModel::open(&model).unwrap();
    assert_eq!(opened.record().family, "flux");
    assert_eq!(opened.record().plan().unwrap().to_string(), "clear:r=3");
    let hash = digest(root.join("transformer/diffusion_pytorch_model.safetensors")).unwrap().sha256;
    assert_eq!(opened.record().source[0].sha256, hash);
    assert_eq!(std::fs::read_to_string(model.join("vae/deep/config.json")).unwrap(), "{}");
    assert!(std::fs::read_to_string(model.join("README.md")).unwrap().contains("It was not distilled"));
    let report = PortableModel::verify(&model).unwrap();
    assert!(report.is_intact() && report.unchanged == 5, "{report}");

    let (written, again) = open(&model.join("transformer"));
    assert_eq!(again.config["num_layers"], identified.config["num_layers"]);
    assert_eq!(written.tensors(), checkpoint.tensors());
    for info in written.tensors() {
        assert_eq!(written.read(&info.name).unwrap(), checkpoint.read(&info.name).unwrap(), "{}", info.name);
    }
}

#[test]
fn dtypes_change_and_learned_tensors_are_added() {
    let folder = tempfile::tempdir().unwrap();
    let root = source(folder.path());
    let (checkpoint, identified) = open(&root.join("transformer"));
    let plan = ConversionPlan::new(&identified, "clear:r=3,d=2".parse().unwrap()).with_dtype(Some(DType::BF16));
    let model = folder.path().join("model");
    let added = write(&plan, &checkpoint, &identified.canonical(&checkpoint), &model);
    assert_eq!(added.len(), 3);
    let (written, again) = open(&model.join(TRANSFORMER_FILE));
    assert!(again.canonical(&written).load_report().is_complete());
    let values =
        |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for info in checkpoint.tensors() {
        let converted = written.tensor(&info.name).unwrap();
        assert_eq!(converted.dtype(), DType::BF16, "{}", info.name);
        let wanted = checkpoint.tensor(&info.name).unwrap().to_dtype(DType::BF16).unwrap();
        assert_eq!(values(&converted), values(&wanted), "{}", info.name);
    }
    for name in added {
        assert_eq!(values(&written.tensor(&name).unwrap()), [0.25; 4], "{name}");
    }
}

#[test]
fn a_patch_turns_the_teacher_into_the_student() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, identified) = open(&source(folder.path()).join("transformer"));
    let attention: AttentionPlan = "clear:r=3,d=2".parse().unwrap();
    let trained: InMemoryTensors = [
        (QUERY.to_owned(), (checkpoint.tensor(QUERY).unwrap() + 1.0).unwrap()),
        (POOLED.to_owned(), Tensor::full(0.5f32, &[1, 1, 1, 2, 1, 2, 1], &Device::Cpu).unwrap()),
    ]
    .into_iter()
    .collect();
    let plan = ConversionPlan::new(&identified, attention.clone());
    let model = folder.path().join("model");
    let canonical = identified.canonical(&checkpoint);
    let added = write(&plan, &checkpoint, &AttentionOverlay::new(&canonical, &trained), &model);
    assert_eq!(added.len(), 2, "the third spatial weight was trained");

    let (student, kind) = open(&model.join("transformer"));
    let student = kind.canonical(&student);
    let path = folder.path().join("patch.safetensors");
    // The query, and a spatial weight in each of three layers, which the teacher does not have.
    assert_eq!(AttentionPatch::extract(&student, &canonical, "flux", &attention, &path).unwrap(), 4);
    let patch = AttentionPatch::open(&path, None).unwrap();
    assert_eq!(patch.plan(), &attention);
    for mode in [PatchMode::Replace, PatchMode::Shift] {
        let patched = patch.apply_to(&canonical, mode, Some(&canonical)).unwrap();
        assert_eq!(patched.tensors(), student.tensors());
        for info in patched.tensors() {
            let difference = (patched.tensor(&info.name).unwrap() - student.tensor(&info.name).unwrap()).unwrap();
            let largest = difference.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(largest.to_scalar::<f32>().unwrap() < 1e-6, "{} by {mode:?}", info.name);
        }
    }
}

/// `cargo test --release -p clearform-convert --test conversion -- --ignored --nocapture`: writes 12 GB.
#[test]
#[ignore = "writes 12 GB"]
fn six_gigabytes_are_converted_in_less_than_one_gigabyte_of_memory() {
    let folder = tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap();
    let path = folder.path().join("large.safetensors");
    let bytes = large(&path);
    let (checkpoint, identified) = open(&path);
    let plan = ConversionPlan::new(&identified, "clear:r=16".parse().unwrap()).with_dtype(Some(DType::F16));
    let model = folder.path().join("model");
    write(&plan, &checkpoint, &identified.canonical(&checkpoint), &model);
    assert!(PortableModel::verify(&model).unwrap().is_intact());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().to_owned();
    eprintln!("{bytes} bytes converted, peak resident memory {peak}");
    let kilobytes: u64 = peak.split_whitespace().next().unwrap().parse().unwrap();
    assert!(bytes > 6_000_000_000 && kilobytes < 1_000_000, "{bytes} bytes, {peak}");
}

/// The fixture's blocks at FLUX's width, 4 double and 12 single, in bf16.
fn large(path: &Path) -> u64 {
    let fixture = Checkpoint::open(fixture().join("weights.safetensors")).unwrap();
    let mut tensors = BTreeMap::new();
    for info in fixture.tensors() {
        let shape: Vec<usize> = info.shape.iter().map(|&size| enlarged(size)).collect();
        let names: Vec<String> = match info.name.split_once("blocks.0.") {
            Some((kind, rest)) => {
                let count = if kind == "transformer_" { 4 } else { 12 };
                (0..count).map(|block| format!("{kind}blocks.{block}.{rest}")).collect()
            }
            None if info.name.contains("blocks.") => Vec::new(),
            None => vec![info.name],
        };
        tensors.extend(names.into_iter().map(|name| (name, shape.clone())));
    }
    let info = |(name, shape)| TensorInfo { name, dtype: Dtype::BF16, shape };
    let tensors: Vec<TensorInfo> = tensors.into_iter().map(info).collect();
    let filled = |info: &TensorInfo| -> Result<RawTensor, WeightsError> {
        let bytes = vec![0x3c; info.shape.iter().product::<usize>() * 2];
        Ok(RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    };
    clearform_weights::write(path, &tensors, &BTreeMap::new(), filled).unwrap().size
}

/// The size of FLUX.1 (3072 wide, heads of 128) for a size of the fixture (48 wide, heads of 24).
fn enlarged(size: usize) -> usize {
    match size {
        256 => 256,
        24 => 128,
        20 => 4096,
        12 => 768,
        16 => 64,
        multiple => multiple / 48 * 3072,
    }
}
