//! ControlNets in `forward`: the mode of a union ControlNet, formats that a net is stored in, and Stable Diffusion 3.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assert_close, fixture, relative_error, seeded_file};
use common::{repository, run, stderr_of, text};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A model with the inputs of a fixture.
struct Case {
    folder: TempDir,
    fixtures: PathBuf,
    inputs: HashMap<String, Tensor>,
}

impl Case {
    fn new(fixtures: &str) -> Self {
        let fixtures = repository("tests/fixtures").join(fixtures);
        let inputs = fixture(fixtures.join("input.safetensors")).into_iter().collect();
        Self { folder: tempfile::tempdir().unwrap(), fixtures, inputs }
    }

    fn flux() -> Self {
        let case = Self::new("controlnet");
        case.write("model", "base", &fixture(case.fixtures.join("base/weights.safetensors")).into_iter().collect());
        case
    }

    fn sd3() -> Self {
        let case = Self::new("controlnet-sd3");
        for (folder, name) in [("model", "base"), ("instantx", "instantx"), ("large35", "large35")] {
            let shapes = case.fixtures.join(name).join("shapes.json");
            case.write(folder, name, &seeded_file(shapes, &format!("{name}/")).into_iter().collect());
        }
        case
    }

    /// Writes `tensors` and the config.json of the fixture `name` to `folder`.
    fn write(&self, folder: &str, name: &str, tensors: &HashMap<String, Tensor>) {
        std::fs::create_dir_all(self.path(folder)).unwrap();
        let config = self.fixtures.join(name).join("config.json");
        std::fs::copy(config, self.path(folder).join("config.json")).unwrap();
        candle_core::safetensors::save(tensors, self.path(folder).join("diffusion_pytorch_model.safetensors")).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, inputs: &HashMap<String, Tensor>) -> Vec<String> {
        let [model, input, output] = ["model", "in.safetensors", "out.safetensors"].map(|name| self.path(name));
        candle_core::safetensors::save(inputs, &input).unwrap();
        let output = text(&output).to_owned();
        ["forward", text(&model), "--inputs", text(&input), "-o", &output, "--overwrite"].map(str::to_owned).into()
    }

    /// The sample with further arguments.
    fn forward(&self, inputs: &HashMap<String, Tensor>, more: &[&str]) -> Tensor {
        let arguments = self.arguments(inputs);
        run(0, &[&arguments.iter().map(String::as_str).collect::<Vec<_>>()[..], more].concat());
        fixture(self.path("out.safetensors"))["sample"].clone()
    }

    /// The error with further arguments.
    fn error(&self, inputs: &HashMap<String, Tensor>, more: &[&str]) -> String {
        let arguments = self.arguments(inputs);
        let _ = std::fs::remove_file(self.path("out.safetensors"));
        let message = stderr_of(1, &[&arguments.iter().map(String::as_str).collect::<Vec<_>>()[..], more].concat());
        assert!(!self.path("out.safetensors").exists());
        message
    }

    fn expected(&self, name: &str) -> Tensor {
        fixture(self.fixtures.join("expected.safetensors"))[name].clone()
    }
}

fn union(case: &Case, setting: &str) -> String {
    format!("{}{setting}", text(&case.fixtures.join("union")))
}

/// Either says the mode; another than the setting's is an error, and so is none.
#[test]
fn the_mode_of_a_union_is_that_of_the_setting_or_the_input() {
    let case = Case::flux();
    let without_mode: HashMap<_, _> =
        case.inputs.clone().into_iter().filter(|(name, _)| name != "controlnet_mode").collect();
    let wanted = case.expected("union/full-full/sample");
    for (inputs, setting) in [(&case.inputs, ""), (&without_mode, ":mode=2"), (&case.inputs, ":mode=2")] {
        let sample = case.forward(inputs, &["--controlnet", &union(&case, setting)]);
        assert_close(&format!("union{setting}"), &sample, &wanted, 2e-5);
    }
    let other = case.forward(&without_mode, &["--controlnet", &union(&case, ":mode=1")]);
    assert!(relative_error(&other, &wanted).unwrap() > 1e-3);
    let message = case.error(&case.inputs, &["--controlnet", &union(&case, ":mode=1")]);
    assert!(message.contains("mode=1, but the input \"controlnet_mode\" is [2.0]; state one of them"), "{message}");
    let message = case.error(&without_mode, &["--controlnet", &union(&case, "")]);
    assert!(message.contains("pass ,mode=N or the input \"controlnet_mode\""), "{message}");
    let message = case.error(&without_mode, &["--controlnet", &union(&case, ":mode=4")]);
    assert!(message.contains("pass ,mode=N, 0 to 3, found 4"), "{message}");
}

/// Modes of several nets: an input for each, or one for all.
#[test]
fn each_union_has_a_mode_of_its_own() {
    let case = Case::flux();
    let mode = |mode: i64| Tensor::full(mode, (1, 1), &Device::Cpu).unwrap();
    let mut numbered = case.inputs.clone();
    numbered.remove("controlnet_mode");
    numbered.extend([("controlnet_mode_0".to_owned(), mode(2)), ("controlnet_mode_1".to_owned(), mode(1))]);
    let of_inputs = case.forward(&numbered, &["--controlnet", &union(&case, ""), "--controlnet", &union(&case, "")]);
    let mut bare = case.inputs.clone();
    bare.remove("controlnet_mode");
    let settings = ["--controlnet", &union(&case, ":mode=2"), "--controlnet", &union(&case, ":mode=1")];
    assert_close("two unions", &of_inputs, &case.forward(&bare, &settings), 0.0);
}

/// A net in fp8, plain or with ComfyUI's scales, is that of the values that it stands for.
#[test]
fn a_net_in_fp8_is_widened_as_a_model_is() {
    let case = Case::flux();
    let stored = fixture(case.fixtures.join("one-two/diffusion_pytorch_model.safetensors"));
    let to = |tensor: &Tensor, dtype| tensor.to_dtype(dtype).unwrap();
    let is_matrix = |tensor: &Tensor| tensor.rank() == 2;
    let (mut narrow, mut scaled, mut wide, mut wide_scaled) = Default::default();
    let insert = |map: &mut HashMap<String, Tensor>, name: &str, tensor| map.insert(name.to_owned(), tensor);
    for (name, tensor) in &stored {
        let fp8 = to(tensor, DType::F8E4M3);
        let widened = to(&fp8, DType::F32);
        insert(&mut narrow, name, fp8.clone());
        insert(&mut wide, name, widened.clone());
        let scale = is_matrix(tensor) && name.ends_with(".weight");
        insert(&mut scaled, name, fp8);
        insert(&mut wide_scaled, name, if scale { (widened * 0.5).unwrap() } else { widened });
        if scale {
            let name = name.replace(".weight", ".scale_weight");
            insert(&mut scaled, &name, Tensor::new(0.5f32, &Device::Cpu).unwrap());
        }
    }
    for (net, tensors) in [("narrow", &narrow), ("wide", &wide), ("scaled", &scaled), ("wide-scaled", &wide_scaled)] {
        case.write(net, "one-two", tensors);
    }
    let sample = |net: &str| case.forward(&case.inputs, &["--controlnet", text(&case.path(net))]);
    assert_close("fp8", &sample("narrow"), &sample("wide"), 1e-6);
    // The scaled values are presented in bf16, which has all of fp8's times a power of two.
    assert_close("scaled fp8", &sample("scaled"), &sample("wide-scaled"), 1e-6);
    assert!(relative_error(&sample("narrow"), &sample("scaled")).unwrap() > 1e-2);
}

/// A format that cannot be computed with is refused with the tensor's name, and nothing is written.
#[test]
fn a_net_that_cannot_be_computed_with_is_refused() {
    let case = Case::flux();
    let mut tensors: HashMap<_, _> =
        fixture(case.fixtures.join("one-two/diffusion_pytorch_model.safetensors")).into_iter().collect();
    let name = "transformer_blocks.0.attn.to_q.weight";
    tensors.insert(name.to_owned(), Tensor::zeros((8, 8), DType::I64, &Device::Cpu).unwrap());
    case.write("packed", "one-two", &tensors);
    let message = case.error(&case.inputs, &["--controlnet", text(&case.path("packed"))]);
    assert!(message.contains(name) && message.contains("I64"), "{message}");
}

/// Whichever tensor is missing, the file is known as a ControlNet, and the tensor or what follows from it is named.
#[test]
fn a_net_that_lacks_a_tensor_is_refused() {
    let case = Case::flux();
    let whole: HashMap<_, _> =
        fixture(case.fixtures.join("one-two/diffusion_pytorch_model.safetensors")).into_iter().collect();
    for name in whole.keys() {
        let mut cut = whole.clone();
        cut.remove(name);
        case.write("cut", "one-two", &cut);
        let message = case.error(&case.inputs, &["--controlnet", text(&case.path("cut"))]);
        assert!(message.contains(text(&case.path("cut"))) && message.contains(name), "{name}: {message}");
    }
}

#[test]
fn controlnets_of_stable_diffusion_3_agree_with_diffusers() {
    let case = Case::sd3();
    for net in ["instantx", "large35"] {
        let path = case.path(net);
        let sample = case.forward(&case.inputs, &["--controlnet", text(&path)]);
        assert_close(net, &sample, &case.expected(&format!("{net}/full-full/sample")), 2e-5);
        let linear = ["--controlnet", text(&path), "--attention", "clear:r=3", "--controlnet-attention", "clear:r=3"];
        assert_close(net, &case.forward(&case.inputs, &linear), &case.expected(&format!("{net}/r3-r3/sample")), 2e-5);
    }
}

/// A key of config.json that the class does not have is named.
/// FLUX's ControlNets for inpainting, for which diffusers has no pipeline.
#[test]
fn a_mask_beside_packed_latents_is_refused() {
    let case = Case::flux();
    let mut tensors: HashMap<String, Tensor> =
        fixture(case.fixtures.join("one-two/diffusion_pytorch_model.safetensors")).into_iter().collect();
    let embedder = tensors["controlnet_x_embedder.weight"].clone();
    let mask = Tensor::zeros((embedder.dim(0).unwrap(), 4), embedder.dtype(), &Device::Cpu).unwrap();
    tensors.insert("controlnet_x_embedder.weight".to_owned(), Tensor::cat(&[&embedder, &mask], 1).unwrap());
    case.write("inpaint", "one-two", &tensors);
    let message = case.error(&case.inputs, &["--controlnet", text(&case.path("inpaint"))]);
    assert!(
        message.contains("takes 20 channels, 4 more than the latents") && message.contains("inpainting"),
        "{message}"
    );
}

#[test]
fn an_unknown_key_is_named() {
    let case = Case::sd3();
    let config = case.path("instantx/config.json");
    let text_of = |path: &Path| std::fs::read_to_string(path).unwrap();
    std::fs::write(&config, text_of(&config).replacen('{', "{\"rope_theta\": 10000,", 1)).unwrap();
    let arguments = case.arguments(&case.inputs);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let message = stderr_of(0, &[&arguments[..], &["--controlnet", text(&case.path("instantx"))]].concat());
    assert!(message.contains("the key \"rope_theta\" is not understood"), "{message}");
}
