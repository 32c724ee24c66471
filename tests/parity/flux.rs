//! FLUX, compared with diffusers' FluxTransformer2DModel: embeddings, every block and its attention, and the whole
//! forward, with full and CLEAR attention. fixtures/flux/export.py describes the fixtures.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Tensor, Var};
use clearform_attention::AttentionPlan;
use clearform_models::families::flux::Flux;
use clearform_models::{Architecture, Denoiser, DenoiserInput, HiddenState, ModelFamily as _};
use clearform_weights::{InMemoryTensors, TensorSource};
use std::collections::{BTreeMap, HashMap};
use support::{assert_close, json, tensors, weights};

const BOUND: f64 = 2e-5;
const GRIDS: [&str; 2] = ["6x6", "5x8"];
const PLANS: [(&str, &str); 3] = [("full", "full"), ("r3", "clear:r=3"), ("r4.5", "clear:r=4.5")];

#[test]
fn head_dim_24_with_guidance() {
    check_model("head24");
}

#[test]
fn head_dim_32_without_guidance() {
    check_model("head32");
}

/// Checks one model of the fixtures on both grids, with every plan.
fn check_model(model: &str) {
    let cases = tensors(&format!("flux/{model}/cases.safetensors"));
    for (name, plan) in PLANS {
        let denoiser = build(model, &plan.parse().unwrap());
        for grid in GRIDS {
            check_case(denoiser.as_ref(), &cases, grid, &format!("{grid}/{name}"));
        }
    }
}

fn check_case(denoiser: &dyn Denoiser, cases: &HashMap<String, Tensor>, grid: &str, case: &str) {
    let input = input(cases, grid);
    let mut state = denoiser.embed(&input).unwrap();
    check_image(&state, cases, &format!("{case}/embed"));
    for (index, layer) in denoiser.layer_names().iter().enumerate() {
        state = denoiser.block(index, state).unwrap();
        let block = format!("{case}/{}", layer.strip_suffix(".attn").unwrap());
        check_image(&state, cases, &block);
        assert_close(state.text.as_ref().unwrap(), &cases[&format!("{block}/text")], BOUND, &format!("{block}/text"));
        check_attention(&state, cases, &format!("{block}/attention"));
    }
    let sample = format!("{case}/sample");
    assert_close(&denoiser.head(&state).unwrap(), &cases[&sample], BOUND, &sample);
    assert_close(&denoiser.forward(&input).unwrap(), &cases[&sample], BOUND, &sample);
}

fn check_image(state: &HiddenState, cases: &HashMap<String, Tensor>, stage: &str) {
    let raster = state.context.geometry.to_raster(&state.image).unwrap();
    let name = format!("{stage}/image");
    assert_close(&raster, &cases[&name], BOUND, &name);
}

/// Only some cases contain the attention.
fn check_attention(state: &HiddenState, cases: &HashMap<String, Tensor>, name: &str) {
    let Some(want) = cases.get(name) else { return };
    let attended = &state.attention.as_ref().unwrap().image;
    let raster = state.context.geometry.to_raster(attended).unwrap();
    assert_close(&raster.flatten_from(2).unwrap(), want, BOUND, name);
}

#[test]
fn position_ids_may_be_integers() {
    let cases = tensors("flux/head32/cases.safetensors");
    let denoiser = build("head32", &AttentionPlan::full());
    let mut input = input(&cases, "5x8");
    let to_i64 = |ids: &Option<Tensor>| ids.as_ref().map(|ids| ids.to_dtype(DType::I64).unwrap());
    input.conditions.image_ids = to_i64(&input.conditions.image_ids);
    input.conditions.text_ids = to_i64(&input.conditions.text_ids);
    assert_close(&denoiser.forward(&input).unwrap(), &cases["5x8/full/sample"], BOUND, "integer ids");
}

#[test]
fn inputs_of_the_wrong_shape_are_named() {
    let cases = tensors("flux/head24/cases.safetensors");
    let denoiser = build("head24", &AttentionPlan::full());
    let shortened = |name: &str, tensor: &Tensor| (name.to_owned(), tensor.narrow(0, 0, 1).unwrap());
    let error_after = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut named = arguments(&cases, "5x8");
        change(&mut named);
        let error = denoiser.embed(&architecture("head24").parse_input(named).unwrap()).map(|_| ()).unwrap_err();
        error.to_string()
    };
    for name in ["timestep", "guidance", "pooled_projections", "encoder_hidden_states", "img_ids", "txt_ids"] {
        let error = error_after(&|named| named.extend([shortened(name, &named[name])]));
        assert!(error.contains(&format!("input {name:?}: expected")), "{error}");
    }
    assert!(error_after(&|named| drop(named.remove("guidance"))).contains("\"guidance\": is missing"));
}

#[test]
fn a_missing_tensor_is_named() {
    let source = weights("flux/head24/weights.safetensors");
    let kept = source.iter().filter(|(name, _)| *name != "single_transformer_blocks.0.attn.to_v.weight");
    let source: InMemoryTensors = kept.map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let built = architecture("head24").build(&source, &AttentionPlan::full());
    assert!(built.map(|_| ()).unwrap_err().to_string().contains("single_transformer_blocks.0.attn.to_v.weight"));
}

/// Activations have the dtype of the latents, whatever that of the weights. bf16 has 8 significant bits.
#[test]
fn bf16_is_near_f32() {
    let cases = tensors("flux/head24/cases.safetensors");
    let stored = weights("flux/head24/weights.safetensors");
    let in_bf16 =
        stored.iter().map(|(name, tensor)| (name.to_owned(), tensor.to_dtype(DType::BF16).unwrap())).collect();
    let denoiser = build_from("head24", &in_bf16, &"clear:r=3".parse().unwrap());
    let mut input = input(&cases, "5x8");
    let want = &cases["5x8/r3/sample"];
    assert_close(&denoiser.forward(&input).unwrap(), want, 1e-2, "bf16 weights, f32 latents");
    input.latents = input.latents.to_dtype(DType::BF16).unwrap();
    let got = denoiser.forward(&input).unwrap();
    assert_eq!(got.dtype(), DType::BF16);
    assert_close(&got, want, 5e-2, "bf16 weights, bf16 latents");
}

/// The gradient of each distilled tensor, compared with the change of the loss after a small step of that tensor alone
/// along its gradient.
#[test]
fn gradients_of_distilled_tensors_predict_small_steps() {
    let cases = tensors("flux/head24/cases.safetensors");
    let input = input(&cases, "5x8");
    let mut source = weights("flux/head24/weights.safetensors");
    let layers = build_from("head24", &source, &AttentionPlan::full()).layer_names().to_vec();
    let names: Vec<String> = layers
        .iter()
        .flat_map(|layer| architecture("head24").distilled_layers(layer))
        .flat_map(|layer| layer.parameters)
        .collect();
    assert_eq!(names.len(), 8 + 8 + 6);
    let variables: Vec<Var> =
        names.iter().map(|name| Var::from_tensor(&source.tensor(name).unwrap()).unwrap()).collect();
    for (name, variable) in names.iter().zip(&variables) {
        source.insert(name, variable.as_tensor().clone());
    }
    let plan: AttentionPlan = "clear:r=3".parse().unwrap();
    let weight = (&cases["5x8/full/sample"] * 3.0).unwrap();
    let loss = |source: &InMemoryTensors| {
        (build_from("head24", source, &plan).forward(&input).unwrap() * &weight).unwrap().sum_all().unwrap()
    };
    let gradients = loss(&source).backward().unwrap();
    for (name, variable) in names.iter().zip(&variables) {
        let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{name}: no gradient"));
        // In this direction the change is largest, compared with the rounding of the loss.
        let norm = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let direction = (gradient / f64::from(norm)).unwrap();
        let loss_after = |step: f64| {
            let mut moved = source.clone();
            moved.insert(name, (variable.as_tensor() + (&direction * step).unwrap()).unwrap().detach());
            f64::from(loss(&moved).to_scalar::<f32>().unwrap())
        };
        let step = 0.02;
        let slope = (loss_after(step) - loss_after(-step)) / (2.0 * step);
        let error = (slope / f64::from(norm) - 1.0).abs();
        assert!(error < 0.02, "{name}: slope {slope:.4}, gradient {norm:.4}");
    }
}

fn architecture(model: &str) -> Box<dyn Architecture> {
    Flux.parse(&json(&format!("flux/{model}/config.json"))).unwrap()
}

fn build(model: &str, plan: &AttentionPlan) -> Box<dyn Denoiser> {
    build_from(model, &weights(&format!("flux/{model}/weights.safetensors")), plan)
}

fn build_from(model: &str, source: &InMemoryTensors, plan: &AttentionPlan) -> Box<dyn Denoiser> {
    architecture(model).build(source, plan).unwrap()
}

fn input(cases: &HashMap<String, Tensor>, grid: &str) -> DenoiserInput {
    architecture("head24").parse_input(arguments(cases, grid)).unwrap()
}

fn arguments(cases: &HashMap<String, Tensor>, grid: &str) -> BTreeMap<String, Tensor> {
    let prefix = format!("{grid}/input/");
    let named =
        cases.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor.clone())));
    named.collect()
}
