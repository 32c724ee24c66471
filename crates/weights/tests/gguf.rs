//! GGUF files are read as the gguf package reads them; `fixtures/gguf/export.py` wrote the files and the expected
//! values.
#![allow(clippy::unwrap_used)]

use clearform_weights::{Checkpoint, Dtype, TensorSource, WeightsError, digest, save};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf").join(name)
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
        let middle = length / 2;
        for range in [0..0, 0..middle, length / 3..length, middle..middle + 1, 1..length - 1, 3..3, length..length] {
            assert_eq!(found.read_range(name, range.clone()).unwrap(), whole.bytes[range.clone()], "{name} {range:?}");
        }
        assert!(matches!(found.read_range(name, 0..length + 1), Err(WeightsError::BadTensor { .. })), "{name}");
    }
    found
}

#[test]
fn every_file_is_read_as_the_gguf_package_reads_it() {
    for (file, expected, count) in [
        ("formats.gguf", "formats.safetensors", 18),
        ("shapes.gguf", "shapes.safetensors", 3),
        ("bare.gguf", "bare.safetensors", 3),
    ] {
        assert_eq!(check(&fixture(file), expected).tensors().len(), count, "{file}");
    }
}

#[test]
fn shapes_are_outermost_first_and_those_of_the_original_model() {
    let formats = Checkpoint::open(fixture("formats.gguf")).unwrap();
    let shapes = Checkpoint::open(fixture("shapes.gguf")).unwrap();
    let bare = Checkpoint::open(fixture("bare.gguf")).unwrap();
    let cases: [(&Checkpoint, &str, Dtype, &[usize]); 7] = [
        (&formats, "Q4_0", Dtype::F32, &[2, 64]),
        (&formats, "Q6_K", Dtype::F32, &[2, 512]),
        (&formats, "int16", Dtype::I16, &[2, 3, 5]),
        (&formats, "bfloat16", Dtype::BF16, &[4, 3]),
        (&shapes, "patch.weight", Dtype::F32, &[12, 4, 1, 4, 4]),
        (&shapes, "table", Dtype::F16, &[1, 6]),
        (&bare, "scalar", Dtype::F32, &[]),
    ];
    for (checkpoint, name, dtype, shape) in cases {
        let info = checkpoint.info(name).unwrap();
        assert_eq!((info.dtype, info.shape.as_slice()), (dtype, shape), "{name}");
    }
    let plain = bare.tensor("plain").unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(plain, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
}

#[test]
fn short_strings_are_metadata_and_quantised_types_are_noted() {
    let formats = Checkpoint::open(fixture("formats.gguf")).unwrap();
    let texts: Vec<(&str, &str)> = formats.metadata().iter().map(|(key, text)| (&key[..], &text[..])).collect();
    assert_eq!(texts, [("general.architecture", "flux"), ("test.text", "übung")]);
    let all = "quantised tensors: 1 of Q2_K, 1 of Q3_K, 1 of Q4_0, 1 of Q4_1, 1 of Q4_K, 1 of Q5_0, \
               1 of Q5_1, 1 of Q5_K, 1 of Q6_K, 1 of Q8_0";
    assert_eq!(formats.notes(), [all]);
    let shapes = Checkpoint::open(fixture("shapes.gguf")).unwrap();
    assert_eq!(shapes.notes(), ["quantised tensors: 1 of Q4_K, 1 of Q8_0"]);
    let bare = Checkpoint::open(fixture("bare.gguf")).unwrap();
    assert!(bare.metadata().is_empty());
}

#[test]
fn the_format_follows_from_the_contents_and_folders_open_by_their_gguf_file() {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in [("formats.gguf", "model.safetensors"), ("formats.gguf", "model.bin")] {
        let path = folder.path().join(to);
        std::fs::copy(fixture(from), &path).unwrap();
        check(&path, "formats.safetensors");
        std::fs::remove_file(path).unwrap();
    }
    std::fs::copy(fixture("shapes.gguf"), folder.path().join("flux1-dev-Q4_K.gguf")).unwrap();
    check(folder.path(), "shapes.safetensors");
    std::fs::copy(fixture("bare.safetensors"), folder.path().join("model.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().tensors().len(), 3);
}

#[test]
fn saving_a_gguf_file_gives_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(fixture("formats.gguf")).unwrap();
    let saved = folder.path().join("saved.safetensors");
    save(&saved, &checkpoint, checkpoint.metadata()).unwrap();
    check(&saved, "formats.safetensors");
    assert_eq!(digest(&checkpoint.files()[0].path).unwrap(), digest(fixture("formats.gguf")).unwrap());
}

/// More blocks than are dequantised at once: block n has the scale 1 and the values n - 128, wrapped.
#[test]
fn long_tensors_are_dequantised_piece_by_piece() {
    const BLOCKS: usize = 9000;
    let head = [b"GGUF\x03\0\0\0", &1u64.to_le_bytes()[..], &[0; 8], &1u64.to_le_bytes(), b"w"].concat();
    let shape = [1u32.to_le_bytes().to_vec(), (32 * BLOCKS as u64).to_le_bytes().to_vec()].concat();
    let mut file = [head, shape, 8u32.to_le_bytes().to_vec(), vec![0; 8]].concat();
    file.resize(file.len().next_multiple_of(32), 0);
    for block in 0..BLOCKS {
        file.extend([0x00, 0x3c]);
        file.extend([(block % 256) as u8 ^ 0x80; 32]);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.gguf");
    std::fs::write(&path, file).unwrap();
    let checkpoint = Checkpoint::open(path).unwrap();
    let value = |index: usize| (index / 32 % 256) as f32 - 128.0;
    let expected: Vec<f32> = (0..32 * BLOCKS).map(value).collect();
    assert_eq!(checkpoint.tensor("w").unwrap().to_vec1::<f32>().unwrap(), expected);
    let start = 4095 * 32 + 5;
    let end = 8193 * 32 + 7;
    let bytes: Vec<u8> = expected[start..end].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(checkpoint.read_range("w", 4 * start..4 * end).unwrap(), bytes);
}
