//! Files of torch.save are read as torch.load reads them; `fixtures/torch/export.py` wrote the files and the expected
//! values.
#![allow(clippy::unwrap_used)]

use clearform_weights::{Checkpoint, Dtype, TensorSource, WeightsError};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/torch").join(name)
}

/// Compares every tensor of `path`, whole and in ranges, with the safetensors file `expected`, bit for bit.
fn check(path: &Path, expected: &str) -> Checkpoint {
    let found = Checkpoint::open(path).unwrap();
    let expected = Checkpoint::open(fixture(expected)).unwrap();
    assert_eq!(found.tensors(), expected.tensors(), "{}", path.display());
    for info in expected.tensors() {
        let name = &info.name;
        let whole = expected.read(name).unwrap();
        assert_eq!(found.info(name), Some(info.clone()));
        assert_eq!(found.read(name).unwrap(), whole, "{name} of {}", path.display());
        let length = whole.bytes.len();
        for range in [0..0, 0..length / 2, length / 3..length, length / 2..length / 2 + length % 2, length..length] {
            assert_eq!(found.read_range(name, range.clone()).unwrap(), whole.bytes[range.clone()], "{name} {range:?}");
        }
        assert!(matches!(found.read_range(name, 0..length + 1), Err(WeightsError::BadTensor { .. })), "{name}");
    }
    found
}

#[test]
fn every_file_is_read_as_torch_load_reads_it() {
    let cases = [
        ("formats.pt", "formats.safetensors", 20),
        ("views.pt", "views.safetensors", 15),
        ("deflated.ckpt", "views.safetensors", 15),
        ("legacy.pth", "legacy.safetensors", 14),
        ("training-2.pt", "training.safetensors", 2),
        ("training-3.pt", "training.safetensors", 2),
        ("training-4.pt", "training.safetensors", 2),
        ("training-5.pt", "training.safetensors", 2),
        ("legacy-training.bin", "training.safetensors", 2),
        ("nested.ckpt", "nested.safetensors", 2),
    ];
    for (file, expected, count) in cases {
        let checkpoint = check(&fixture(file), expected);
        assert_eq!(checkpoint.tensors().len(), count, "{file}");
    }
}

#[test]
fn dtypes_and_values_are_those_written() {
    let formats = Checkpoint::open(fixture("formats.pt")).unwrap();
    let cases = [
        ("bool", Dtype::BOOL),
        ("int8", Dtype::I8),
        ("bfloat16", Dtype::BF16),
        ("float64", Dtype::F64),
        ("float8_e4m3fn", Dtype::F8_E4M3),
        ("float8_e5m2", Dtype::F8_E5M2),
        ("uint16", Dtype::U16),
    ];
    for (name, dtype) in cases {
        assert_eq!(formats.info(name).unwrap().dtype, dtype, "{name}");
    }
    assert_eq!(formats.tensor("scalar").unwrap().to_scalar::<f32>().unwrap(), 2.5);
    assert_eq!(formats.tensor("negative").unwrap().to_vec1::<i64>().unwrap(), [-1, -(1 << 40), 1 << 62]);
    let views = Checkpoint::open(fixture("views.pt")).unwrap();
    let transposed = views.tensor("transposed").unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(transposed[1], [1.0, 9.0, 17.0, 25.0, 33.0, 41.0]);
    let expanded = views.tensor("expanded").unwrap().to_dtype(candle_core::DType::F32).unwrap();
    assert_eq!(expanded.to_vec2::<f32>().unwrap(), vec![vec![0.0, 1.0, 2.0]; 4]);
}

#[test]
fn notes_name_what_was_chosen_and_what_was_left_out() {
    let training = "the weights are the moving average of the training, \"ema\"; left out: \"model\" (a dict of 2), \
                    \"opt\" (a dict of 2), \"args\" (an argparse.Namespace), \"epoch\" (a number), \"steps\" (a number), \
                    \"best\" (a number), \"losses\" (a dict of 1), \"seen\" (a set), \"frozen\" (a set), \
                    \"note\" (bytes), \"size\" (a tuple of 2), \"device\" (a torch.device), \"dtype\" (a type or function), \"rng\" (a tensor)";
    let cases: [(&str, &[&str]); 4] = [
        ("training-2.pt", &[training]),
        ("legacy-training.bin", &[training]),
        (
            "nested.ckpt",
            &[
                "the weights are \"module\"; left out: \"ema\" (a dict of 2), \"epoch\" (a number)",
                "the weights are \"state_dict\"",
            ],
        ),
        ("views.pt", &[]),
    ];
    for (file, notes) in cases {
        assert_eq!(Checkpoint::open(fixture(file)).unwrap().notes(), notes, "{file}");
    }
}

#[test]
fn the_format_follows_from_the_contents_and_not_from_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("views.pt", "zip.safetensors", "views.safetensors"),
        ("legacy.pth", "pickle.safetensors", "legacy.safetensors"),
        ("views.safetensors", "tensors.pt", "views.safetensors"),
        ("training.safetensors", "tensors.ckpt", "training.safetensors"),
    ];
    for (from, to, expected) in cases {
        let path = folder.path().join(to);
        std::fs::copy(fixture(from), &path).unwrap();
        check(&path, expected);
    }
}

/// (what the folder is, fixtures and the names they get, name of the index, number of tensors)
#[test]
fn folders_without_safetensors_open_by_their_torch_files() {
    type Files<'a> = &'a [(&'a str, &'a str)];
    let index =
        br#"{"metadata":{},"weight_map":{"a":"s-1.bin","b":"s-1.bin","0.bias":"s-2.bin","0.weight":"s-2.bin"}}"#;
    let diffusers = "diffusion_pytorch_model.bin";
    let transformers = "pytorch_model.bin";
    let cases: [(&str, Files, Option<&str>, usize); 7] = [
        ("diffusers", &[("views.pt", diffusers), ("nested.ckpt", "optimizer.bin")], None, 15),
        ("a variant", &[("views.pt", "diffusion_pytorch_model.fp16.bin")], None, 15),
        ("transformers", &[("views.pt", transformers)], None, 15),
        (
            "shards alone",
            &[
                ("nested.ckpt", "pytorch_model-00001-of-00002.bin"),
                ("training-2.pt", "pytorch_model-00002-of-00002.bin"),
            ],
            None,
            4,
        ),
        (
            "an index",
            &[("nested.ckpt", "s-1.bin"), ("training-2.pt", "s-2.bin")],
            Some("pytorch_model.bin.index.json"),
            4,
        ),
        ("any one file", &[("views.pt", "0400000.pt")], None, 15),
        ("safetensors first", &[("views.pt", diffusers), ("nested.safetensors", "x.safetensors")], None, 2),
    ];
    for (what, files, index_name, count) in cases {
        let folder = tempfile::tempdir().unwrap();
        for (from, to) in files {
            std::fs::copy(fixture(from), folder.path().join(to)).unwrap();
        }
        if let Some(name) = index_name {
            std::fs::write(folder.path().join(name), index).unwrap();
        }
        std::fs::write(folder.path().join("config.json"), br#"{"_class_name":"X"}"#).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.tensors().len(), count, "{what}");
        assert_eq!(checkpoint.config().unwrap()["_class_name"], "X", "{what}");
    }
}
