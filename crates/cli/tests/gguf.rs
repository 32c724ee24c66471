//! GGUF files as community tools write them, in Black Forest Labs' tensor names: inspected, run and converted.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use clearform::{GenerateOptions, Prompt, RgbImage, SourceOptions, generate};
use clearform_layout::{Dequantized, Hints, Manifests, detect};
use clearform_runtime::image_metrics::retrieve;
use clearform_testkit::assert_close;
use clearform_weights::{InMemoryTensors, TensorSource};
use common::forms::pixels;
use common::{Tiny, expected, forward, json, repository, run, stderr_of, text};
use std::collections::HashMap;
use std::path::Path;

const ALIGNMENT: usize = 32;
/// Values per Q8_0 block.
const BLOCK: usize = 32;
/// Ids of metadata types.
const INT32: u32 = 5;
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// Tensor types, with their ids in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    F32 = 0,
    F16 = 1,
    Q8 = 8,
}

/// A tensor as written to the file, and the values it should be read as.
struct Written {
    format: Format,
    shape: Vec<usize>,
    bytes: Vec<u8>,
    rounded: Tensor,
}

impl Written {
    /// Vectors stay in F32, as in the files of the usual converters.
    fn new(tensor: &Tensor, format: Format) -> Self {
        let format = if tensor.rank() < 2 { Format::F32 } else { format };
        let (bytes, rounded) = match format {
            Format::F32 => (bytes(tensor), tensor.clone()),
            Format::F16 => {
                let rounded = tensor.to_dtype(DType::F16).unwrap();
                (bytes(&rounded), rounded)
            }
            Format::Q8 => {
                let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                let (blocks, values): (Vec<_>, Vec<_>) = values.chunks_exact(BLOCK).map(quantise).unzip();
                (blocks.concat(), Tensor::from_vec(values.concat(), tensor.shape(), tensor.device()).unwrap())
            }
        };
        Self { format, shape: tensor.dims().to_vec(), bytes, rounded }
    }

    /// Whether its rows are whole blocks; otherwise it is written as one row, and its shape goes into the metadata.
    fn fits(&self) -> bool {
        self.format != Format::Q8 || self.shape.last().unwrap().is_multiple_of(BLOCK)
    }

    /// Dimensions, innermost first.
    fn dimensions(&self) -> Vec<u64> {
        match self.fits() {
            true => self.shape.iter().rev().map(|&size| size as u64).collect(),
            false => vec![self.shape.iter().product::<usize>() as u64],
        }
    }
}

/// The values as stored in a file.
fn bytes(tensor: &Tensor) -> Vec<u8> {
    InMemoryTensors::from_iter([("x".to_owned(), tensor.clone())]).read("x").unwrap().bytes
}

/// A block of Q8_0 whose scale is a power of two, and the values it stands for.
fn quantise(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let largest = values.iter().fold(1e-3f32, |largest, value| largest.max(value.abs()));
    let scale = (largest / 127.0).log2().ceil().exp2();
    let quants: Vec<i8> = values.iter().map(|value| (value / scale).round() as i8).collect();
    let half = Tensor::new(scale, &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
    let block = bytes(&half).into_iter().chain(quants.iter().map(|&value| value as u8)).collect();
    (block, quants.iter().map(|&value| f32::from(value) * scale).collect())
}

/// The tensors of `tiny` in Black Forest Labs' names.
fn bfl(tiny: &Tiny) -> HashMap<String, Tensor> {
    let manifests = Manifests::embedded().unwrap();
    let checkpoint = Dequantized::open(tiny.path(), &manifests).unwrap();
    let identified = detect(&checkpoint, &manifests, &Hints::default()).unwrap();
    let canonical = identified.canonical(&checkpoint).require_complete().unwrap();
    let foreign = identified.to_layout("bfl", canonical).unwrap();
    foreign.tensors().into_iter().map(|info| (info.name.clone(), foreign.tensor(&info.name).unwrap())).collect()
}

/// A string with its length before it.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn pair(key: &str, kind: u32, value: Vec<u8>) -> Vec<u8> {
    [string(key), kind.to_le_bytes().to_vec(), value].concat()
}

fn shape_pair(name: &str, shape: &[usize]) -> Vec<u8> {
    let head = [&INT32.to_le_bytes()[..], &(shape.len() as u64).to_le_bytes()].concat();
    let sizes = shape.iter().flat_map(|&size| (size as u32).to_le_bytes()).collect();
    pair(&format!("comfy.gguf.orig_shape.{name}"), LIST, [head, sizes].concat())
}

fn write(path: &Path, tensors: &HashMap<String, Written>) {
    let mut pairs = vec![pair("general.architecture", TEXT, string("flux"))];
    let (mut directory, mut values) = (Vec::new(), Vec::new());
    for (name, tensor) in tensors {
        if !tensor.fits() {
            pairs.push(shape_pair(name, &tensor.shape));
        }
        let dimensions = tensor.dimensions();
        directory.extend([&string(name)[..], &(dimensions.len() as u32).to_le_bytes()].concat());
        directory.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
        directory.extend([&(tensor.format as u32).to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat());
        values.extend(&tensor.bytes);
        values.resize(values.len().next_multiple_of(ALIGNMENT), 0);
    }
    let counts = [tensors.len(), pairs.len()].map(|count| (count as u64).to_le_bytes()).concat();
    let mut file = [b"GGUF\x03\0\0\0", &counts[..], &pairs.concat(), &directory].concat();
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    std::fs::write(path, [file, values].concat()).unwrap();
}

/// For each format: a bound on the sample's rounding error, and a note. F16 is exact, since the fixture is F16.
#[test]
fn gguf_files_run_and_convert_as_the_tensors_they_stand_for() {
    let tiny = Tiny::new();
    let config = repository("tests/fixtures/flux/head24/config.json");
    let config = ["--config", text(&config)];
    let parameters: usize = tiny.tensors.values().map(Tensor::elem_count).sum();
    for (format, rounding, note) in
        [(Format::F32, 2e-5, None), (Format::F16, 2e-5, None), (Format::Q8, 2e-2, Some("quantised tensors: "))]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (file, plain, model) = (path("flux.gguf"), path("plain.safetensors"), path("model"));
        let written: HashMap<_, _> =
            bfl(&tiny).iter().map(|(name, tensor)| (name.clone(), Written::new(tensor, format))).collect();
        write(&file, &written);
        let kept_bytes = written.values().map(|tensor| tensor.bytes.len() as u64).sum::<u64>();
        let rounded: HashMap<_, _> = written.into_iter().map(|(name, tensor)| (name, tensor.rounded)).collect();
        candle_core::safetensors::save(&rounded, &plain).unwrap();

        let found = json(0, &[&["inspect", text(&file)], &config[..]].concat());
        assert_eq!((&found["family"], &found["layout"]), (&"flux".into(), &"bfl".into()), "{format:?}");
        assert_eq!((&found["complete"], &found["parameters"]), (&true.into(), &parameters.into()), "{format:?}");
        let stored = match format {
            Format::F32 => ["F32", ""],
            Format::F16 => ["F16", "F32"],
            Format::Q8 => ["Q8_0", "F32"],
        };
        assert_eq!([0, 1].map(|at| found["stored"][at]["format"].as_str().unwrap_or_default()), stored);
        let kept: u64 =
            found["stored"].as_array().unwrap().iter().map(|format| format["bytes"].as_u64().unwrap()).sum();
        assert_eq!(kept, kept_bytes, "{format:?}");

        let full = forward(&file, &config);
        // In f32 the sums of a weight that stays quantised are those of its parts.
        assert_close("full", &full, &forward(&plain, &config), if format == Format::Q8 { 1e-6 } else { 0.0 });
        assert_close("full, by diffusers", &full, &expected("full"), rounding);
        let convert = ["convert", text(&file), "-o", text(&model), "--radius", "3", "--no-distill", "--dtype", "f32"];
        let message = stderr_of(0, &[&convert[..], &config].concat());
        assert!(note.is_none_or(|note| message.contains(note)), "{format:?}: {message}");
        let linear = forward(&plain, &[&["--attention", "clear:r=3"], &config[..]].concat());
        assert_close("converted", &forward(&model, &[]), &linear, 0.0);
        run(0, &["verify", text(&model)]);
    }
}

/// The transformer of mini-flux in Black Forest Labs' names, as candle quantises its matrices.
fn save_quantised(tensors: &HashMap<String, Tensor>, format: GgmlDType, path: &Path) {
    let quantised = tensors.iter().map(|(name, tensor)| {
        let is_divisible = tensor.rank() == 2 && tensor.dims()[1].is_multiple_of(BLOCK);
        let format = if is_divisible { format } else { GgmlDType::F32 };
        (name, QTensor::quantize(tensor, format).unwrap())
    });
    let quantised: Vec<(&String, QTensor)> = quantised.collect();
    let named: Vec<(&str, &QTensor)> = quantised.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let architecture = gguf_file::Value::String("flux".to_owned());
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &[("general.architecture", &architecture)], &named).unwrap();
}

#[test]
fn quantised_models_draw_the_right_names() {
    let folder = tempfile::tempdir().unwrap();
    let base = repository("assets/mini-flux/base");
    let exported = folder.path().join("bfl.safetensors");
    run(0, &["export", text(&base), "--to", "bfl", "-o", text(&exported)]);
    let tensors = candle_core::safetensors::load(&exported, &Device::Cpu).unwrap();
    let in_f32 = tensors.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap()));
    let tensors: HashMap<String, Tensor> = in_f32.collect();
    let names = std::fs::read_to_string(repository("assets/mini-flux/names.txt")).unwrap();
    // Names from everywhere in the list, each with its own noise.
    let names: Vec<&str> = names.lines().step_by(8).collect();
    assert_eq!(names.len(), 16);
    let drawn = |model: &Path| -> Vec<RgbImage> {
        let reading = SourceOptions { config: Some(base.join("transformer/config.json")), ..SourceOptions::default() };
        let draw = |(index, name): (usize, &&str)| {
            let options = GenerateOptions {
                reading: reading.clone(),
                components: Some(base.clone()),
                steps: Some(8),
                seed: index as u64,
                ..GenerateOptions::new(model, Prompt::Text((*name).to_owned()))
            };
            generate(&options, &mut ()).unwrap().images.remove(0)
        };
        names.iter().enumerate().map(draw).collect()
    };
    let originals = drawn(&exported);
    for format in [GgmlDType::Q8_0, GgmlDType::Q4_0] {
        let file = folder.path().join(format!("{format:?}.gguf"));
        save_quantised(&tensors, format, &file);
        let nearest = retrieve(&drawn(&file), &originals).unwrap();
        assert_eq!(nearest, (0..names.len()).collect::<Vec<_>>(), "{format:?}");
    }
}

/// mini-flux, whose rows are whole blocks. Activations are bf16 by default, and f32 in `forward`.
#[test]
fn quantised_matrices_stay_so_in_memory_and_draw() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = repository("assets/mini-flux/base");
    let (exported, file, plain) = (path("bfl.safetensors"), path("q8.gguf"), path("plain.safetensors"));
    run(0, &["export", text(&base), "--to", "bfl", "-o", text(&exported)]);
    let tensors = candle_core::safetensors::load(&exported, &candle_core::Device::Cpu).unwrap();
    let in_f32 = tensors.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap()));
    let written: HashMap<_, _> = in_f32.map(|(name, tensor)| (name, Written::new(&tensor, Format::Q8))).collect();
    write(&file, &written);
    let stored: u64 = written.values().map(|tensor| tensor.bytes.len() as u64).sum();
    let rounded: HashMap<_, _> = written.into_iter().map(|(name, tensor)| (name, tensor.rounded)).collect();
    candle_core::safetensors::save(&rounded, &plain).unwrap();

    let config = base.join("transformer/config.json");
    let reading = ["--config", text(&config)];
    let found = json(0, &[&["inspect", text(&file)], &reading[..]].concat());
    let (held, bytes) = (found["held_bytes"].as_u64().unwrap(), found["bytes"].as_u64().unwrap());
    assert_eq!(found["value_bytes"], 2);
    assert!(held < stored * 11 / 10 && bytes > 3 * held, "{held} of {bytes} bytes, {stored} stored");

    let drawn = |model: &Path, more: &[&str]| {
        let image = path("image.png");
        let size = ["--width", "64", "--height", "64", "--steps", "4", "--overwrite"];
        let generate = ["generate", text(model), "cat face", "--components", text(&base), "-o", text(&image)];
        run(0, &[&generate[..], &reading, &size, more].concat());
        pixels(&image)
    };
    let quantised = drawn(&file, &[]);
    assert!(quantised == drawn(&file, &["--offload", "always"]), "streamed");
    let difference = |other: &[u8]| {
        let sum: u64 = quantised.iter().zip(other).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / other.len() as f64
    };
    // Only the activations are rounded to bf16.
    let of_plain = difference(&drawn(&plain, &["--dtype", "f32"]));
    assert!(of_plain < 2.0, "{of_plain} of 255");
    let lora = repository("assets/mini-flux/lora");
    let [with_lora, plain_with_lora] =
        [&file, &plain].map(|model| drawn(model, &["--dtype", "f32", "--lora", text(&lora)]));
    let sum: u64 = with_lora.iter().zip(&plain_with_lora).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    assert!(with_lora != quantised && sum < with_lora.len() as u64 / 100, "{sum}");
}

/// What `export` writes is what was asked for, and an export of it has the same bytes; nothing quantised is in safetensors.
#[test]
fn a_model_is_exported_in_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = repository("assets/mini-flux/base");
    let export = |model: &Path, output: &Path, more: &[&str]| {
        stderr_of(0, &[&["export", text(model), "--to", "gguf", "-o", text(output)], more].concat())
    };
    let said = export(&base, &path("q8_0.gguf"), &["--quantize", "q8_0"]);
    assert!(said.contains("32 of 96 tensors are quantised"), "{said}");
    export(&path("q8_0.gguf"), &path("again.gguf"), &[]);
    assert_eq!(std::fs::read(path("q8_0.gguf")).unwrap(), std::fs::read(path("again.gguf")).unwrap());
    // 192 columns are no whole blocks of 256 values.
    let said = export(&base, &path("q4_k.gguf"), &["--quantize", "q4_k"]);
    assert!(said.contains("rows that Q4_K does not divide: 28 in Q5_0"), "{said}");
    let stored = &json(0, &["inspect", text(&path("q4_k.gguf"))])["stored"];
    assert!(stored.to_string().contains("Q4_K") && stored.to_string().contains("Q5_0"), "{stored}");
    for (options, expected) in [
        (
            ["--to", "comfy", "-o", text(&path("x.safetensors")), "--quantize", "q8_0"],
            "safetensors has no such formats",
        ),
        (["--to", "gguf", "-o", text(&path("x.gguf")), "--quantize", "q9"], "expected one of q4_0"),
        (["--to", "gguf", "-o", text(&path("x.safetensors")), "--quantize", "q8_0"], "a name that ends in .gguf"),
    ] {
        let said = stderr_of(1, &[&["export", text(&base)], &options[..]].concat());
        assert!(said.contains(expected), "{said}");
    }
    let (model, image) = (path("q8_0.gguf"), path("fox.png"));
    let generate = ["generate", text(&model), "fox", "--components", text(&base), "--steps", "2"];
    run(0, &[&generate[..], &["-o", text(&image)]].concat());
}

/// A portable model may hold GGUF: what is trained is quantised with the rest, and every command knows it.
#[test]
fn a_model_is_converted_to_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let [base, model, longer] = [repository("assets/mini-dit/model"), path("model"), path("longer")];
    let short = ["--sample-count", "2", "--sample-steps", "2", "--held-out", "2", "--steps", "2"];
    let convert = ["convert", text(&base), "-o", text(&model), "--radius", "4", "--quantize", "q8_0"];
    run(0, &[&convert[..], &short].concat());
    run(0, &["verify", text(&model)]);
    let inspected = json(0, &["inspect", text(&model)]);
    assert!(
        inspected["complete"].as_bool().unwrap() && inspected["stored"].to_string().contains("Q8_0"),
        "{inspected}"
    );
    assert_eq!(inspected["attention"], "clear:r=4");
    // The transformer's folder alone knows its plan, too.
    let alone = json(0, &["inspect", text(&model.join("transformer"))]);
    assert_eq!(alone["attention"], "clear:r=4");
    run(0, &["generate", text(&model), "--class", "3", "--steps", "2", "-o", text(&path("three.png"))]);
    run(0, &["patch", "extract", text(&model), "--base", text(&base), "-o", text(&path("patch.safetensors"))]);
    run(0, &[&["distill", text(&model), "--teacher", text(&base), "-o", text(&longer)], &short[..]].concat());
    run(0, &["verify", text(&longer)]);
    let refused = stderr_of(1, &["convert", text(&base), "-o", text(&path("x")), "--quantize", "q9", "--no-distill"]);
    assert!(refused.contains("--quantize: expected one of q4_0") && !path("x").exists(), "{refused}");
}
