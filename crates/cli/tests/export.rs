//! `clearform export`: a model exported to another layout and back has the same bits.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Tensor;
use clearform_testkit::{assemble_pipeline, assert_close, seeded_file};
use clearform_weights::{Checkpoint, RawTensor, TensorSource};
use common::{Tiny, forward, json, repository, run, stderr_of, text};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

fn tensors(path: &Path) -> BTreeMap<String, RawTensor> {
    let file = Checkpoint::open(path).unwrap();
    file.tensors().into_iter().map(|info| (info.name.clone(), file.read(&info.name).unwrap())).collect()
}

/// Exports `model` to `layout`, whose files have a tensor `witness`, and back with `export` and with `convert`. What the
/// tensors do not tell is in the file's metadata.
fn check(model: &Path, folder: &Path, (layout, found, witness): (&str, &str, &str)) {
    let path = |name: &str| folder.join(format!("{layout}-{name}"));
    let (file, back, converted) = (path("file.safetensors"), path("back.safetensors"), path("model"));
    let done = json(0, &["export", text(model), "--to", layout, "-o", text(&file)]);
    assert_eq!((&done["layout"], done["skipped"].as_array().unwrap().len()), (&found.into(), 0));
    let exported = tensors(&file);
    assert!(exported.contains_key(witness), "{layout}: {:?}", exported.keys());
    assert_eq!(done["written"].as_u64().unwrap(), exported.len() as u64);
    let opened = Checkpoint::open(&file).unwrap();
    assert_eq!(opened.metadata().keys().collect::<Vec<_>>(), ["clearform.config", "format"]);
    let config: serde_json::Value = serde_json::from_str(&opened.metadata()["clearform.config"]).unwrap();
    assert_eq!(opened.config(), Some(&config));
    let inspected = json(0, &["inspect", text(&file)]);
    assert_eq!((&inspected["layout"], &inspected["complete"]), (&found.into(), &true.into()));
    assert_eq!(inspected["config"], config);

    let original = tensors(&model.join("transformer"));
    assert_eq!(done["used"].as_u64().unwrap(), original.len() as u64);
    run(0, &["export", text(&file), "--to", "diffusers", "-o", text(&back)]);
    assert!(tensors(&back) == original, "{layout}: differs after two exports");
    run(0, &["convert", text(&file), "--no-distill", "--attention", "full", "-o", text(&converted)]);
    assert!(tensors(&converted.join("transformer")) == original, "{layout}: differs after convert");
    run(0, &["export", text(&converted), "--to", layout, "-o", text(&path("again.safetensors"))]);
    assert!(std::fs::read(path("again.safetensors")).unwrap() == std::fs::read(&file).unwrap(), "{layout}: again");
}

#[test]
fn flux_round_trips_through_every_layout() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), Tiny::new());
    let model = folder.path().join("pipeline");
    std::fs::create_dir(&model).unwrap();
    std::fs::rename(tiny.path(), model.join("transformer")).unwrap();
    for case in [
        ("original", "bfl", "double_blocks.1.img_attn.norm.key_norm.scale"),
        ("bfl", "bfl", "single_blocks.0.linear1.weight"),
        ("comfy", "comfy", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
        ("diffusers", "diffusers", "single_transformer_blocks.0.proj_mlp.weight"),
    ] {
        check(&model, folder.path(), case);
    }
}

#[test]
fn sd3_round_trips_through_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("pipeline");
    assemble_pipeline(&repository(""), "sd3", &model);
    for case in [
        ("original", "original", "joint_blocks.0.x_block.attn.qkv.weight"),
        ("comfy", "comfy", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    ] {
        check(&model, folder.path(), case);
    }
}

/// From Facebook's names to diffusers', where every block has its own copy of the embedders, and back.
#[test]
fn dit_round_trips_through_its_authors_layout() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let stored = seeded_file(repository("tests/fixtures/dit/original/shapes.json"), "");
    let stored: HashMap<String, Tensor> = stored.into_iter().collect();
    candle_core::safetensors::save(&stored, path("facebook.safetensors")).unwrap();
    std::fs::write(path("config.json"), r#"{"attention_head_dim": 16}"#).unwrap();
    let (file, model, config) = (path("facebook.safetensors"), path("model"), path("config.json"));
    let reading = ["--family", "dit", "--config", text(&config)];
    run(
        0,
        &[&["convert", text(&file), "-o", text(&model), "--no-distill", "--attention", "full"], &reading[..]].concat(),
    );
    check(&model, folder.path(), ("original", "original", "blocks.0.attn.qkv.weight"));
    let (mut original, mut exported) = (tensors(&file), tensors(&path("original-file.safetensors")));
    // The positions are computed on export: diffusers does not store them, and Facebook's code needs them.
    let stored = original.remove("pos_embed").unwrap();
    let computed = exported.remove("pos_embed").unwrap();
    assert!(exported == original);
    assert_eq!((stored.dtype, &stored.shape), (computed.dtype, &computed.shape));
    let computed = computed.to_tensor("pos_embed").unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
    let width = computed[0].len();
    let first: Vec<f32> = (0..width).map(|at| f32::from(at % (width / 2) >= width / 4)).collect();
    assert_eq!(computed[0], first);
    assert_eq!((computed[1][0], computed[1][width / 2]), (1f32.sin(), 0.0));

    // The authors' layout has one embedder for all blocks; separately trained copies do not fit in.
    assemble_pipeline(&repository(""), "dit", &path("apart"));
    let message =
        stderr_of(1, &["export", text(&path("apart")), "--to", "original", "-o", text(&path("none.safetensors"))]);
    assert!(message.contains("timestep_embedder") && message.contains("stores both as one tensor"), "{message}");
    let names = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let unfinished = names.filter(|name| name.to_string_lossy().ends_with(".part"));
    assert!(!path("none.safetensors").exists() && unfinished.count() == 0);
}

#[test]
fn existing_files_are_kept_and_wrong_layouts_are_answered_with_the_choices() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), Tiny::new());
    let file = folder.path().join("file.safetensors");
    std::fs::write(&file, "kept").unwrap();
    let arguments = ["export", text(tiny.path()), "--to", "bfl", "-o", text(&file)];
    assert!(stderr_of(1, &arguments).contains("already exists; pass --overwrite"));
    assert_eq!(std::fs::read(&file).unwrap(), b"kept");
    run(0, &[&arguments[..], &["--overwrite"]].concat());
    assert!(tensors(&file).contains_key("img_in.weight"));
    let message = stderr_of(1, &["export", text(tiny.path()), "--to", "bfl", "-o", text(folder.path()), "--overwrite"]);
    assert!(message.contains("is a folder"), "{message}");
    let other = folder.path().join("other.safetensors");
    let message = stderr_of(1, &["export", text(tiny.path()), "--to", "kohya", "-o", text(&other)]);
    assert!(message.contains("\"kohya\"") && message.contains("bfl") && message.contains("comfy"), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// The file contains the tensors of pooled attention, and in its metadata the plan, with which it is run.
#[test]
fn a_portable_model_is_exported_with_its_pooling_tensors() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), Tiny::new());
    let (model, file) = (folder.path().join("model"), folder.path().join("file.safetensors"));
    run(0, &["convert", text(tiny.path()), "-o", text(&model), "--radius", "3", "--pool", "2", "--no-distill"]);
    let message = stderr_of(0, &["export", text(&model), "--to", "original", "-o", text(&file)]);
    assert!(message.contains("hold the plan clear:r=3,d=2"), "{message}");
    let ran = forward(&file, &[]);
    assert_close("its recorded plan", &ran, &forward(&model, &[]), 0.0);
    let back = folder.path().join("back.safetensors");
    run(0, &["export", text(&file), "--to", "diffusers", "-o", text(&back)]);
    let original = tensors(&model.join("transformer"));
    assert!(original.contains_key("transformer_blocks.0.attn.processor.spatial_weight") && tensors(&back) == original);
}
