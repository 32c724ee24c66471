//! Written files are read back the same, by this crate and by the safetensors library; folders open as diffusers and
//! transformers save them.
#![allow(clippy::unwrap_used)]

use clearform_weights::{
    Checkpoint, Digest, Dtype, InMemoryTensors, RawTensor, TensorInfo, TensorSource, WeightsError, digest,
    hub_snapshot, save,
};
use std::collections::BTreeMap;
use std::path::Path;

fn tensor(dtype: Dtype, shape: &[usize], seed: u8) -> RawTensor {
    let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let bytes = (0..size).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    RawTensor { dtype, shape: shape.to_vec(), bytes }
}

fn info(name: &str, tensor: &RawTensor) -> TensorInfo {
    TensorInfo { name: name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.clone() }
}

fn write(path: &Path, tensors: &[(&str, RawTensor)]) -> Digest {
    let infos: Vec<_> = tensors.iter().map(|(name, tensor)| info(name, tensor)).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let read = |info: &TensorInfo| -> Result<RawTensor, WeightsError> {
        Ok(tensors.iter().find(|(name, _)| *name == info.name).unwrap().1.clone())
    };
    clearform_weights::write(path, &infos, &metadata, read).unwrap()
}

fn samples() -> Vec<(&'static str, RawTensor)> {
    vec![
        ("odd bytes", tensor(Dtype::U8, &[3], 1)),
        ("blocks.0.weight", tensor(Dtype::BF16, &[3, 5], 2)),
        ("scalar", tensor(Dtype::F32, &[], 3)),
        ("nothing", tensor(Dtype::F32, &[0, 7], 4)),
        ("wide", tensor(Dtype::F64, &[2, 2], 5)),
        ("fp8", tensor(Dtype::F8_E4M3, &[5], 6)),
    ]
}

#[test]
fn written_tensors_come_back_and_the_library_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.safetensors");
    let written = write(&path, &samples());
    assert_eq!(written, digest(&path).unwrap());
    let checkpoint = Checkpoint::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let library = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(library.len(), samples().len());
    for (name, expected) in samples() {
        assert_eq!(checkpoint.read(name).unwrap(), expected, "{name}");
        let view = library.tensor(name).unwrap();
        assert_eq!(
            (view.dtype(), view.shape(), view.data()),
            (expected.dtype, &expected.shape[..], &expected.bytes[..])
        );
        let middle = expected.bytes.len() / 3..expected.bytes.len() / 2;
        assert_eq!(checkpoint.read_range(name, middle.clone()).unwrap(), expected.bytes[middle], "{name}");
        let too_long = checkpoint.read_range(name, 0..expected.bytes.len() + 1);
        assert!(matches!(too_long, Err(WeightsError::BadTensor { .. })), "{name}");
    }
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert_eq!(checkpoint.files()[0].size, bytes.len() as u64);
    assert!(matches!(checkpoint.read("gone"), Err(WeightsError::Missing { .. })));
}

#[test]
fn files_of_the_library_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("library.safetensors");
    let samples = samples();
    let views = samples.iter().map(|(name, raw)| {
        (*name, safetensors::tensor::TensorView::new(raw.dtype, raw.shape.clone(), &raw.bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    for (name, expected) in &samples {
        assert_eq!(&checkpoint.read(name).unwrap(), expected);
    }
}

#[test]
fn saving_a_source_keeps_every_bit() {
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("1.safetensors");
    let second = folder.path().join("2.safetensors");
    write(&first, &samples()[..5]);
    let source = Checkpoint::open(&first).unwrap();
    let in_memory = InMemoryTensors::load(&source, None, &candle_core::Device::Cpu).unwrap();
    save(&second, &in_memory, source.metadata()).unwrap();
    assert_eq!(std::fs::read(first).unwrap(), std::fs::read(second).unwrap());
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write(&path, &samples());
    let before = std::fs::read(&path).unwrap();
    let raw = tensor(Dtype::F32, &[2], 0);
    let refused = |infos: &[TensorInfo], b: Option<RawTensor>| {
        let read = |info: &TensorInfo| match info.name.as_str() {
            "a" => Ok(raw.clone()),
            name => b.clone().ok_or_else(|| WeightsError::Missing { name: name.to_owned() }),
        };
        clearform_weights::write(&path, infos, &BTreeMap::new(), read).unwrap_err()
    };
    let a = info("a", &raw);
    let b = info("b", &raw);
    assert!(matches!(refused(&[a.clone(), b.clone()], None), WeightsError::Missing { name } if name == "b"));
    let wide = refused(&[a.clone(), b], Some(tensor(Dtype::F32, &[3], 0))).to_string();
    assert_eq!(wide, "tensor \"b\": expected F32 [2], found F32 [3] in 12 bytes");
    assert_eq!(refused(&[a.clone(), a], None).to_string(), "tensor \"a\": the name is given twice");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// (what the folder is, its files, name of the index)
#[test]
fn folders_open_as_the_libraries_save_them() {
    let index = br#"{"metadata":{"total_size":8},"weight_map":{"a":"s-1.safetensors","b":"s-2.safetensors"}}"#;
    let cases: [(&str, &[&str], Option<&str>); 7] = [
        ("diffusers", &["diffusion_pytorch_model.safetensors"], None),
        ("a variant", &["diffusion_pytorch_model.fp16.safetensors"], None),
        ("transformers", &["model.safetensors"], None),
        ("sharded", &["s-1.safetensors", "s-2.safetensors"], Some("diffusion_pytorch_model.safetensors.index.json")),
        ("sharded text encoder", &["s-1.safetensors", "s-2.safetensors"], Some("model.safetensors.index.json")),
        ("shards alone", &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        ("any one file", &["flux1-dev.safetensors"], None),
    ];
    for (what, files, index_name) in cases {
        let folder = tempfile::tempdir().unwrap();
        for (file, name) in files.iter().zip(["a", "b"]) {
            write(&folder.path().join(file), &[(name, tensor(Dtype::F32, &[2], 9))]);
        }
        if let Some(name) = index_name {
            std::fs::write(folder.path().join(name), index).unwrap();
        }
        std::fs::write(folder.path().join("config.json"), br#"{"_class_name":"X"}"#).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let names: Vec<String> = checkpoint.tensors().into_iter().map(|info| info.name).collect();
        assert_eq!(names, ["a", "b"][..files.len()], "{what}");
        assert_eq!(checkpoint.config().unwrap()["_class_name"], "X", "{what}");
        assert_eq!(checkpoint.read(&names[names.len() - 1]).unwrap(), tensor(Dtype::F32, &[2], 9), "{what}");
    }
}

/// The safetensors library reads a null as no metadata.
#[test]
fn metadata_may_be_null() {
    let header = r#"{"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[7]].concat();
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("null.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.metadata().is_empty());
    assert_eq!(checkpoint.read("a").unwrap().bytes, [7]);
}

/// Shards under any name are one model if all are there, and none is one alone.
#[test]
fn shards_are_read_together_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let shard = |number: usize| folder.path().join(format!("flux1-dev-0000{number}-of-00003.safetensors"));
    for (number, name) in [(1, "a"), (2, "b")] {
        write(&shard(number), &[(name, tensor(Dtype::F32, &[2], 9))]);
    }
    for path in [shard(2), folder.path().to_owned()] {
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        let expected = if path.is_dir() { ["are not one complete", "missing"] } else { ["shard 2 of 3", "put all 3"] };
        assert!(expected.iter().all(|part| message.contains(part)), "{message}");
    }
    write(&shard(3), &[("c", tensor(Dtype::F32, &[2], 9))]);
    let message = Checkpoint::open(shard(2)).unwrap_err().to_string();
    assert!(message.contains("pass the folder that holds them") && message.contains("shard 2 of 3"), "{message}");
    let names: Vec<String> =
        Checkpoint::open(folder.path()).unwrap().tensors().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    write(&folder.path().join("whole-00001-of-00001.safetensors"), &[("d", tensor(Dtype::F32, &[2], 9))]);
    assert_eq!(Checkpoint::open(folder.path().join("whole-00001-of-00001.safetensors")).unwrap().tensors().len(), 1);
}

#[test]
fn a_folder_knows_the_class_of_its_pipeline() {
    let pipeline = tempfile::tempdir().unwrap();
    let folder = pipeline.path().join("transformer");
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("model.safetensors");
    write(&file, &[("a", tensor(Dtype::F32, &[2], 9))]);
    let class = |path: &Path| Checkpoint::open(path).unwrap().pipeline_class();
    assert_eq!(class(&folder), None);
    std::fs::write(pipeline.path().join("model_index.json"), r#"{"_class_name":"FluxPipeline"}"#).unwrap();
    assert_eq!((class(&folder), class(&file)), (Some("FluxPipeline".to_owned()), None));
}

/// A hub keeps the files of a model in snapshots.
#[test]
fn the_root_of_a_hub_cache_is_named_with_its_snapshot() {
    let hub = tempfile::tempdir().unwrap();
    let root = hub.path().join("models--org--name");
    for commit in ["0a1b", "2c3d"] {
        std::fs::create_dir_all(root.join("snapshots").join(commit)).unwrap();
    }
    std::fs::create_dir_all(root.join("refs")).unwrap();
    let message = |path: &std::path::Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(message(&root).contains("pass one of the folders in \"snapshots\""), "{}", message(&root));
    for (main, expected) in [("2c3d\n", Some("2c3d")), ("../../..", None)] {
        std::fs::write(root.join("refs/main"), main).unwrap();
        assert_eq!(hub_snapshot(&root), expected.map(|commit| root.join("snapshots").join(commit)));
    }
    std::fs::write(root.join("refs/main"), "2c3d").unwrap();
    assert!(message(&root).contains("snapshots/2c3d: pass that folder"), "{}", message(&root));
    assert!(message(hub.path()).contains("\"models--org--name\"/snapshots/COMMIT"), "{}", message(hub.path()));
    assert_eq!(hub_snapshot(hub.path()), None);
}

/// (files of a folder, the one that is read, the others that the note names)
#[test]
fn plain_files_come_before_variants_and_safetensors_before_other_formats() {
    let cases: [(&[&str], &str, Option<&str>); 5] = [
        (&["model.fp16.safetensors", "model.safetensors"], "model.safetensors", Some("[\"model.fp16.safetensors\"]")),
        (
            &["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
            "diffusion_pytorch_model.safetensors",
            Some("[\"diffusion_pytorch_model.fp16.safetensors\"]"),
        ),
        (&["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors", Some("[\"pytorch_model.bin\"]")),
        (&["model.fp16.safetensors"], "model.fp16.safetensors", None),
        (&["lora.bin", "model.safetensors", "modelling.safetensors"], "model.safetensors", None),
    ];
    for (files, expected, note) in cases {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            write(&folder.path().join(name), &[(name, tensor(Dtype::F32, &[2], 9))]);
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let names: Vec<String> = checkpoint.tensors().into_iter().map(|info| info.name).collect();
        assert_eq!(names, [expected]);
        let expected_note = note.map(|others| format!("reading {expected:?}, not {others} in the same folder"));
        assert_eq!(checkpoint.notes(), expected_note.as_slice());
    }
}

/// A variant in shards, alone and in the same folder as plain shards.
#[test]
fn variants_in_shards_have_their_own_index() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let save = |infix: &str, index: &str, value: u8| {
        let shard = |number: u8| format!("model{infix}-0000{number}-of-00002.safetensors");
        write(&path(&shard(1)), &[("a", tensor(Dtype::F32, &[2], value))]);
        write(&path(&shard(2)), &[("b", tensor(Dtype::F16, &[2], value))]);
        let map = format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{}","b":"{}"}}}}"#, shard(1), shard(2));
        std::fs::write(path(index), map).unwrap();
    };
    save(".fp16", "model.safetensors.index.fp16.json", 3);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.read("b").unwrap(), tensor(Dtype::F16, &[2], 3));
    assert!(checkpoint.notes().is_empty());
    save("", "model.safetensors.index.json", 7);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.read("a").unwrap(), tensor(Dtype::F32, &[2], 7));
    assert!(
        checkpoint.notes()[0].contains("not [\"model.fp16-00001-of-00002.safetensors\""),
        "{:?}",
        checkpoint.notes()
    );
}

#[test]
fn a_single_file_uses_the_config_only_if_it_has_a_standard_name() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), b"{}").unwrap();
    for (name, has_config) in [("flux1-dev.safetensors", false), ("diffusion_pytorch_model.safetensors", true)] {
        write(&folder.path().join(name), &samples());
        assert_eq!(Checkpoint::open(folder.path().join(name)).unwrap().config().is_some(), has_config, "{name}");
    }
}

/// A Hugging Face cache stores files under their hash and links to them.
#[cfg(unix)]
#[test]
fn symbolic_links_are_followed() {
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("blobs");
    let snapshot = cache.path().join("snapshots");
    std::fs::create_dir(&blobs).unwrap();
    std::fs::create_dir(&snapshot).unwrap();
    write(&blobs.join("0123"), &samples());
    std::fs::write(blobs.join("4567"), br#"{"k":1}"#).unwrap();
    std::os::unix::fs::symlink("../blobs/0123", snapshot.join("diffusion_pytorch_model.safetensors")).unwrap();
    std::os::unix::fs::symlink("../blobs/4567", snapshot.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    assert_eq!(checkpoint.read("wide").unwrap(), tensor(Dtype::F64, &[2, 2], 5));
    assert_eq!(checkpoint.config().unwrap()["k"], 1);
}

#[test]
fn threads_share_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write(&path, &samples());
    let checkpoint = Checkpoint::open(&path).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (name, expected) in samples().iter().cycle().take(600) {
                    assert_eq!(&checkpoint.read(name).unwrap(), expected);
                }
            });
        }
    });
}

#[test]
fn names_that_are_equal_without_wrappers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let raw = tensor(Dtype::F32, &[2], 0);
    write(&path, &[("module.a", raw.clone()), ("b", raw.clone())]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.read("a").unwrap(), raw);
    assert_eq!(checkpoint.notes(), ["removed the module wrappers of PyTorch from 1 tensor names"]);
    for other in ["a", "_orig_mod.a"] {
        write(&path, &[("module.a", raw.clone()), (other, raw.clone())]);
        let error = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(error.contains("tensor \"a\" appears twice, once as \"module.a\""), "{error}");
    }
}
