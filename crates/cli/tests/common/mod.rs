//! Runs the command, and provides small models to run it on.
#![allow(dead_code)]

pub mod forms;

use candle_core::{DType, Tensor};
use clearform_testkit::fixture;
use clearform_weights::{Dtype, InMemoryTensors, RawTensor, TensorInfo, TensorSource, WeightsError};
use serde_json::Value;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

thread_local! {
    static ON_CPU: Cell<bool> = const { Cell::new(false) };
}

/// The command with its arguments. If `CLEARFORM_PROGRAM` is set, that program is tested instead of this build.
pub fn clearform(arguments: &[&str]) -> Command {
    let this_build = || env!("CARGO_BIN_EXE_clearform").into();
    let program = std::env::var_os("CLEARFORM_PROGRAM").filter(|_| !ON_CPU.get()).unwrap_or_else(this_build);
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// The program that [`clearform`] runs.
pub fn program() -> PathBuf {
    clearform(&[]).get_program().into()
}

/// Whether [`clearform`] runs models on a GPU or a simulated one.
pub fn runs_on_gpu() -> bool {
    !ON_CPU.get() && std::env::var_os("CLEARFORM_PROGRAM").is_some()
}

/// Calls `work` with [`clearform`] running this build, whatever `CLEARFORM_PROGRAM` is.
pub fn on_cpu<T>(work: impl FnOnce() -> T) -> T {
    ON_CPU.set(true);
    let result = work();
    ON_CPU.set(false);
    result
}

/// Runs the command and returns its output; panics unless it exits with `code`.
pub fn run(code: i32, arguments: &[&str]) -> Output {
    run_with(code, arguments, &[])
}

/// As [`run`], with environment variables.
pub fn run_with(code: i32, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let output = clearform(arguments).envs(variables.iter().copied()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "clearform {arguments:?}\n{stdout}\n{stderr}");
    output
}

/// As [`run`], with `--json`: the object on stdout.
pub fn json(code: i32, arguments: &[&str]) -> Value {
    let output = run(code, &[arguments, &["--json"]].concat());
    serde_json::from_slice(&output.stdout).expect("stdout holds one JSON object")
}

/// As [`run`]: the text on stderr.
pub fn stderr_of(code: i32, arguments: &[&str]) -> String {
    String::from_utf8(run(code, arguments).stderr).unwrap()
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file or folder of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Tensors of any dtype as raw bytes; candle has no F8_E5M2.
#[derive(Clone, Default)]
pub struct RawTensors(pub BTreeMap<String, RawTensor>);

impl TensorSource for RawTensors {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.keys().filter_map(|name| self.info(name)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let RawTensor { dtype, shape, .. } = self.0.get(name)?;
        Some(TensorInfo { name: name.to_owned(), dtype: *dtype, shape: shape.clone() })
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        self.0.get(name).cloned().ok_or_else(|| WeightsError::Missing { name: name.to_owned() })
    }
}

impl RawTensors {
    pub fn put(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.0.insert(name, RawTensor { dtype, shape: shape.to_vec(), bytes });
    }

    pub fn put_tensor(&mut self, name: &str, tensor: Tensor) {
        let raw = InMemoryTensors::from_iter([(name.to_owned(), tensor)]).read(name).unwrap();
        self.0.insert(name.to_owned(), raw);
    }
}

/// A tiny FLUX transformer with random weights from diffusers, in f32, in a folder as `save_pretrained` writes it.
pub struct Tiny {
    folder: tempfile::TempDir,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Tiny {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let original = repository("tests/fixtures/flux/head24");
        std::fs::copy(original.join("config.json"), folder.path().join("config.json")).unwrap();
        let stored = fixture(original.join("weights.safetensors"));
        let widened = |(name, tensor): (String, Tensor)| (name, tensor.to_dtype(DType::F32).unwrap());
        let tiny = Self { folder, tensors: stored.into_iter().map(widened).collect() };
        tiny.save();
        tiny
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes the current tensors.
    pub fn save(&self) {
        let tensors: std::collections::HashMap<_, _> = self.tensors.clone().into_iter().collect();
        let path = self.folder.path().join("diffusion_pytorch_model.safetensors");
        candle_core::safetensors::save(&tensors, path).unwrap();
    }
}

/// Runs `forward` on the inputs of [`Tiny`]'s fixture and returns the sample.
pub fn forward(model: &Path, further: &[&str]) -> Tensor {
    forward_with(model, further, &[])
}

/// Writes the inputs of [`Tiny`]'s fixture to `path`.
pub fn save_inputs(path: &Path) {
    let cases = fixture(repository("tests/fixtures/flux/head24/cases.safetensors"));
    let prefix = "5x8/input/";
    let inputs: HashMap<String, Tensor> =
        cases.into_iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor))).collect();
    candle_core::safetensors::save(&inputs, path).unwrap();
}

/// As [`forward`], with environment variables.
pub fn forward_with(model: &Path, further: &[&str], variables: &[(&str, &str)]) -> Tensor {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    save_inputs(&input);
    let arguments = ["forward", text(model), "--inputs", text(&input), "-o", text(&output), "--overwrite"];
    run_with(0, &[&arguments, further].concat(), variables);
    fixture(&output)["sample"].clone()
}

/// The sample of diffusers for the same inputs.
pub fn expected(plan: &str) -> Tensor {
    fixture(repository("tests/fixtures/flux/head24/cases.safetensors"))[&format!("5x8/{plan}/sample")].clone()
}
