//! Damaged and malicious GGUF files: each is refused quickly, in little memory and with a clear message.
#![allow(clippy::unwrap_used)]

use clearform_weights::{Checkpoint, TensorSource, WeightsError};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const HUGE: u64 = 1 << 62;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 0;
const Q8_0: u32 = 8;

fn head(version: u32, tensors: u64, keys: u64) -> Vec<u8> {
    [b"GGUF", &version.to_le_bytes()[..], &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A metadata key and its value of type `kind`.
fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &kind.to_le_bytes()[..], value].concat()
}

/// A list: its type, its length and its items.
fn list(kind: u32, count: u64, items: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), items].concat()
}

fn tensor(name: &str, dimensions: &[u64], format: u32, offset: u64) -> Vec<u8> {
    let count = (dimensions.len() as u32).to_le_bytes().to_vec();
    let dimensions = dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()).collect();
    [text(name), count, dimensions, format.to_le_bytes().to_vec(), offset.to_le_bytes().to_vec()].concat()
}

/// A file of these metadata and tensors, and 256 bytes of values.
fn file(pairs: &[Vec<u8>], tensors: &[Vec<u8>]) -> Vec<u8> {
    let mut file = [head(3, tensors.len() as u64, pairs.len() as u64), pairs.concat(), tensors.concat()].concat();
    file.resize(file.len().next_multiple_of(32) + 256, 7);
    file
}

fn of_tensors(tensors: &[Vec<u8>]) -> Vec<u8> {
    file(&[], tensors)
}

/// A file of these metadata and one valid tensor.
fn of_metadata(pairs: &[Vec<u8>]) -> Vec<u8> {
    file(pairs, &[valid_tensor()])
}

fn valid_tensor() -> Vec<u8> {
    tensor("w", &[3, 2], F32, 0)
}

fn write(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Each case (name, file, expected message) must be refused within seconds, without control characters in the message.
fn check(cases: &[(&str, Vec<u8>, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, expected) in cases {
        let path = write(folder.path(), bytes);
        let start = Instant::now();
        let message = match Checkpoint::open(&path) {
            Ok(checkpoint) => panic!("{name} was accepted: {checkpoint:?}"),
            Err(error @ WeightsError::BadFile { .. }) => error.to_string(),
            Err(other) => panic!("{name}: unexpected error {other:?}"),
        };
        assert!(start.elapsed() < Duration::from_secs(10), "{name} took {:?}", start.elapsed());
        assert!(message.contains(expected), "{name}: {message:?} does not contain {expected:?}");
        assert!(message.starts_with(&path.display().to_string()), "{name}: {message:?} does not name the file");
        assert!(message.len() < 1000 && !message.contains(char::is_control), "{name}: {message:?}");
    }
}

#[test]
fn the_file_that_the_cases_are_made_from_is_valid() {
    let folder = tempfile::tempdir().unwrap();
    let alignment = pair("general.alignment", U32, &64u32.to_le_bytes());
    for bytes in [of_tensors(&[valid_tensor()]), of_metadata(&[pair("k", I32, &[0; 4])])] {
        let checkpoint = Checkpoint::open(write(folder.path(), &bytes)).unwrap();
        assert_eq!(checkpoint.info("w").unwrap().shape, [2, 3]);
        assert_eq!(checkpoint.read("w").unwrap().bytes, [7; 24]);
    }
    let far = pair("general.alignment", U32, &4096u32.to_le_bytes());
    let mut far = [head(3, 1, 1), far, tensor("w", &[1], F32, 4096)].concat();
    far.resize(8192, 0);
    far.extend(1.5f32.to_le_bytes());
    let checkpoint = Checkpoint::open(write(folder.path(), &far)).unwrap();
    assert_eq!(checkpoint.read("w").unwrap().bytes, 1.5f32.to_le_bytes());
    let with_gap = file(&[alignment], &[tensor("b", &[1], F32, 64), tensor("a", &[4], F32, 0)]);
    let checkpoint = Checkpoint::open(write(folder.path(), &with_gap)).unwrap();
    let read = |name: &str| checkpoint.read(name).unwrap();
    assert_eq!(checkpoint.tensors().len(), 2);
    assert_eq!((read("a").shape, read("a").bytes), (vec![4], vec![7; 16]));
    assert_eq!((read("b").shape, read("b").bytes), (vec![1], vec![7; 4]));
}

#[test]
fn broken_heads_are_named() {
    let whole = of_tensors(&[valid_tensor()]);
    let cut = |length: usize| whole[..length].to_vec();
    let cases = [
        ("magic alone", cut(4), "the head of the GGUF file: 4 bytes claimed, only 0 bytes left"),
        ("no counts", cut(8), "8 bytes claimed, only 0 bytes left: it is cut short"),
        ("half a count", cut(20), "8 bytes claimed, only 4 bytes left"),
        ("no tensors", cut(24), "tensor 0 of 1: 8 bytes claimed, only 0 bytes left"),
        ("half a tensor", cut(50), "tensor \"w\": 8 bytes claimed, only 5 bytes left"),
        ("half the values", cut(whole.len() - 240), "tensor \"w\" takes 24 bytes from 0, past the file's end"),
        ("version 1", head(1, 0, 0), "GGUF version 1, expected 2 or 3"),
        ("version 4", head(4, 0, 0), "GGUF version 4, expected 2 or 3"),
        ("big-endian", [b"GGUF\0\0\0\x03", &[0; 16][..]].concat(), "of another byte order (big-endian)"),
        ("tensors without end", head(3, HUGE, 0), "claims 4611686018427387904 tensors, more than the 200000 allowed"),
        ("keys without end", head(3, 0, HUGE), "claims 4611686018427387904 metadata keys, more than the 200000"),
        ("fewer tensors than claimed", head(3, 200_000, 0), "tensor 0 of 200000: 8 bytes claimed"),
        ("fewer keys than claimed", head(3, 0, 200_000), "metadata key 0 of 200000: 8 bytes claimed"),
    ];
    check(&cases);
}

#[test]
fn broken_metadata_are_named() {
    let alignment = |value: u32| of_metadata(&[pair("general.alignment", U32, &value.to_le_bytes())]);
    let of_list = |list: Vec<u8>| of_metadata(&[pair("k", 9, &list)]);
    let deep = list(9, 1, &[]).repeat(100_000);
    let long_key = of_metadata(&[pair(&"n".repeat(5000), 7, &[1])]);
    let text_of = |length: u64| of_metadata(&[pair("k", 8, &length.to_le_bytes())]);
    let shape = |shape: &[u32]| {
        let items: Vec<u8> = shape.iter().flat_map(|dimension| dimension.to_le_bytes()).collect();
        of_metadata(&[pair("comfy.gguf.orig_shape.w", 9, &list(I32, shape.len() as u64, &items))])
    };
    let cases = [
        ("alignment 0", alignment(0), "metadata \"general.alignment\": expected a power of two up to 65536, found 0"),
        ("alignment 3", alignment(3), "expected a power of two up to 65536, found 3"),
        ("alignment 2^31", alignment(1 << 31), "expected a power of two up to 65536, found 2147483648"),
        ("alignment of text", of_metadata(&[pair("general.alignment", 8, &text("32"))]), "expected a UINT32"),
        (
            "unknown type",
            of_metadata(&[pair("k", 13, &[0; 8])]),
            "metadata \"k\": unknown value type 13: the file is damaged",
        ),
        ("unknown type in a list", of_list(list(77, 1, &[0; 8])), "unknown value type 77"),
        ("huge list", of_list(list(U32, HUGE, &[])), "4611686018427387904 items of 4 bytes claimed, only"),
        ("list that wraps", of_list(list(12, 1 << 61, &[])), "2305843009213693952 items of 8 bytes claimed, only"),
        ("huge list of bytes", of_list(list(0, 1 << 40, &[])), "1099511627776 bytes claimed, only"),
        ("huge list of texts", of_list(list(8, HUGE, &[])), "4611686018427387904 items of 8 bytes claimed, only"),
        ("huge list of lists", of_list(list(9, HUGE, &[])), "4611686018427387904 items of 12 bytes claimed, only"),
        ("text in a list past the end", of_list(list(8, 1, &HUGE.to_le_bytes())), "4611686018427387904 bytes claimed"),
        ("deep", of_list(deep), "lists nested more than 16 deep"),
        ("text past the end", text_of(u64::MAX), "18446744073709551615 bytes claimed, only"),
        ("long key", long_key, "a name of 5000 bytes, longer than the 4096 allowed"),
        (
            "key not text",
            of_metadata(&[[&2u64.to_le_bytes()[..], b"\xff\xfe", &[0; 8]].concat()]),
            "a name that is not text",
        ),
        ("key twice", of_metadata(&[pair("k", 7, &[1]), pair("k", 7, &[0])]), "metadata \"k\": the key is given twice"),
        ("control characters", of_metadata(&[pair("\u{1b}[2J", 13, &[])]), r#"metadata "\u{1b}[2J""#),
        ("shape of another size", shape(&[7]), "its original shape [7] does not hold as many values as [2, 3]"),
        ("shape with 0", shape(&[0, 6]), "expected a shape, a list of 1 to 8 positive INT32"),
        ("negative shape", shape(&[u32::MAX, 6]), "expected a shape, a list of 1 to 8 positive INT32"),
        ("shape of many", shape(&[1; 9]), "expected a shape, a list of 1 to 8 positive INT32"),
        (
            "shape that is none",
            of_metadata(&[pair("comfy.gguf.orig_shape.w", U32, &[6, 0, 0, 0])]),
            "expected a shape, a list of 1 to 8",
        ),
        ("shape that wraps", shape(&[1 << 30; 8]), "does not hold as many values as"),
    ];
    check(&cases);
}

#[test]
fn broken_tensors_are_named() {
    let aligned =
        |value: u32, tensors: &[Vec<u8>]| file(&[pair("general.alignment", U32, &value.to_le_bytes())], tensors);
    let long_name = |length: u64| of_tensors(&[length.to_le_bytes().to_vec()]);
    let one_tensor = |shape: &[u64], format: u32, offset: u64| of_tensors(&[tensor("w", shape, format, offset)]);
    let many_dimensions = of_tensors(&[[text("w"), u32::MAX.to_le_bytes().to_vec()].concat()]);
    let cases = [
        ("name of 2^40 bytes", long_name(1 << 40), "a name of 1099511627776 bytes, longer than the 4096 allowed"),
        ("name past the end", long_name(4000), "4000 bytes claimed, only"),
        ("name twice", of_tensors(&[valid_tensor(), tensor("w", &[1], F32, 32)]), "tensor \"w\" is given twice"),
        ("dimensions without end", many_dimensions, "tensor \"w\": 4294967295 dimensions, more than the 5 allowed"),
        ("six dimensions", one_tensor(&[1; 6], F32, 0), "6 dimensions, more than the 5 allowed"),
        ("dimension of 0", one_tensor(&[3, 0], F32, 0), "a dimension of 0 in [3, 0]"),
        (
            "dimensions that wrap",
            one_tensor(&[1 << 32, 1 << 32], F32, 0),
            "the size of [4294967296, 4294967296] in F32 cannot be",
        ),
        ("bytes that wrap", one_tensor(&[HUGE], F32, 0), "cannot be counted in bytes"),
        (
            "half a block",
            one_tensor(&[33], Q8_0, 0),
            "rows of 33 values are not a multiple of the 32 in a block of Q8_0",
        ),
        ("rows of half blocks", one_tensor(&[16, 2], Q8_0, 0), "rows of 16 values are not a multiple"),
        ("I-quant", one_tensor(&[256], 16, 0), "tensor \"w\": type IQ2_XXS is not supported: use the file in Q8_0"),
        ("MXFP4", one_tensor(&[32], 39, 0), "type MXFP4 is not supported"),
        ("a format of old", one_tensor(&[32], 4, 0), "unknown type 4: use the file in"),
        ("a format to come", one_tensor(&[32], 999, 0), "unknown type 999: use the file in"),
        ("past the end", one_tensor(&[65], F32, 0), "tensor \"w\" takes 260 bytes from 0, past the file's end"),
        (
            "begins past the end",
            one_tensor(&[1], F32, 1 << 40),
            "takes 4 bytes from 1099511627776, past the file's end",
        ),
        ("offset that wraps", one_tensor(&[8], F32, u64::MAX - 31), "past the file's end"),
        ("blocks past the end", one_tensor(&[32 * 8], Q8_0, 0), "takes 272 bytes from 0, past the file's end"),
        ("huge", one_tensor(&[1 << 60], F32, 0), "takes 4611686018427387904 bytes from 0, past the file's end"),
        (
            "off the alignment",
            one_tensor(&[1], F32, 4),
            "begins at 4, which is not a multiple of the file's alignment 32",
        ),
        (
            "off its own alignment",
            aligned(64, &[tensor("w", &[1], F32, 32)]),
            "not a multiple of the file's alignment 64",
        ),
        ("overlap", of_tensors(&[tensor("a", &[9], F32, 0), tensor("b", &[1], F32, 32)]), "tensor \"b\" overlaps"),
        (
            "the same offset",
            of_tensors(&[tensor("a", &[1], F32, 0), tensor("b", &[1], F32, 0)]),
            "overlaps the tensor before it",
        ),
        ("alignment past the end", aligned(65_536, &[valid_tensor()]), "past the file's end"),
    ];
    check(&cases);
}

/// A sparse file of any size costs nothing on the disk; its metadata must not make the reader go through all of it.
#[test]
fn a_huge_sparse_file_is_refused_quickly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (pairs, expected) in [
        (pair("k", 9, &list(8, 1 << 33, &[])), "items of 8 bytes claimed, only"),
        (pair("k", 9, &list(8, 16_000_000, &[])), "metadata \"\": "),
        (pair("k", 8, &(1u64 << 36).to_le_bytes()), "left of the 134217728 allowed before the values"),
    ] {
        std::fs::write(&path, [head(3, 0, 3), pairs].concat()).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 38).unwrap();
        let start = Instant::now();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

/// Every checkpoint that opens can be read.
fn survive(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    if let Ok(checkpoint) = Checkpoint::open(write(folder.path(), bytes)) {
        for info in checkpoint.tensors() {
            checkpoint.read(&info.name).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_change_of_a_good_file_panics(file in 0usize..3, at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let name = ["formats.gguf", "shapes.gguf", "bare.gguf"][file];
        let mut bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf").join(name)).unwrap();
        // Only the head of the file can be invalid; any values are valid.
        let length = bytes.len();
        bytes[at.index(length.min(2000))] = byte;
        survive(&bytes);
        bytes.truncate(cut.index(length));
        survive(&bytes);
    }

    #[test]
    fn no_directory_panics(keys in 0u64..3, tensors in 0u64..3, rest in proptest::collection::vec(0u8..16, 0..200)) {
        survive(&[head(3, tensors, keys), rest].concat());
    }
}
