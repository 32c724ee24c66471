//! Damaged and malicious safetensors files and folders: each gives an error that names what is wrong, never a panic.
#![allow(clippy::unwrap_used)]

use clearform_weights::{Checkpoint, WeightsError};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

const WHOLE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

fn message(path: &Path) -> String {
    match Checkpoint::open(path) {
        Ok(checkpoint) => panic!("{} was accepted: {checkpoint:?}", path.display()),
        Err(error @ (WeightsError::BadFile { .. } | WeightsError::Io { .. })) => error.to_string(),
        Err(other) => panic!("unexpected error {other:?}"),
    }
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn committed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/hostile").join(name)
}

#[test]
fn broken_single_files_are_named() {
    let entry = |body: &str, data| file(&format!(r#"{{"a":{body}}}"#), data);
    let two_tensors =
        |first: &str, second: &str| format!(r#"{{"a":{{"dtype":"U8",{first}}},"b":{{"dtype":"U8",{second}}}}}"#);
    let overlap = two_tensors(r#""shape":[4],"data_offsets":[0,4]"#, r#""shape":[4],"data_offsets":[2,6]"#);
    let hole = two_tensors(r#""shape":[4],"data_offsets":[0,4]"#, r#""shape":[4],"data_offsets":[6,10]"#);
    let deep = "[".repeat(20_000);
    let ones = "1,".repeat(5_000_000);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "0 bytes, too few for a header"),
        ("seven bytes", vec![0; 7], "7 bytes, too few"),
        ("empty header", vec![0; 8], "not what safetensors allows: EOF"),
        ("header too long", u64::MAX.to_le_bytes().to_vec(), "claims a header of 18446744073709551615 bytes"),
        ("header past the end", [&1000u64.to_le_bytes()[..], b"{}"].concat(), "goes past the file's end at 10"),
        ("cut short", file(WHOLE, 5), "cut short by 3 bytes"),
        ("trailing bytes", file(WHOLE, 11), "3 bytes follow the last tensor"),
        ("no JSON", file("hello", 0), "not what safetensors allows: expected value"),
        ("a list", file("[]", 0), "an object of tensors"),
        ("bad UTF-8", [&4u64.to_le_bytes()[..], b"{\"\xff\""].concat(), "not what safetensors allows"),
        ("padded with NUL", file(&format!("{WHOLE}\0\0"), 8), "trailing characters"),
        ("overlap", file(&overlap, 6), "tensor \"b\" overlaps"),
        ("hole", file(&hole, 10), "tensor \"b\" leaves a hole"),
        ("wrong size", entry(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#, 8), "takes 12 bytes, found 0..8"),
        (
            "backwards",
            entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,-8]}"#, 8),
            "tensor \"a\": invalid value: integer `-8`",
        ),
        (
            "shape overflow",
            entry(r#"{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}"#, 8),
            "cannot be counted",
        ),
        (
            "negative dimension",
            entry(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}"#, 8),
            "tensor \"a\": invalid value: integer `-1`",
        ),
        (
            "unknown dtype",
            entry(r#"{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}"#, 8),
            "tensor \"a\": unknown variant `Q9`",
        ),
        ("odd nibbles", entry(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#, 1), "cannot be counted"),
        ("metadata not text", file(r#"{"__metadata__":{"a":1}}"#, 0), "expected a string"),
        ("twice", file(&format!("{},{}", &WHOLE[..WHOLE.len() - 1], &WHOLE[1..]), 8), "\"a\" is given twice"),
        ("metadata twice", file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "\"__metadata__\" is given twice"),
        ("metadata key twice", file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0), "\"k\" is given twice"),
        ("escape in a name", file(r#"{"\u001b[2J":{"dtype":"Q9"}}"#, 0), r#""\u{1b}[2J""#),
        ("deep", file(&format!(r#"{{"a":{deep}"#), 0), "not what safetensors allows"),
        ("deep extra key", entry(&format!(r#"{{"x":{deep}"#), 0), "tensor \"a\""),
        ("many dimensions", entry(&format!(r#"{{"dtype":"U8","shape":[{ones}1]"#), 1), "more than 32 dimensions"),
        ("long name", file(&format!(r#"{{"{}":1}}"#, "n".repeat(5000)), 0), "a key of 5000 bytes"),
        ("git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), "git lfs pull"),
        ("short git-lfs", b"version https://git-lfs".to_vec(), "git lfs pull"),
        ("HTML", b"<!DOCTYPE html><html><body>Sign in</body></html>".to_vec(), "this is an HTML or XML page"),
        ("HTML after space", b"\n\n <html><body>404</body></html>".to_vec(), "this is an HTML or XML page"),
        ("GGUF", b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0".to_vec(), "the head of the GGUF file: 8 bytes claimed, only 0"),
        ("PyTorch zip", b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0".to_vec(), "a zip file, as PyTorch writes, without"),
        ("JSON", br#"{"metadata": {}, "weight_map": {}}"#.to_vec(), "this is JSON text, not tensors"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, expected) in cases {
        let path = write(folder.path(), "file.safetensors", bytes);
        let message = message(&path);
        assert!(message.contains(expected), "{name}: {message:?} does not contain {expected:?}");
        assert!(message.starts_with(&path.display().to_string()), "{name}: {message:?} does not name the file");
        assert!(message.len() < 1000, "{name}: too long");
    }
}

#[test]
fn committed_hostile_files_are_refused() {
    let cases = [
        ("lfs-pointer.safetensors", "git lfs pull"),
        ("page.safetensors", "HTML"),
        ("duplicate-key.safetensors", "is given twice"),
        ("truncated.safetensors", "cut short"),
        ("trailing.safetensors", "follow the last tensor"),
        ("overlap.safetensors", "overlaps"),
        ("escaping-shard", "not a plain file name"),
    ];
    for (name, expected) in cases {
        let message = message(&committed(name));
        assert!(message.contains(expected), "{name}: {message:?} does not contain {expected:?}");
    }
}

#[test]
fn broken_folders_are_named() {
    let tensor = |name: &str| file(&WHOLE.replace("\"a\"", &format!("{name:?}")), 8);
    let index = |map: &str| format!(r#"{{"metadata":{{}},"weight_map":{{{map}}}}}"#).into_bytes();
    let many: Vec<String> = (0..600).map(|shard| format!(r#""t{shard}":"s{shard}.safetensors""#)).collect();
    const INDEX: &str = "model.safetensors.index.json";
    let first = "model-00001-of-00002.safetensors";
    let second = "model-00002-of-00002.safetensors";
    type Files<'a> = Vec<(&'a str, Vec<u8>)>;
    let cases: Vec<(&str, Files, &str)> = vec![
        ("nothing", vec![], "no .safetensors, torch.save or .gguf file in this folder"),
        ("PyTorch cut short", vec![("pytorch_model.bin", vec![1])], "1 bytes, too few"),
        (
            "several",
            vec![("x.safetensors", tensor("a")), ("y.safetensors", tensor("b"))],
            "none with a standard name: pass one of",
        ),
        ("shard missing", vec![(INDEX, index(r#""a":"gone.safetensors""#))], "gone.safetensors: No such file"),
        ("index missing, one shard", vec![(first, tensor("a"))], "not one complete sharded model"),
        ("path in index", vec![(INDEX, index(r#""a":"../x.safetensors""#))], "\"../x.safetensors\" is not a plain"),
        ("absolute", vec![(INDEX, index(r#""a":"/etc/x.safetensors""#))], "not a plain file name"),
        ("backslash", vec![(INDEX, index(r#""a":"..\\x.safetensors""#))], "not a plain file name"),
        ("many shards", vec![(INDEX, index(&many.join(",")))], "600 shards"),
        (
            "key not in shard",
            vec![(INDEX, index(r#""z":"x.safetensors""#)), ("x.safetensors", tensor("a"))],
            "found in none",
        ),
        (
            "key of no index",
            vec![
                (INDEX, index(r#""a":"x.safetensors""#)),
                ("x.safetensors", {
                    file(
                        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}"#,
                        1,
                    )
                }),
            ],
            "tensor \"b\" of \"x.safetensors\" is not in the index",
        ),
        ("index key twice", vec![(INDEX, index(r#""a":"x.safetensors","a":"x.safetensors""#))], "\"a\" is given twice"),
        ("tensor twice", vec![(first, tensor("a")), (second, tensor("a"))], "tensor \"a\" is also in"),
        ("deep index", vec![(INDEX, "[".repeat(20_000).into_bytes())], "not the JSON expected"),
        (
            "deep config",
            vec![("model.safetensors", tensor("a")), ("config.json", "{\"a\":".repeat(20_000).into_bytes())],
            "recursion limit",
        ),
        ("index a pointer", vec![(INDEX, b"version https://git-lfs.github.com/spec/v1".to_vec())], "git lfs pull"),
        (
            "index and file",
            vec![(INDEX, index(r#""a":"model.safetensors""#)), ("model.safetensors", tensor("a"))],
            "remove the one you do not want",
        ),
    ];
    for (name, files, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        for (file, bytes) in files {
            write(folder.path(), file, bytes);
        }
        let message = message(folder.path());
        assert!(message.contains(expected), "{name}: {message:?} does not contain {expected:?}");
    }
}

#[test]
fn a_pipeline_folder_and_a_missing_path_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("transformer")).unwrap();
    assert!(message(folder.path()).contains("pipeline folder; the model is in \"transformer\""));
    match Checkpoint::open(folder.path().join("gone")) {
        Err(WeightsError::Io { path, source }) => {
            assert_eq!((path, source.kind()), (folder.path().join("gone"), std::io::ErrorKind::NotFound));
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(unix)]
#[test]
fn devices_and_loops_of_links_are_refused() {
    assert!(message(Path::new("/dev/zero")).contains("not a regular file"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("loop.safetensors");
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(message(&path).contains("symbolic links"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Changing any byte and cutting the file anywhere gives a readable checkpoint or an error.
    #[test]
    fn no_change_of_a_good_file_panics(at in 0usize..70, byte: u8, length in 0usize..71) {
        let mut bytes = file(WHOLE, 8);
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(length.max(1));
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), "x.safetensors", &bytes);
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            use clearform_weights::TensorSource;
            for info in checkpoint.tensors() {
                checkpoint.read(&info.name).unwrap();
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let folder = tempfile::tempdir().unwrap();
        let _ = Checkpoint::open(write(folder.path(), "x.safetensors", &bytes));
    }
}
