//! Damaged and malicious files of torch.save: each is refused quickly, in little memory and with a clear message, and
//! no code runs.
#![allow(clippy::unwrap_used)]

use clearform_weights::{Checkpoint, TensorSource, WeightsError};
use proptest::prelude::*;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const END: &[u8] = b".";

/// One record of an archive.
struct ZipRecord {
    name: String,
    method: u16,
    packed: Vec<u8>,
    /// The length it claims.
    size: u64,
}

fn stored(name: &str, bytes: &[u8]) -> ZipRecord {
    ZipRecord { name: format!("a/{name}"), method: 0, packed: bytes.to_vec(), size: bytes.len() as u64 }
}

fn deflated(name: &str, bytes: &[u8]) -> ZipRecord {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    ZipRecord { method: 8, packed: encoder.finish().unwrap(), ..stored(name, bytes) }
}

fn zip(records: &[ZipRecord]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    for ZipRecord { name, method, packed, size } in records {
        let at = file.len() as u32;
        let sizes = [packed.len() as u32, *size as u32].map(u32::to_le_bytes).concat();
        let length = (name.len() as u16).to_le_bytes();
        let method = method.to_le_bytes();
        file.extend([b"PK\x03\x04\0\0\0\0", &method[..], &[0; 8], &sizes, &length, &[0; 2], name.as_bytes()].concat());
        file.extend(packed);
        directory.extend([b"PK\x01\x02\0\0\0\0\0\0", &method[..], &[0; 8], &sizes, &length, &[0; 12]].concat());
        directory.extend([&at.to_le_bytes()[..], name.as_bytes()].concat());
    }
    let length = (directory.len() as u32).to_le_bytes();
    let at = (file.len() as u32).to_le_bytes();
    file.extend(directory);
    file.extend([b"PK\x05\x06\0\0\0\0\0\0\0\0", &length[..], &at, &[0; 2]].concat());
    file
}

/// An archive of `pickle` and one storage of 24 bytes.
fn archive(pickle: impl AsRef<[u8]>) -> Vec<u8> {
    zip(&[stored("data.pkl", pickle.as_ref()), stored("data/0", &[7; 24])])
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn number(number: u64) -> Vec<u8> {
    [b"\x8a\x09", &number.to_le_bytes()[..], b"\0"].concat()
}

fn numbers(list: &[u64]) -> Vec<u8> {
    [b"(", list.iter().flat_map(|&value| number(value)).collect::<Vec<_>>().as_slice(), b"t"].concat()
}

/// The persistent id of a storage.
fn storage(class: &str, key: &str, count: u64) -> Vec<u8> {
    let class = format!("ctorch\n{class}\n");
    [b"(", &text("storage")[..], class.as_bytes(), &text(key), &text("cpu"), &number(count), b"tQ"].concat()
}

fn tensor(storage: &[u8], offset: u64, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(";
    [&rebuild[..], storage, &number(offset), &numbers(shape), &numbers(strides), b"\x89NtR"].concat()
}

/// A tensor of the storage in [`archive`].
fn valid_tensor() -> Vec<u8> {
    tensor(&storage("FloatStorage", "0", 6), 0, &[2, 3], &[3, 1])
}

fn dict(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pairs: Vec<u8> = pairs.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"}(", &pairs[..], b"u"].concat()
}

/// A pickle of a dict with `value` in it.
fn of_value(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02", &dict(&[("w", value.to_vec())])[..], END].concat()
}

fn of_dict(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
    [b"\x80\x02", &dict(pairs)[..], END].concat()
}

fn write(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("model.pt");
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
            Err(error @ (WeightsError::BadFile { .. } | WeightsError::Io { .. })) => error.to_string(),
            Err(other) => panic!("{name}: unexpected error {other:?}"),
        };
        assert!(start.elapsed() < Duration::from_secs(10), "{name} took {:?}", start.elapsed());
        assert!(message.contains(expected), "{name}: {message:?} does not contain {expected:?}");
        assert!(message.starts_with(&path.display().to_string()), "{name}: {message:?} does not name the file");
        assert!(message.len() < 1500 && !message.contains(char::is_control), "{name}: {message:?}");
    }
}

#[test]
fn the_file_that_the_cases_are_made_from_is_valid() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(write(folder.path(), &archive(of_value(&valid_tensor())))).unwrap();
    assert_eq!(checkpoint.info("w").unwrap().shape, [2, 3]);
    assert_eq!(checkpoint.read("w").unwrap().bytes, [7; 24]);
}

#[test]
fn files_that_name_code_are_refused_and_it_does_not_run() {
    let folder = tempfile::tempdir().unwrap();
    let witness = folder.path().join("witness");
    let touch = text(&format!("touch {}", witness.display()));
    let create = text(&format!("open({:?}, 'w')", witness.display().to_string()));
    let call = |global: &str, argument: &[u8]| [global.as_bytes(), b"(", argument, b"tR"].concat();
    let new = |global: &str, argument: &[u8]| [global.as_bytes(), b"(", argument, b"t\x81"].concat();
    let on_stack = [&text("os")[..], &text("system"), b"\x93(", &touch, b"tR"].concat();
    let with_tensors = of_dict(&[("a", valid_tensor()), ("b", call("cos\nsystem\n", &touch))]);
    let cases = [
        ("system", archive(of_value(&call("cos\nsystem\n", &touch))), "\"os.system\", which is not plain data"),
        ("posix", archive(of_value(&call("cposix\nsystem\n", &touch))), "\"posix.system\""),
        ("eval", archive(of_value(&call("cbuiltins\neval\n", &create))), "\"builtins.eval\""),
        ("exec of Python 2", archive(of_value(&call("c__builtin__\nexec\n", &create))), "\"__builtin__.exec\""),
        ("getattr", archive(of_value(&call("cbuiltins\ngetattr\n", &create))), "\"builtins.getattr\""),
        ("a class of subprocess", archive(of_value(&new("csubprocess\nPopen\n", &touch))), "\"subprocess.Popen\""),
        ("named on the stack", archive(of_value(&on_stack)), "\"os.system\""),
        ("with tensors", archive(&with_tensors), "\"os.system\""),
        (
            "a whole model",
            archive(of_value(&new("cmodels\nDiT\n", &touch))),
            "\"models.DiT\", which is not plain data (a model",
        ),
        (
            "pickled by hand",
            archive(of_value(&call("ctorch.storage\n_load_from_bytes\n", &touch))),
            "_load_from_bytes\"",
        ),
        ("control characters", archive(of_value(b"c\x1b[2J\nx\n")), r#""\u{1b}[2J.x""#),
        ("no zip", of_value(&call("cos\nsystem\n", &touch)), "\"os.system\""),
        ("an old instance", archive(of_value(b"(ios\nsystem\n")), "instruction 0x69"),
        ("an extension", archive(of_value(b"\x82\x01")), "instruction 0x82"),
        ("a dict is called", archive(of_value(b"c__builtin__\ndict\n)R")), "Type is called"),
        (
            "a tensor is called",
            archive(of_value(&[&valid_tensor()[..], b")R"].concat())),
            "expected a type or function, found a tensor",
        ),
        ("remedy", archive(of_value(&call("cos\nsystem\n", &touch))), "safetensors.torch.save_file"),
    ];
    check(&cases);
    assert!(!witness.exists());
}

#[test]
fn bombs_are_refused() {
    const HUGE: u64 = 1 << 62;
    let float = |count| storage("FloatStorage", "0", count);
    let nested = [&b"]".repeat(90_000)[..], &b"a".repeat(89_999)].concat();
    let tuples = [b"N", &b"\x85".repeat(1_000_000)[..]].concat();
    let long_text = |length: u32| [b"X", &length.to_le_bytes()[..], b"x"].concat();
    let longest_text = [b"\x8d", &HUGE.to_le_bytes()[..], b"x"].concat();
    let long_name = of_dict(&[(&"n".repeat(5000), valid_tensor())]);
    let zeros = vec![0; 64 << 20];
    let bomb = ZipRecord { size: 3_000_000_000, ..deflated("data.pkl", &of_value(&valid_tensor())) };
    let many = (0..50_001).map(|index| format!("t{index}")).collect::<Vec<_>>();
    let many: Vec<u8> = many.iter().flat_map(|name| [&text(name)[..], b"h\0s"].concat()).collect();
    let many = [b"\x80\x02", &valid_tensor()[..], b"q\x000}", &many, END].concat();
    let deflated_storage = |claim: u64, bytes: &[u8]| {
        let tensor = tensor(&float(claim), 0, &[2], &[1]);
        zip(&[stored("data.pkl", &of_value(&tensor)), deflated("data/0", bytes)])
    };
    let cases = [
        ("deep lists", archive(of_value(&nested)), "nested more than 500 deep"),
        ("deep tuples", archive(of_value(&tuples)), "nested more than 500 deep"),
        ("marks", archive([b"\x80\x02", &b"(".repeat(1_000_000)[..]].concat()), "more than 100000 marks"),
        ("stack", archive([b"\x80\x02", &b"N".repeat(1_000_000)[..]].concat()), "more than 100000 values on the stack"),
        ("values", archive([b"\x80\x02", &b"N0".repeat(3_000_000)[..]].concat()), "more than 2097152 values"),
        ("huge text", archive(of_value(&long_text(u32::MAX))), "4294967295 bytes claimed, only"),
        ("huge text of 8 bytes", archive(of_value(&longest_text)), "4611686018427387904 bytes claimed, only"),
        (
            "huge bytes",
            archive(of_value(b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff")),
            "18446744073709551615 bytes claimed",
        ),
        ("huge number", archive(of_value(b"\x8b\xff\xff\xff\x7f")), "2147483647 bytes claimed"),
        ("huge frame", archive(of_value(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f")), "bytes claimed, only"),
        ("long name", archive(&long_name), "a name of 5000 bytes"),
        ("many tensors", archive(&many), "50001 tensors, more than the 50000"),
        ("far offset", archive(of_value(&tensor(&float(6), HUGE, &[1], &[1]))), "goes past the 24 bytes"),
        ("far stride", archive(of_value(&tensor(&float(6), 0, &[2], &[HUGE]))), "goes past the 24 bytes"),
        ("huge dimension", archive(of_value(&tensor(&float(6), 0, &[HUGE], &[0]))), "goes past the 24 bytes"),
        (
            "huge product",
            archive(of_value(&tensor(&float(6), 0, &[1 << 32, 1 << 32], &[0, 0]))),
            "goes past the 24 bytes",
        ),
        ("expanded", archive(of_value(&tensor(&float(6), 0, &[1 << 40], &[0]))), "refused as a zip bomb"),
        (
            "huge storage",
            archive(of_value(&tensor(&float(HUGE), 0, &[1], &[1]))),
            "a storage of 4611686018427387904 elements",
        ),
        ("storage too small", archive(of_value(&tensor(&float(7), 6, &[1], &[1]))), "should have 28 bytes, found 24"),
        ("deflated more than claimed", deflated_storage(6, &zeros), "should have 24 bytes, found 67108864"),
        ("deflated pickle", zip(&[deflated("data.pkl", &zeros)]), "a pickle of 67108864 bytes, more than"),
        ("deflation too good", zip(&[bomb]), "cannot unpack to the 3000000000 it claims"),
    ];
    check(&cases);
    let kept: Vec<u8> = (0..2_100_000u32).flat_map(|key| [&b"r"[..], &key.to_le_bytes()].concat()).collect();
    check(&[("long memo", archive([b"\x80\x02N", &kept[..]].concat()), "more than 2097152 memo entries")]);
}

/// A value in the memo can be passed a million times for three bytes each.
#[test]
fn long_arguments_are_not_copied_for_each_call() {
    let repeated = |setup: &[u8], step: &[u8], count: usize| {
        archive([b"\x80\x02", setup, &step.repeat(count)[..], b"N."].concat())
    };
    let tensor = valid_tensor();
    let (maker, arguments) = tensor.split_at(tensor.iter().position(|&byte| byte == b'(').unwrap());
    let arguments = &arguments[..arguments.len() - 1];
    let tensors = [maker, b"q\x000", arguments, b"q\x010"].concat();
    let long_tuple = [b"(", &b"N".repeat(90_000)[..], b"tq\x010"].concat();
    let of_class = |class: &[u8]| [class, b"q\x000", &long_tuple].concat();
    let pairs = [b"N)\x86q\x020](", &b"h\x02".repeat(90_000)[..], b"e\x85q\x010"].concat();
    let dicts = [b"ccollections\nOrderedDict\nq\x000", &pairs[..]].concat();
    let shape = [b"ctorch._utils\n_rebuild_tensor_v2\nq\x000", &long_tuple[..]].concat();
    let shape = [&shape[..], b"(", &storage("FloatStorage", "0", 6), b"K\0h\x01h\x01\x89Ntq\x010"].concat();
    let key =
        [&text("storage")[..], b"q\x000ctorch\nFloatStorage\nq\x010", &text(&"k".repeat(1 << 20)), b"q\x020"].concat();
    let call = b"h\0h\x01R0";
    let cases = [
        ("tensors", repeated(&tensors, call, 1_000_000), "more than 200000 tensors"),
        ("sets", repeated(&of_class(b"c__builtin__\nset\n"), call, 1_000_000), "found None"),
        ("dicts", repeated(&dicts, call, 1_000_000), "more than 8388608 items"),
        ("shapes", repeated(&shape, call, 1_000_000), "90000 axes, more than the 32"),
        ("keys", repeated(&key, b"(h\0h\x01h\x02NK\x01tQ0", 1_000_000), "whose key has 1048576 bytes"),
    ];
    check(&cases);
}

/// Forty lists, each of the one before twice, would have 2^40 items if they were copied.
#[test]
fn shared_values_are_not_copied() {
    let mut bomb = b"]q\x010".to_vec();
    (1..40).for_each(|level| bomb.extend([b"](h", &[level][..], b"h", &[level], b"eq", &[level + 1], b"0"].concat()));
    bomb.extend(b"h\x28");
    let itself = b"}q\x64X\x05\0\0\0modelh\x64s".to_vec();
    let folder = tempfile::tempdir().unwrap();
    let pickle = of_dict(&[("w", valid_tensor()), ("bomb", bomb.clone()), ("itself", itself.clone())]);
    let checkpoint = Checkpoint::open(write(folder.path(), &archive(pickle))).unwrap();
    assert_eq!(checkpoint.notes(), ["left out: \"bomb\" (a list of 2), \"itself\" (a dict of 1)"]);
    check(&[
        (
            "bomb alone",
            archive([b"\x80\x02", &bomb[..], END].concat()),
            "expected a dict of tensors by name, found a list",
        ),
        ("dict in itself", archive([b"\x80\x02", &itself[..], END].concat()), "no state dict in it"),
    ]);
}

#[test]
fn broken_pickles_are_named() {
    let float = storage("FloatStorage", "0", 6);
    let called = |arguments: &[u8]| [b"ctorch._utils\n_rebuild_tensor_v2\n", arguments, b"R"].concat();
    let negated =
        [b"ctorch._utils\n_rebuild_tensor_v2\n(", &float[..], b"K\0)))N}(", &text("neg"), b"\x88utR"].concat();
    let other_storage = [&b"(N"[..], b"tQ"].concat();
    let twice = of_dict(&[("a", valid_tensor()), ("a", valid_tensor())]);
    let two = of_dict(&[("a", valid_tensor()), ("b", tensor(&storage("HalfStorage", "0", 6), 0, &[1], &[1]))]);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", archive(b""), "the pickle is cut short"),
        ("only its end", archive(b"."), "a value is popped from an empty stack"),
        ("protocol 9", archive(b"\x80\x09N."), "pickle protocol 9, expected 2 to 5"),
        ("no mark", archive(b"\x80\x02t."), "no mark is set"),
        ("below a mark", archive(b"\x80\x02N(0."), "empty stack"),
        ("odd pairs", archive(b"\x80\x02}(NNNu."), "3 keys and values are added to a dict"),
        ("pairs of a list", archive(b"\x80\x02](NNu."), "are added to a list"),
        ("nothing remembered", archive(b"\x80\x02h\x05."), "the memo has no entry 5"),
        ("a line without end", archive(b"\x80\x02ctorch"), "a line without an end"),
        ("a text", archive([b"\x80\x02", &text("hello")[..], END].concat()), "found text"),
        ("a tensor alone", archive([b"\x80\x02", &valid_tensor()[..], END].concat()), "found a tensor"),
        (
            "no tensors",
            archive(of_value(b"K\x01")),
            "no state dict in it, expected tensors by name, found \"w\" (a number)",
        ),
        (
            "tensor without name",
            archive([b"\x80\x02}(K\x01", &valid_tensor()[..], b"u."].concat()),
            "the key of a tensor is a number, expected a name",
        ),
        ("a name twice", archive(&twice), "key \"a\" is given twice"),
        ("no arguments", archive(of_value(&called(b")"))), "0 arguments where more than 0"),
        ("few arguments", archive(of_value(&called(&[&float[..], b"\x85"].concat()))), "1 arguments where more than 1"),
        ("no tuple", archive(of_value(&called(b"N"))), "expected a tuple, found None"),
        ("no storage", archive(of_value(&called(b"(NK\0))\x89Nt"))), "expected a storage, found None"),
        ("negated", archive(of_value(&negated)), "negated or conjugated"),
        ("another persistent value", archive(of_value(&other_storage)), "expected text, found None"),
        ("storage of no class", archive(of_value(&storage("Size", "0", 6))), "whose class is not one of torch's"),
        (
            "quantised",
            archive(of_value(&storage("QInt8Storage", "0", 6))),
            "torch.QInt8Storage is not a supported dtype",
        ),
        (
            "negative count",
            archive(of_value(b"ctorch._utils\n_rebuild_tensor_v2\n(NJ\xff\xff\xff\xff))\x89NtR")),
            "a storage",
        ),
        ("one key for two", archive(&two), "storage \"0\" is claimed as"),
        ("missing stride", archive(of_value(&tensor(&float, 0, &[1, 1], &[1]))), "2 dimensions and 1 strides"),
        ("many dimensions", archive(of_value(&tensor(&float, 0, &[1; 33], &[1; 33]))), "33 axes"),
        (
            "storage missing",
            archive(of_value(&tensor(&storage("FloatStorage", "../0", 6), 0, &[1], &[1]))),
            "\"a/data/../0\" is missing",
        ),
        (
            "numpy",
            archive(of_value(b"cnumpy.core.multiarray\n_reconstruct\n)R")),
            "\"w\" is a numpy array, expected tensors",
        ),
        ("another pickle", b"\x80\x02N.".to_vec(), "a Python pickle that torch.save did not write"),
    ];
    check(&cases);
}

#[test]
fn broken_archives_are_named() {
    let whole = archive(of_value(&valid_tensor()));
    let pickle = || stored("data.pkl", &of_value(&valid_tensor()));
    let data = || stored("data/0", &[7; 24]);
    let order = |order: &[u8]| zip(&[pickle(), data(), stored("byteorder", order)]);
    let changed = |needle: &[u8], at: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        let found = file.windows(needle.len()).rposition(|window| window == needle).unwrap();
        file[found + at..found + at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let program = zip(&[pickle(), stored("code/__torch__.py", b"")]);
    let cases = [
        ("cut short", whole[..whole.len() / 2].to_vec(), "cut short, download it again"),
        ("without its last byte", whole[..whole.len() - 1].to_vec(), "cut short, download it again"),
        ("big-endian", order(b"big"), "of another byte order (big-endian)"),
        ("an unknown order", order(&[b'x'; 100]), "of another byte order"),
        ("no pickle", zip(&[data()]), "torch.save did not write"),
        ("no folder", zip(&[ZipRecord { name: "data.pkl".to_owned(), ..pickle() }]), "torch.save did not write"),
        ("two pickles", zip(&[pickle(), ZipRecord { name: "b/data.pkl".to_owned(), ..pickle() }]), "2 pickles in one"),
        ("a record twice", zip(&[pickle(), data(), data()]), "\"a/data/0\" is given twice"),
        ("TorchScript", program, "a TorchScript program"),
        ("encrypted", changed(b"PK\x01\x02", 8, &[1]), "it is encrypted"),
        ("packed by bzip2", changed(b"PK\x01\x02", 10, &[12]), "compression method 12"),
        ("two methods", changed(b"PK\x03\x04", 8, &[8]), "does not agree with the directory"),
        ("stored longer", changed(b"PK\x01\x02", 24, &[25]), "25 bytes are stored in 24"),
        ("record past the end", changed(b"PK\x01\x02", 42, &[0xf0, 0xff, 0xff]), "go past the end"),
        ("directory past the end", changed(b"PK\x05\x06", 16, &[0xf0, 0xff, 0xff, 0xff]), "go past the end"),
        ("directory of 4 GB", changed(b"PK\x05\x06", 12, &[0xf0, 0xff, 0xff, 0xff]), "more than the 33554432 allowed"),
        ("directory elsewhere", changed(b"PK\x05\x06", 16, &[0; 4]), "an entry without its signature"),
    ];
    check(&cases);
}

/// What a record unpacks to is only known when it is read.
#[test]
fn deflated_records_that_lie_are_refused_when_read() {
    let pickle = of_value(&tensor(&storage("FloatStorage", "0", 6), 0, &[6], &[1]));
    for (length, expected) in [(25, "unpacks to more than the 24 bytes"), (23, "unpacks to less than the 24 bytes")] {
        let record = ZipRecord { size: 24, ..deflated("data/0", &vec![7; length]) };
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), &zip(&[deflated("data.pkl", &pickle), record]));
        let message = Checkpoint::open(path).unwrap().read("w").unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
    }
}

/// The pickles of the legacy format, and what follows them.
fn legacy(object: &[u8], keys: &[u8], storages: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    [magic, object, b"\x80\x02", keys, END, storages].concat()
}

#[test]
fn broken_legacy_files_are_named() {
    let keys = [b"]", &text("0")[..], b"a"].concat();
    let data = |count: u64| [&count.to_le_bytes()[..], &[7; 24]].concat();
    let other = [b"]", &text("1")[..], b"a"].concat();
    let version = legacy(&of_value(&valid_tensor()), &keys, &data(6));
    let version = [&version[..18], b"\xea\x03", &version[20..]].concat();
    let twice = [b"](", &text("0")[..], &text("0"), b"e"].concat();
    let big_endian = legacy(&of_value(&valid_tensor()), &keys, &data(6));
    let big_endian = [&big_endian[..23], &dict(&[("little_endian", b"\x89".to_vec())]), &big_endian[24..]].concat();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint =
        Checkpoint::open(write(folder.path(), &legacy(&of_value(&valid_tensor()), &keys, &data(6)))).unwrap();
    assert_eq!(checkpoint.read("w").unwrap().bytes, [7; 24]);
    let cases = [
        ("cut short", legacy(&of_value(&valid_tensor()), &keys, &data(6)[..20]), "goes past the file's end"),
        ("without counts", legacy(&of_value(&valid_tensor()), &keys, &[]), "goes past the file's end"),
        ("huge count", legacy(&of_value(&valid_tensor()), &keys, &data(1 << 62)), "goes past the file's end"),
        ("small count", legacy(&of_value(&valid_tensor()), &keys, &data(5)), "should have 24 bytes, found 20"),
        ("no keys", legacy(&of_value(&valid_tensor()), b"]", &data(6)), "storage \"0\" is missing"),
        ("another key", legacy(&of_value(&valid_tensor()), &other, &data(6)), "storage \"1\" is in no tensor"),
        (
            "keys of no list",
            legacy(&of_value(&valid_tensor()), b"N", &data(6)),
            "expected the keys of the storages, found None",
        ),
        ("code", legacy(&of_value(b"cos\nsystem\n"), &keys, &data(6)), "\"os.system\""),
        (
            "a key twice",
            legacy(&of_value(&valid_tensor()), &twice, &[data(6), data(6)].concat()),
            "storage \"0\" is given twice",
        ),
        ("big-endian", big_endian, "of another byte order (big-endian)"),
        ("another version", version, "another version than 1001"),
        ("nothing after the magic", legacy(b"", b"", b"")[..15].to_vec(), "the pickle is cut short"),
    ];
    check(&cases);
}

/// Every tensor of a checkpoint that opens can be read or gives an error.
fn survive(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    if let Ok(checkpoint) = Checkpoint::open(write(folder.path(), bytes)) {
        for info in checkpoint.tensors() {
            let _ = checkpoint.read(&info.name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_change_of_a_good_file_panics(file in 0usize..4, at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let name = ["views.pt", "deflated.ckpt", "legacy.pth", "training-4.pt"][file];
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/torch").join(name);
        let mut bytes = std::fs::read(path).unwrap();
        let length = bytes.len();
        bytes[at.index(length)] = byte;
        survive(&bytes);
        bytes.truncate(cut.index(length));
        survive(&bytes);
    }

    #[test]
    fn no_pickle_panics(pickle in proptest::collection::vec(any::<u8>(), 0..200)) {
        survive(&archive([b"\x80\x02", &pickle[..], END].concat()));
    }

    /// Random instructions get further than random bytes.
    #[test]
    fn no_program_panics(steps in proptest::collection::vec(0usize..30, 0..60)) {
        let steps: Vec<u8> = steps.into_iter().flat_map(instruction).collect();
        survive(&archive([b"\x80\x02", &steps[..], END].concat()));
    }
}

fn instruction(index: usize) -> Vec<u8> {
    let plain: [&[u8]; 26] = [
        b"(",
        b"N",
        b"\x88",
        b"K\x00",
        b"K\x02",
        b"J\xff\xff\xff\xff",
        b"\x8a\x00",
        b"}",
        b"]",
        b")",
        b"\x8f",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
        b"q\x00",
        b"h\x00",
        b"\x94",
        b"0",
        b"1",
        b"b",
        b"R",
    ];
    match index {
        26 => text("w"),
        27 => valid_tensor(),
        28 => b"ccollections\nOrderedDict\n".to_vec(),
        29 => storage("FloatStorage", "0", 6),
        index => plain[index].to_vec(),
    }
}
