//! ControlNets of Stable Diffusion 3 through their plugin, compared with diffusers' SD3ControlNetModel,
//! SD3Transformer2DModel and StableDiffusion3ControlNetPipeline: each residual, the predictions with full and CLEAR
//! attention, and what the pipeline makes of a control image. fixtures/controlnet-sd3/export.py describes the fixtures.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_models::{Denoiser, DenoiserInput, ImageSize, Prompt};
use clearform_plugin_host::{ControlNetInput, ControlledDenoiser, Controls, PluginError, Strength};
use clearform_runtime::{
    ActiveControlNet, AdapterRequest, Adapters, ControlImages, GenerateRequest, GuidanceScales, ImageBatch, Pipeline,
    PipelineOptions, ReadOptions, RgbImage, TransformerCheckpoint,
};
use clearform_sampling::StepAction;
use clearform_testkit::{assemble_pipeline, seeded_file};
use clearform_weights::InMemoryTensors;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use support::{assert_close, fixture, registry, relative_error, tensors};
use tempfile::TempDir;

const BOUND: f64 = 2e-5;
/// Several steps with guidance enlarge the error of each.
const LATENTS_BOUND: f64 = 1e-4;
/// The nets, each with the blocks of the transformer's five that its residuals are added to.
const NETS: [(&str, &[&[usize]]); 3] =
    [("instantx", &[&[0, 1, 2], &[3]]), ("medium35", &[&[0, 1], &[2, 3], &[]]), ("large35", &[&[0, 1, 2], &[3]])];
const PLANS: [(&str, &str); 2] = [("full", "full"), ("r3", "clear:r=3")];

/// The fixture's models as folders.
struct Models(TempDir);

impl Models {
    fn new() -> Self {
        let models = Self(tempfile::tempdir().unwrap());
        for name in ["base", "instantx", "medium35", "large35", "inpaint"] {
            models.write(name, config(name), seeded(name));
        }
        models
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a model in diffusers' form.
    fn write(&self, name: &str, config: Value, tensors: BTreeMap<String, Tensor>) {
        std::fs::create_dir_all(self.path(name)).unwrap();
        std::fs::write(self.path(name).join("config.json"), config.to_string()).unwrap();
        save(&self.path(name).join("diffusion_pytorch_model.safetensors"), tensors);
    }

    fn base(&self) -> TransformerCheckpoint {
        TransformerCheckpoint::open(&self.path("base"), &ReadOptions::default_options().unwrap()).unwrap()
    }

    fn input(&self) -> DenoiserInput {
        let mut inputs: BTreeMap<_, _> = tensors("controlnet-sd3/input.safetensors").into_iter().collect();
        inputs.remove("controlnet_cond");
        self.base().architecture().parse_input(inputs).unwrap()
    }

    fn open(&self, net: &str, scale: f64, attention: &str) -> Result<ActiveControlNet, String> {
        open(&self.path(net), scale, attention, &self.base())
    }

    /// The prediction of the transformer with `net`.
    fn predict(&self, plan: &str, net: &ActiveControlNet) -> Tensor {
        let plan: AttentionPlan = plan.parse().unwrap();
        let denoiser: Box<dyn Denoiser> = self.base().build(&plan, Some(DType::F32), &Device::Cpu).unwrap();
        let control = ControlNetInput {
            controlnet: net.controlnet.clone(),
            control: control(),
            mode: None,
            guidance: None,
            scale: net.scale,
            interval: net.schedule.interval,
        };
        ControlledDenoiser::new(denoiser.as_ref(), vec![control]).forward(&self.input()).unwrap()
    }

    /// The latents as the transformer embeds them, in raster order.
    fn embedded(&self) -> Tensor {
        let denoiser = self.base().build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu).unwrap();
        let state = denoiser.embed(&self.input()).unwrap();
        state.context.geometry.to_raster(&state.image).unwrap()
    }
}

#[test]
fn residuals_equal_those_of_diffusers() {
    let models = Models::new();
    let expected = expected();
    let embedded = models.embedded();
    for (net, blocks) in NETS {
        for (name, plan) in PLANS {
            let controlnet = models.open(net, 1.0, plan).unwrap().controlnet;
            let wanted = controlnet.input().embedded_latents.then_some(&embedded);
            let controls = Controls { control: &control(), mode: None, guidance: None, embedded: wanted };
            let residuals = controlnet.residuals(&models.input(), controls).unwrap();
            assert_eq!(residuals.len(), blocks.len(), "{net}");
            for (index, residual) in residuals.iter().enumerate() {
                let what = format!("{net}/{name}/residual/{index}");
                assert_close(&residual.tensor, &expected[&what], BOUND, &what);
                assert_eq!(residual.blocks, blocks[index], "{what}");
            }
            let full = &expected[&format!("{net}/full/residual/1")];
            let windowed = relative_error(&expected[&format!("{net}/r3/residual/1")], full);
            assert!(windowed > 1e-3, "{net}: the window changes a residual by only {windowed:.1e}");
        }
    }
}

#[test]
fn predictions_equal_those_of_diffusers() {
    let models = Models::new();
    let expected = expected();
    for (net, _) in NETS {
        for (name, base, controlnet) in
            [("full-full", "full", "full"), ("r3-full", "clear:r=3", "full"), ("r3-r3", "clear:r=3", "clear:r=3")]
        {
            let sample = models.predict(base, &models.open(net, 1.0, controlnet).unwrap());
            assert_close(&sample, &expected[&format!("{net}/{name}/sample")], BOUND, &format!("{net} {name}"));
        }
    }
    let weaker = models.predict("full", &models.open("instantx", 0.6, "full").unwrap());
    assert_close(&weaker, &expected["instantx@0.6/full-full/sample"], BOUND, "instantx at 0.6");
}

/// The fixture's step is the first of one.
#[test]
fn a_net_is_idle_outside_its_interval() {
    let models = Models::new();
    let mut net = models.open("large35", 1.0, "full").unwrap();
    net.schedule.interval = [0.5, 1.0];
    assert_close(&models.predict("full", &net), &expected()["none/full/sample"], BOUND, "idle");
}

/// What each form asks the host for: InstantX' was trained with pooled text of zeros and latents that are not shifted.
#[test]
fn each_form_says_what_it_takes() {
    let models = Models::new();
    for (net, zero_pooled, embedded) in
        [("instantx", true, false), ("medium35", false, false), ("large35", false, true)]
    {
        let input = models.open(net, 1.0, "full").unwrap().controlnet.input();
        assert_eq!((input.channels, input.modes, input.range), (16, 0, [-1.0, 1.0]), "{net}");
        let found = (input.unshifted, input.zero_pooled, input.embedded_latents);
        assert_eq!(found, (zero_pooled, zero_pooled, embedded), "{net}");
    }
}

/// Stability's files have their own names, fuse query, key and value, and say what the control is.
#[test]
fn a_file_with_the_names_of_stability_is_the_same_net() {
    let models = Models::new();
    let expected = expected();
    for (control_type, range) in [(0, [-1.0, 1.0]), (1, [0.5, 128.0]), (2, [-1.0, 1.0])] {
        let path = models.path("stability.safetensors");
        save(&path, stability(control_type));
        let net = open(&path, 1.0, "full", &models.base()).unwrap();
        assert_eq!(net.controlnet.input().range, range, "control_type {control_type}");
        assert!(net.controlnet.input().embedded_latents && !net.controlnet.input().zero_pooled);
        assert_close(&models.predict("full", &net), &expected["large35/full-full/sample"], BOUND, "stability");
        assert_eq!(net.controlnet.notes(), Vec::<String>::new());
    }
    let notes = models.open("large35", 1.0, "full").unwrap().controlnet.notes();
    assert!(notes.len() == 1 && notes[0].contains("sd3.5_large_controlnet_canny.safetensors"), "{notes:?}");
}

#[test]
fn without_a_config_the_sizes_are_those_of_the_tensors_and_the_model() {
    let models = Models::new();
    let expected = expected();
    for net in ["instantx", "large35"] {
        std::fs::remove_file(models.path(net).join("config.json")).unwrap();
        let sample = models.predict("full", &models.open(net, 1.0, "full").unwrap());
        assert_close(&sample, &expected[&format!("{net}/full-full/sample")], BOUND, net);
    }
}

/// A net for inpainting takes a mask whether or not its config.json says so, and one whose config.json denies it is
/// refused.
#[test]
fn the_channel_of_a_mask_is_found_in_the_tensors() {
    let models = Models::new();
    let input = |net: &str| models.open(net, 1.0, "full").map(|net| net.controlnet.input());
    for value in [Some(json!(1)), None, Some(json!(0))] {
        let mut changed = config("inpaint");
        changed.as_object_mut().unwrap().remove("extra_conditioning_channels");
        value.iter().for_each(|value| changed["extra_conditioning_channels"] = value.clone());
        models.write("changed", changed, seeded("inpaint"));
        match (input("changed"), value == Some(json!(0))) {
            (Ok(input), false) => assert_eq!((input.channels, input.unshifted, input.zero_pooled), (17, false, true)),
            (Err(error), true) => assert!(error.contains("expected 16 of the latents and 0 more"), "{error}"),
            (found, _) => panic!("{value:?}: {found:?}"),
        }
    }
    std::fs::remove_file(models.path("inpaint/config.json")).unwrap();
    assert_eq!(input("inpaint").unwrap().channels, 17);
}

/// Each setting of config.json that could change the result: another value is refused, or gives another result, or it
/// is named as not understood.
#[test]
fn no_key_of_a_config_is_ignored() {
    let models = Models::new();
    let cases = [
        ("medium35", "num_layers", json!(2), "not understood: it would become"),
        ("medium35", "attention_head_dim", json!(8), "\"attention_head_dim\" is 8 in config.json, 16 from"),
        ("medium35", "num_attention_heads", json!(4), "\"num_attention_heads\" is 4 in config.json, 2 from"),
        ("medium35", "joint_attention_dim", json!(17), "\"joint_attention_dim\" is 17 in config.json, 16 from"),
        ("medium35", "caption_projection_dim", json!(31), "\"caption_projection_dim\" is 31 in config.json, 32 from"),
        ("medium35", "pooled_projection_dim", json!(13), "\"pooled_projection_dim\" is 13 in config.json, 12 from"),
        ("medium35", "in_channels", json!(4), "\"in_channels\" is 4 in config.json, 16 from"),
        ("large35", "in_channels", json!(4), "pos_embed_input takes 16 channels, expected 4 of the latents and 0 more"),
        ("medium35", "patch_size", json!(4), "\"patch_size\" is 4 in config.json, 2 from"),
        ("medium35", "pos_embed_max_size", json!(11), "\"pos_embed_max_size\" is 11 in config.json, 10 from"),
        ("medium35", "extra_conditioning_channels", json!(1), "expected 16 of the latents and 1 more"),
        ("medium35", "dual_attention_layers", json!([1]), "\"dual_attention_layers\" is [1] in config.json, [0] from"),
        ("medium35", "qk_norm", json!("layer_norm"), "\"qk_norm\": \"layer_norm\" is not supported"),
        ("instantx", "qk_norm", json!("rms_norm"), "\"qk_norm\" is \"rms_norm\" in config.json, null from"),
        ("medium35", "pos_embed_type", json!("learned"), "\"pos_embed_type\": \"learned\" is not supported"),
        ("large35", "use_pos_embed", json!(true), "\"use_pos_embed\" is true in config.json, false from"),
        ("medium35", "_class_name", json!("FluxControlNetModel"), "FluxControlNetModel"),
    ];
    for (net, key, value, expected) in cases {
        let mut config = config(net);
        config[key] = value;
        models.write("changed", config, seeded(net));
        let error = models.open("changed", 1.0, "full").unwrap_err();
        assert!(error.contains(expected), "{net} {key}: {error}");
    }
    let mut forced = config("medium35");
    forced["force_zeros_for_pooled_projection"] = json!(true);
    models.write("changed", forced, seeded("medium35"));
    assert!(models.open("changed", 1.0, "full").unwrap().controlnet.input().zero_pooled);
    let mut unknown = config("medium35");
    unknown["rope_theta"] = json!(1e4);
    models.write("changed", unknown, seeded("medium35"));
    let notes = models.open("changed", 1.0, "full").unwrap().controlnet.notes();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("config.json: the key \"rope_theta\" is not understood and not used"), "{notes:?}");
}

/// Every floating-point format in which a ControlNet may be stored: what it gives is what the widened values give.
#[test]
fn a_net_in_any_float_format_is_that_of_the_widened_values() {
    let models = Models::new();
    for dtype in [DType::F8E4M3, DType::F16, DType::BF16, DType::F64] {
        let stored = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
        let narrow: BTreeMap<_, _> =
            seeded("large35").iter().map(|(name, tensor)| (name.clone(), stored(tensor))).collect();
        let wide = narrow.iter().map(|(name, tensor)| (name.clone(), tensor.to_dtype(DType::F32).unwrap())).collect();
        models.write("narrow", config("large35"), narrow);
        models.write("wide", config("large35"), wide);
        let [narrow, wide] =
            ["narrow", "wide"].map(|net| models.predict("full", &models.open(net, 1.0, "full").unwrap()));
        assert_close(&narrow, &wide, 1e-6, &format!("{dtype:?}"));
    }
}

#[test]
fn a_net_for_another_model_or_family_is_refused() {
    let models = Models::new();
    let mut wider = config("base");
    wider["pooled_projection_dim"] = json!(13);
    let mut tensors = seeded("base");
    let name = "time_text_embed.text_embedder.linear_1.weight";
    tensors.insert(name.to_owned(), Tensor::ones((32, 13), DType::F32, &Device::Cpu).unwrap());
    models.write("other", wider, tensors);
    let other = TransformerCheckpoint::open(&models.path("other"), &ReadOptions::default_options().unwrap()).unwrap();
    let error = open(&models.path("instantx"), 1.0, "full", &other).unwrap_err();
    assert!(error.contains("pooled_projection_dim: expected 13 as in the model, found 12"), "{error}");
    let error = open(&fixture("controlnet/one-two"), 1.0, "full", &models.base()).unwrap_err();
    assert!(error.contains("the ControlNet is for FLUX.1, but the model's family is \"sd3\""), "{error}");
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let models = Models::new();
    let residuals = |net: &str, control: &Tensor, embedded: Option<&Tensor>| {
        let controlnet = models.open(net, 1.0, "full").unwrap().controlnet;
        let controls = Controls { control, mode: None, guidance: None, embedded };
        controlnet.residuals(&models.input(), controls).map(drop).map_err(|error: PluginError| error.to_string())
    };
    let error = residuals("instantx", &control().narrow(1, 0, 4).unwrap(), None).unwrap_err();
    assert!(error.contains("\"controlnet_cond\": expected shape (1, 16, 10, 8), found [1, 4, 10, 8]"), "{error}");
    let error = residuals("large35", &control(), None).unwrap_err();
    assert!(error.contains("embedded latents"), "{error}");
}

/// The pipeline with a control image: its latents, and the image's after all steps with classifier-free guidance, where
/// each prompt has residuals of its own.
#[test]
fn the_pipeline_equals_that_of_diffusers() {
    let models = Models::new();
    let folder = tempfile::tempdir().unwrap();
    assemble_pipeline(&fixture("").join("../.."), "sd3", folder.path());
    let expected = tensors("controlnet-sd3/pipeline.safetensors");
    for net in ["instantx", "large35", "inpaint"] {
        let control_mask = (net == "inpaint").then(|| image("mask.png"));
        let request = GenerateRequest { control_mask, ..request() };
        let pipeline = pipeline(folder.path(), adapter(&models.path(net), scale()));
        let latents = pipeline.initial_latents(request.seed, 1, request.size.unwrap()).unwrap();
        let prompts =
            pipeline.encode_prompts(std::slice::from_ref(&request.prompt), request.negative.as_ref()).unwrap();
        let schedule = pipeline.schedule(request.steps, &latents).unwrap();
        let images = pipeline.control_images(&request.control_images).unwrap();
        let controls = ControlImages { mask: request.control_mask.clone(), ..images };
        let scales = GuidanceScales::new(request.guidance);
        let batch = pipeline.prepare(ImageBatch { latents, prompts, schedule, scales, controls }).unwrap();
        let control = &batch.controlnets()[0].control;
        assert_close(control, &expected[&format!("{net}/control")], BOUND, &format!("{net}: control"));
        let denoiser = pipeline.load_transformer(&AttentionPlan::full(), Some(DType::F32)).unwrap();
        let last = batch.denoise(denoiser.as_ref(), &mut |_| StepAction::Continue).unwrap();
        assert_close(&last, &expected[&format!("{net}/latents")], LATENTS_BOUND, &format!("{net}: latents"));
        pipeline.generate(&request, &mut |_| StepAction::Continue).unwrap();
    }
}

/// A mask without a net that takes one, and the reverse, are named before anything is computed.
#[test]
fn a_mask_belongs_to_a_net_for_inpainting() {
    let models = Models::new();
    let folder = tempfile::tempdir().unwrap();
    assemble_pipeline(&fixture("").join("../.."), "sd3", folder.path());
    for (net, control_mask, expected) in [
        (
            "inpaint",
            None,
            "inpaint: the ControlNet takes a mask beside the control image (inpainting): pass --control-mask",
        ),
        ("instantx", Some(image("mask.png")), "--control-mask: no ControlNet takes a mask"),
    ] {
        let pipeline = pipeline(folder.path(), adapter(&models.path(net), scale()));
        let request = GenerateRequest { control_mask, ..request() };
        let error = pipeline.generate(&request, &mut |_| panic!("computed")).unwrap_err().to_string();
        assert!(error.contains(expected), "{net}: {error}");
    }
}

fn pipeline(model: &Path, adapters: Adapters) -> Pipeline {
    let options = PipelineOptions {
        dtype: Some(DType::F32),
        plan: Some(AttentionPlan::full()),
        adapters,
        ..PipelineOptions::default_options().unwrap()
    };
    Pipeline::open(model, options).unwrap()
}

fn request() -> GenerateRequest {
    let request = support::json("controlnet-sd3/request.json");
    let size = |key: &str| request[key].as_u64().unwrap() as usize;
    let prompt = |key: &str| Prompt::Text(request[key].as_str().unwrap().to_owned());
    GenerateRequest {
        prompt: prompt("prompt"),
        negative: Some(prompt("negative_prompt")),
        size: Some(ImageSize { height: size("height"), width: size("width") }),
        steps: size("steps"),
        guidance: request["guidance"].as_f64().unwrap(),
        true_cfg_scale: 1.0,
        seed: request["seed"].as_u64().unwrap(),
        batch: 1,
        control_images: vec![image("control.png")],
        control_mask: None,
    }
}

fn image(name: &str) -> RgbImage {
    image::open(fixture("controlnet-sd3").join(name)).unwrap().to_rgb8()
}

fn scale() -> f64 {
    support::json("controlnet-sd3/request.json")["scale"].as_f64().unwrap()
}

fn adapter(path: &Path, scale: f64) -> Adapters {
    let strength = Strength { overall: scale, blocks: Vec::new() };
    let request = AdapterRequest { path: path.to_owned(), strength, ..AdapterRequest::default() };
    Adapters::open(&[request], &registry()).unwrap()
}

fn open(path: &Path, scale: f64, attention: &str, base: &TransformerCheckpoint) -> Result<ActiveControlNet, String> {
    let mut adapters = adapter(path, scale);
    adapters.controlnet_attention = attention.to_owned();
    Ok(adapters.open_controlnets(base).map_err(|error| error.to_string())?.remove(0))
}

fn config(name: &str) -> Value {
    support::json(&format!("controlnet-sd3/{name}/config.json"))
}

fn seeded(name: &str) -> BTreeMap<String, Tensor> {
    seeded_file(fixture(&format!("controlnet-sd3/{name}/shapes.json")), &format!("{name}/"))
}

/// The tensors of large35 under the names that Stability's files have.
fn stability(control_type: i64) -> BTreeMap<String, Tensor> {
    const NAMES: [(&str, &str); 4] = [
        (".norm1.linear.", ".adaLN_modulation.1."),
        (".attn.to_out.0.", ".attn.proj."),
        (".ff.net.0.proj.", ".mlp.fc1."),
        (".ff.net.2.", ".mlp.fc2."),
    ];
    let tensors = seeded("large35");
    let fused = |name: &str| {
        let parts = ["to_q", "to_k", "to_v"].map(|part| tensors[&name.replace("to_q", part)].clone());
        (name.replace("to_q", "qkv"), Tensor::cat(&parts, 0).unwrap())
    };
    let rename = |name: &str| NAMES.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to));
    let single =
        tensors.iter().filter(|(name, _)| ![".to_q.", ".to_k.", ".to_v."].iter().any(|part| name.contains(part)));
    let single = single.map(|(name, tensor)| (rename(name), tensor.clone()));
    let fused = tensors.keys().filter(|name| name.contains(".to_q.")).map(|name| fused(name));
    let control_type = Tensor::new(&[control_type as i32], &Device::Cpu).unwrap();
    single.chain(fused).chain([("control_type".to_owned(), control_type)]).collect()
}

fn save(path: &Path, tensors: BTreeMap<String, Tensor>) {
    let source: InMemoryTensors = tensors.into_iter().collect();
    clearform_weights::save(path, &source, &BTreeMap::new()).unwrap();
}

fn control() -> Tensor {
    tensors("controlnet-sd3/input.safetensors")["controlnet_cond"].clone()
}

fn expected() -> HashMap<String, Tensor> {
    tensors("controlnet-sd3/expected.safetensors")
}
