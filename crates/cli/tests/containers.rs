//! One FLUX model in every container of 16-bit values: each runs and converts as the model it contains. gguf.rs and
//! fp8.rs test quantised files, components.rs all-in-one files.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor};
use clearform_testkit::{assert_close, fixture};
use clearform_weights::{InMemoryTensors, TensorSource};
use common::{Tiny, expected, forward, json, repository, run, text};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

type Tensors = HashMap<String, Tensor>;

/// The tiny model in bf16, as a diffusers folder.
fn original() -> Tiny {
    let mut tiny = Tiny::new();
    tiny.tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::BF16).unwrap());
    tiny.save();
    tiny
}

fn exported(tiny: &Tiny, layout: &str, folder: &Path) -> PathBuf {
    let path = folder.join(format!("{layout}.safetensors"));
    run(0, &["export", text(tiny.path()), "--to", layout, "-o", text(&path)]);
    path
}

/// The model with the prefixes that torch.compile, DDP and FSDP add to tensor names.
fn wrapped(model: &Path, folder: &Path) -> PathBuf {
    let with_fsdp = |name: &str| name.replacen("blocks.0.", "blocks.0._fsdp_wrapped_module.", 1);
    let wrapped = |(name, tensor): (String, Tensor)| (format!("module._orig_mod.{}", with_fsdp(&name)), tensor);
    let path = folder.join("wrapped.safetensors");
    let tensors: Tensors = fixture(model).into_iter().map(wrapped).collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

/// The model as written by `torch.save({"model": ..., "step": 7}, path)`: a zip archive of a pickle and a record per
/// tensor.
fn torch(model: &Path, folder: &Path) -> PathBuf {
    let tensors: Tensors = fixture(model).into_iter().collect();
    let (mut items, mut records) = (Vec::new(), Vec::new());
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        items.push([pickled_text(name), pickled(tensor, &key.to_string())].concat());
        let bytes = InMemoryTensors::from_iter([("x".to_owned(), tensor.clone())]).read("x").unwrap().bytes;
        records.push((format!("flux/data/{key}"), bytes));
    }
    let model = [pickled_text("model"), b"}(".to_vec(), items.concat(), b"u".to_vec()].concat();
    let state = [model, pickled_text("step"), b"K\x07".to_vec()].concat();
    let pickle = [b"\x80\x02}(", &state[..], b"u."].concat();
    records.push(("flux/data.pkl".to_owned(), pickle));
    let path = folder.join("flux.pt");
    std::fs::write(&path, archive(&records)).unwrap();
    path
}

/// A string in pickle: BINUNICODE.
fn pickled_text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A tuple of integers in pickle: MARK, BININT and TUPLE.
fn pickled_tuple(values: &[usize]) -> Vec<u8> {
    let integer = |&value: &usize| [&b"J"[..], &(value as i32).to_le_bytes()].concat();
    [b"(", values.iter().flat_map(integer).collect::<Vec<_>>().as_slice(), b"t"].concat()
}

/// A tensor in pickle: a call of `torch._utils._rebuild_tensor_v2`.
fn pickled(tensor: &Tensor, key: &str) -> Vec<u8> {
    let count = pickled_tuple(&[tensor.elem_count()]);
    let count = &count[1..count.len() - 1];
    let class = b"ctorch\nBFloat16Storage\n";
    let storage =
        [b"(", &pickled_text("storage")[..], class, &pickled_text(key), &pickled_text("cpu"), count, b"tQ"].concat();
    let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(";
    [&rebuild[..], &storage, b"K\0", &pickled_tuple(tensor.dims()), &pickled_tuple(tensor.stride()), b"\x89NtR"]
        .concat()
}

/// A zip archive of uncompressed records.
fn archive(records: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in records {
        let at = (file.len() as u32).to_le_bytes();
        let sizes = [bytes.len() as u32; 2].map(u32::to_le_bytes).concat();
        let length = (name.len() as u16).to_le_bytes();
        file.extend([b"PK\x03\x04", &[0; 14][..], &sizes, &length, &[0; 2], name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02", &[0; 16][..], &sizes, &length, &[0; 12], &at, name.as_bytes()].concat());
    }
    let end = [directory.len(), file.len()].map(|number| (number as u32).to_le_bytes()).concat();
    [&file[..], &directory, b"PK\x05\x06\0\0\0\0\0\0\0\0", &end, &[0; 2]].concat()
}

/// The container rounds to bf16: no error against the same values, and a rounding error against the f16 values of
/// diffusers.
fn check(file: &Path, layout: &str, tiny: &Tiny) {
    let folder = tempfile::tempdir().unwrap();
    let config = repository("tests/fixtures/flux/head24/config.json");
    let config = ["--config", text(&config)];
    let found = json(0, &[&["inspect", text(file)], &config[..]].concat());
    assert_eq!((&found["layout"], &found["complete"]), (&layout.into(), &true.into()));

    let full = forward(file, &config);
    assert_close("full", &full, &forward(tiny.path(), &[]), 0.0);
    assert_close("full, by diffusers", &full, &expected("full"), 1e-2);
    let model = folder.path().join("model");
    let convert = ["convert", text(file), "-o", text(&model), "--radius", "3", "--no-distill"];
    run(0, &[&convert[..], &config].concat());
    let linear = forward(tiny.path(), &["--attention", "clear:r=3"]);
    assert_close("converted", &forward(&model, &[]), &linear, 0.0);
    run(0, &["verify", text(&model)]);
}

#[test]
fn every_container_runs_and_converts_as_the_model_it_contains() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), original());
    check(tiny.path(), "diffusers", &tiny);
    let bfl = exported(&tiny, "bfl", folder.path());
    check(&bfl, "bfl", &tiny);
    check(&exported(&tiny, "comfy", folder.path()), "comfy", &tiny);
    check(&torch(&bfl, folder.path()), "bfl", &tiny);
    check(&wrapped(&bfl, folder.path()), "bfl", &tiny);
}
