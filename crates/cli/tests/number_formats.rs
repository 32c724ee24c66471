//! Every number format of safetensors through every command that reads models: it is computed with, or refused by name
//! before anything is called complete.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Tensor;
use clearform_weights::{Dtype, TensorSource, digest, save};
use common::{RawTensors, Tiny, clearform, json, run, text};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const COMPUTED: [Dtype; 6] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2];
const REFUSED: [Dtype; 16] = [
    Dtype::BOOL,
    Dtype::F4,
    Dtype::F6_E2M3,
    Dtype::F6_E3M2,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8_E8M0,
    Dtype::F8_E4M3FNUZ,
    Dtype::F8_E5M2FNUZ,
    Dtype::I16,
    Dtype::U16,
    Dtype::I32,
    Dtype::U32,
    Dtype::C64,
    Dtype::I64,
    Dtype::U64,
];
/// The first of the tensors that have the format.
const FIRST: &str = "single_transformer_blocks.0.attn.to_k.weight";

/// Whether a tensor of the tiny FLUX is stored in the format that is tested.
fn is_tested(name: &str, tensor: &Tensor) -> bool {
    tensor.rank() == 2 && name.contains("blocks.")
}

/// The tiny FLUX whose matrices in blocks are zeros in `dtype`.
fn stored_in(dtype: Dtype) -> Tiny {
    with_zeros(dtype, is_tested)
}

/// The model that [`stored_in`] was distilled from, in f32: it differs in attention alone.
fn base_in_f32() -> Tiny {
    with_zeros(Dtype::F32, |name, tensor| is_tested(name, tensor) && !name.contains(".attn.to_q"))
}

fn with_zeros(dtype: Dtype, are_zero: fn(&str, &Tensor) -> bool) -> Tiny {
    let tiny = Tiny::new();
    let mut tensors = RawTensors::default();
    for (name, tensor) in &tiny.tensors {
        match are_zero(name, tensor) {
            true => {
                let bytes = tensor.elem_count() * dtype.bitsize() / 8;
                tensors.put(name.clone(), dtype, tensor.dims(), vec![0; bytes]);
            }
            false => tensors.put_tensor(name, tensor.clone()),
        }
    }
    save(weights_of(tiny.path()), &tensors, &BTreeMap::new()).unwrap();
    tiny
}

fn weights_of(model: &Path) -> PathBuf {
    model.join("diffusion_pytorch_model.safetensors")
}

/// A portable model whose transformer is `weights`, which its record states.
fn portable_model(weights: &Path, folder: &Path) -> PathBuf {
    let model = folder.join("portable");
    run(0, &["convert", text(Tiny::new().path()), "--no-distill", "-o", text(&model)]);
    let file = "transformer/diffusion_pytorch_model.safetensors";
    std::fs::copy(weights, model.join(file)).unwrap();
    let mut record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let recorded = record["file"].as_array_mut().unwrap().iter_mut().find(|entry| entry["path"].as_str() == Some(file));
    let found = digest(weights).unwrap();
    let recorded = recorded.unwrap().as_table_mut().unwrap();
    recorded.insert("size".to_owned(), toml::Value::Integer(found.size as i64));
    recorded.insert("sha256".to_owned(), toml::Value::String(found.sha256));
    std::fs::write(model.join("clearform.toml"), record.to_string()).unwrap();
    model
}

/// The commands that read the model `MODEL` or the portable model `PORTABLE`; what they write is `OUTPUT`.
const COMMANDS: [&str; 9] = [
    "inspect MODEL",
    "convert MODEL --no-distill -o OUTPUT",
    "convert MODEL --no-distill --dtype bf16 -o OUTPUT",
    "convert MODEL --no-distill --dtype f16 -o OUTPUT",
    "export MODEL --to bfl -o OUTPUT",
    "forward MODEL --inputs INPUTS -o OUTPUT",
    "verify PORTABLE",
    "patch extract PORTABLE --base PLAIN -o OUTPUT",
    "patch extract PLAIN-PORTABLE --base MODEL -o OUTPUT",
];

#[test]
fn every_format_is_computed_with_or_refused_by_every_command() {
    let plain = base_in_f32();
    let plain_portable = portable_model(&weights_of(plain.path()), plain.path());
    for dtype in COMPUTED.into_iter().chain(REFUSED) {
        let tiny = stored_in(dtype);
        let folder = tempfile::tempdir().unwrap();
        let portable = portable_model(&weights_of(tiny.path()), folder.path());
        let inputs = folder.path().join("inputs.safetensors");
        common::save_inputs(&inputs);
        for (number, command) in COMMANDS.iter().enumerate() {
            let target = folder.path().join(format!("output-{number}.safetensors"));
            let argument = |word: &str| match word {
                "MODEL" => tiny.path().to_owned(),
                "PLAIN" => plain.path().to_owned(),
                "PORTABLE" => portable.clone(),
                "PLAIN-PORTABLE" => plain_portable.clone(),
                "INPUTS" => inputs.clone(),
                "OUTPUT" => target.clone(),
                word => word.into(),
            };
            let arguments: Vec<PathBuf> = command.split(' ').map(argument).collect();
            let output = clearform(&arguments.iter().map(|path| text(path)).collect::<Vec<_>>()).output().unwrap();
            let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            let wanted = i32::from(!COMPUTED.contains(&dtype));
            assert_eq!(output.status.code(), Some(wanted), "{dtype:?}: {command}\n{said}");
            if wanted == 1 {
                let what = format!("{FIRST:?} is stored in {dtype:?}, which cannot be computed with");
                let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
                assert!(said.contains(&what) && said.contains("use the bf16"), "{dtype:?}: {command}\n{said}");
                assert!(!target.exists(), "{dtype:?}: {command}");
            }
        }
    }
}

#[test]
fn inspect_lists_what_cannot_be_computed_with() {
    let tiny = stored_in(Dtype::I8);
    let found = json(1, &["inspect", text(tiny.path())]);
    let listed = found["uncomputable"].as_array().unwrap();
    let matrices = tiny.tensors.iter().filter(|(name, tensor)| is_tested(name, tensor));
    assert_eq!(listed.len(), matrices.count());
    assert_eq!(listed[0], serde_json::json!({ "name": FIRST, "found": "I8" }));
    assert_eq!(found["complete"], false);
    assert_eq!(found["missing"].as_array().unwrap().len() + found["misshapen"].as_array().unwrap().len(), 0);
}

/// A pipeline is asked about its text encoders and VAE too, before anything is written.
#[test]
fn components_in_other_formats_are_refused_by_name() {
    for (name, tensor) in [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("vae", "decoder.conv_in.weight"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let [pipeline, target, image] = ["pipeline", "written", "image.png"].map(|name| folder.path().join(name));
        common::forms::copy(&common::repository("assets/mini-flux/base"), &pipeline);
        let file = if name == "vae" { "diffusion_pytorch_model.safetensors" } else { "model.safetensors" };
        let stored = clearform_weights::Checkpoint::open(pipeline.join(name).join(file)).unwrap();
        let mut tensors = RawTensors::default();
        for info in stored.tensors() {
            tensors.0.insert(info.name.clone(), stored.read(&info.name).unwrap());
        }
        let shape = tensors.0[tensor].shape.clone();
        tensors.put(tensor.to_owned(), Dtype::I8, &shape, vec![0; shape.iter().product()]);
        save(pipeline.join(name).join(file), &tensors, &BTreeMap::new()).unwrap();
        for command in [
            &["inspect", text(&pipeline)][..],
            &["convert", text(&pipeline), "--no-distill", "-o", text(&target)],
            &["generate", text(&pipeline), "a fox", "--steps", "1", "-o", text(&image)],
        ] {
            let said = common::stderr_of(1, command);
            assert!(said.contains(tensor) && said.contains(name) && said.contains("is stored in I8"), "{said}");
            assert!(!target.exists() && !image.exists(), "{command:?}");
        }
    }
}

/// f16 ends at 65504; a value beyond would become infinite.
#[test]
fn a_dtype_that_cannot_hold_a_value_is_refused() {
    let mut tiny = Tiny::new();
    let scaled = (tiny.tensors[FIRST].abs().unwrap() + 7e4).unwrap();
    tiny.tensors.insert(FIRST.to_owned(), scaled);
    tiny.save();
    let target = tiny.path().join("written");
    let convert = |dtype: &str, code: i32| {
        run(code, &["convert", text(tiny.path()), "--no-distill", "--dtype", dtype, "-o", text(&target)])
    };
    let said = String::from_utf8(convert("f16", 1).stderr).unwrap();
    assert!(said.contains(FIRST) && said.contains("does not fit f16") && said.contains("bf16 or f32"), "{said}");
    assert!(!target.exists());
    convert("bf16", 0);
}

/// A scale of ones beside integers is no reason to take them for values.
#[test]
fn integers_with_scales_are_named() {
    for (suffix, name) in [("scale", "SDNQ"), ("zero_point", "SDNQ"), ("weight._scale", "quanto")] {
        let tiny = stored_in(Dtype::U8);
        let mut tensors = RawTensors::default();
        let checkpoint = clearform_weights::Checkpoint::open(weights_of(tiny.path())).unwrap();
        for info in checkpoint.tensors() {
            tensors.0.insert(info.name.clone(), checkpoint.read(&info.name).unwrap());
        }
        tensors.put(format!("transformer_blocks.0.attn.to_q.{suffix}"), Dtype::F32, &[1], vec![0; 4]);
        save(weights_of(tiny.path()), &tensors, &BTreeMap::new()).unwrap();
        let said = common::stderr_of(1, &["inspect", text(tiny.path())]);
        assert!(said.contains(&format!("quantised with {name}")), "{said}");
    }
}
