//! Adapters as users have them (fixtures/lora/users), and every kind of adapter on every module of every family under
//! the names of every layout, beside the weights and merged into them. What is right follows from weights that are
//! merged here by hand, in f64.
#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{D, DType, Device, Tensor};
use clearform_attention::AttentionPlan;
use clearform_layout::{Hints, Sidecar, detect_source};
use clearform_plugin_host::{LowRankMode, PatchedSource};
use clearform_runtime::{AdapterRequest, Adapters, Components, EditedTransformer, ReadOptions, TransformerCheckpoint};
use clearform_testkit::{assemble_pipeline, seeded, seeded_file};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource};
use serde_json::{Value, json as json_of};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use support::{assert_close, fixture, json, registry, tensors};
use tempfile::TempDir;

const BOUND: f64 = 2e-5;
const MODES: [LowRankMode; 2] = [LowRankMode::Separate, LowRankMode::Fused];

type Weights = BTreeMap<String, Tensor>;

/// A transformer in a folder of its own, with the inputs of its fixture.
struct Model {
    folder: TempDir,
    hints: Hints,
    inputs: HashMap<String, Tensor>,
}

impl Model {
    /// The model of a fixture, with weights in f32.
    fn open(family: &str, name: &str) -> Self {
        let folder = format!("{family}/{name}");
        let weights = match fixture(&format!("{folder}/shapes.json")) {
            shapes if shapes.exists() => seeded_file(shapes, ""),
            _ => tensors(&format!("{folder}/weights.safetensors")).into_iter().collect(),
        };
        let config = json(&format!("{folder}/config.json"));
        // A file of facebook's does not show the size of a head, and its other settings follow from its tensors.
        let size = |key: &str| config[key].as_u64();
        let config = match (name, size("hidden_size"), size("num_heads")) {
            ("original", Some(width), Some(heads)) => json_of!({"attention_head_dim": width / heads}),
            _ => config,
        };
        let cases = tensors(&format!("{folder}/cases.safetensors"));
        let inputs = cases.iter().filter_map(|(key, value)| Some((key.strip_prefix("6x6/input/")?, value)));
        let inputs = inputs.map(|(key, value)| (key.to_owned(), value.clone())).collect();
        Self::new(family, &config, &weights, inputs)
    }

    fn new(family: &str, config: &Value, weights: &Weights, inputs: HashMap<String, Tensor>) -> Self {
        let hints = Hints { family: Some(family.to_owned()), config: Some(config.clone()), ..Hints::default() };
        let model = Self { folder: tempfile::tempdir().unwrap(), hints, inputs };
        save(&model.weights_file(), weights);
        model
    }

    /// The FLUX that the users' files were made for.
    fn flux() -> Self {
        let model = Self::open("flux", "head24");
        Self { inputs: tensors("lora/input.safetensors"), ..model }
    }

    /// The same model with other weights.
    fn with_weights(&self, weights: &Weights) -> Self {
        let (family, config) = (self.hints.family.clone().unwrap(), self.hints.config.clone().unwrap());
        Self::new(&family, &config, weights, self.inputs.clone())
    }

    fn weights_file(&self) -> PathBuf {
        self.folder.path().join("weights.safetensors")
    }

    fn reading(&self) -> ReadOptions {
        ReadOptions { hints: self.hints.clone(), ..ReadOptions::default_options().unwrap() }
    }

    fn checkpoint(&self) -> TransformerCheckpoint {
        TransformerCheckpoint::open(&self.weights_file(), &self.reading()).unwrap()
    }

    /// Canonical tensors in f64.
    fn canonical(&self) -> Weights {
        in_f64(&self.checkpoint().source())
    }

    fn edited(&self, adapter: &Path, mode: LowRankMode) -> Result<EditedTransformer, String> {
        let request = AdapterRequest { path: adapter.to_owned(), ..AdapterRequest::default() };
        let mut adapters = Adapters::open(&[request], &registry()).map_err(|error| error.to_string())?;
        adapters.low_rank = mode;
        let edited = adapters.apply_to(self.checkpoint(), None, &self.reading().manifests);
        edited.map_err(|error| error.to_string())
    }

    fn forward(&self, transformer: &TransformerCheckpoint) -> Tensor {
        let denoiser = transformer.build(&AttentionPlan::full(), Some(DType::F32), &Device::Cpu).unwrap();
        let inputs = self.inputs.clone().into_iter().collect();
        denoiser.forward(&transformer.architecture().parse_input(inputs).unwrap()).unwrap()
    }

    /// Compares the prediction with `adapter` in both modes with that of `merged` weights. Returns the adapter's notes.
    fn check(&self, adapter: &Path, merged: &Weights) -> Vec<String> {
        let merged = self.with_weights(merged);
        let wanted = merged.forward(&merged.checkpoint());
        let plain = self.forward(&self.checkpoint());
        let what = adapter.display();
        assert!(support::relative_error(&wanted, &plain) > 1e-3, "{what} changes nothing");
        let mut notes = Vec::new();
        for mode in MODES {
            let edited = self.edited(adapter, mode).unwrap_or_else(|error| panic!("{what}: {error}"));
            let report = &edited.reports[0];
            assert!(report.is_complete() && report.applied + report.skipped.len() == report.tensors, "{report}");
            assert_close(&self.forward(&edited.transformer), &wanted, BOUND, &format!("{what} {mode:?}"));
            notes = report.notes.clone();
        }
        notes
    }
}

fn save(path: &Path, weights: &Weights) {
    let in_f32 =
        |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.to_dtype(DType::F32).unwrap().contiguous().unwrap());
    candle_core::safetensors::save(&weights.iter().map(in_f32).collect::<HashMap<_, _>>(), path).unwrap();
}

fn in_f64(source: &dyn TensorSource) -> Weights {
    let names = source.tensors().into_iter().map(|info| info.name);
    names.map(|name| (name.clone(), f64_of(&source.tensor(&name).unwrap()))).collect()
}

fn f64_of(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap()
}

fn user_file(name: &str) -> PathBuf {
    fixture(&format!("lora/users/{name}"))
}

/// Tensors of a user's file, in f64.
fn user_tensors(name: &str) -> Weights {
    tensors(&format!("lora/users/{name}")).iter().map(|(name, tensor)| (name.clone(), f64_of(tensor))).collect()
}

fn matrix(tensor: &Tensor) -> Tensor {
    tensor.flatten_from(1).unwrap()
}

fn scaled(tensor: &Tensor, scale: f64) -> Tensor {
    (tensor * scale).unwrap()
}

fn sum(a: &Tensor, b: &Tensor) -> Tensor {
    (a + b.reshape(a.shape()).unwrap()).unwrap()
}

/// `base` plus scale · up · down for each (canonical tensor, prefix of the factors' names, scale).
fn with_loras(base: &Weights, file: &Weights, suffixes: [&str; 2], edits: &[(&str, &str, f64)]) -> Weights {
    let mut merged = base.clone();
    for (canonical, prefix, scale) in edits {
        let [down, up] = suffixes.map(|suffix| matrix(&file[&format!("{prefix}.{suffix}")]));
        let weight = &base[&format!("{canonical}.weight")];
        merged.insert(format!("{canonical}.weight"), sum(weight, &scaled(&up.matmul(&down).unwrap(), *scale)));
    }
    merged
}

const PEFT: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
const KOHYA: [&str; 2] = ["lora_down.weight", "lora_up.weight"];

#[test]
fn an_adapter_config_beside_the_tensors_gives_the_scales() {
    let model = Model::flux();
    let [query, out] = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"];
    let prefix = |module: &str| format!("base_model.model.{module}");
    let cases = [("peft-folder-alpha", [8.0 / 4.0, 8.0 / 4.0]), ("peft-folder-rslora", [8.0, 6.0 / 2f64.sqrt()])];
    for (folder, [query_scale, out_scale]) in cases {
        let file = format!("{folder}/adapter_model.safetensors");
        let edits = [(query, &*prefix(query), query_scale), (out, &*prefix(out), out_scale)];
        let merged = with_loras(&model.canonical(), &user_tensors(&file), PEFT, &edits);
        for adapter in [folder, file.as_str()] {
            let notes = model.check(&user_file(adapter), &merged);
            // In the first, the factors of one module do not have the rank that the configuration states.
            assert_eq!(notes.len(), usize::from(folder == "peft-folder-alpha"), "{notes:?}");
        }
    }
}

/// LoHa and LoKr state `alpha` instead of `lora_alpha`, DoRA `use_dora`; rank and alpha by pattern; unknown keys.
#[test]
fn adapter_configs_of_every_kind_are_read() {
    let model = Model::flux();
    let base = model.canonical();
    let module = "transformer_blocks.0.attn.to_q";
    let weight = base[&format!("{module}.weight")].clone();
    let cases = [
        (AdapterForm::Lora, json_of!({"peft_type": "LORA", "r": 2, "lora_alpha": 3}), 1.5),
        (AdapterForm::Loha, json_of!({"peft_type": "LOHA", "r": 2, "alpha": 3, "rank_pattern": {}}), 1.5),
        (AdapterForm::Lokr, json_of!({"peft_type": "LOKR", "r": 4, "alpha": 8, "alpha_pattern": {"to_[qk]": 2}}), 0.5),
        (
            AdapterForm::DoraOfRows,
            json_of!({"peft_type": "LORA", "r": 9, "lora_alpha": 4, "use_dora": true, "rank_pattern": {"attn\\..*": 2}}),
            2.0,
        ),
        (AdapterForm::Lora, json_of!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": true}), 2f64.sqrt()),
    ];
    for (form, config, scale) in cases {
        let folder = tempfile::tempdir().unwrap();
        let (tensors, merged) =
            form.on(&format!("base_model.model.{module}"), &weight, Alpha::Unstored(scale)).unwrap();
        save(&folder.path().join("adapter_model.safetensors"), &tensors);
        std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let mut weights = base.clone();
        weights.insert(format!("{module}.weight"), merged);
        let notes = model.check(folder.path(), &weights);
        assert!(notes.is_empty(), "{config}: {notes:?}");
    }
}

#[test]
fn patterns_are_those_of_peft() {
    let model = Model::flux();
    let module = "transformer_blocks.0.attn.to_q";
    for (name, scale) in [("plain", 3.0), ("character-class", 3.0), ("alternatives", 3.0), ("order", 2.0)] {
        let name = format!("alpha-pattern/{name}.safetensors");
        let edits = [(module, &*format!("transformer.{module}"), scale)];
        let merged = with_loras(&model.canonical(), &user_tensors(&name), PEFT, &edits);
        model.check(&user_file(&name), &merged);
    }
}

#[test]
fn fp8_factors_are_widened() {
    let model = Model::flux();
    for name in ["fp8-lora/e4m3.safetensors", "fp8-lora/alpha-f32.safetensors"] {
        let edits = [("transformer_blocks.0.attn.to_out.0", "lora_unet_double_blocks_0_img_attn_proj", 0.5)];
        let merged = with_loras(&model.canonical(), &user_tensors(name), KOHYA, &edits);
        model.check(&user_file(name), &merged);
    }
}

/// The same factors in every floating-point format; integers and formats of quantisation are refused by name.
#[test]
fn every_stored_format_is_read_or_named() {
    let model = Model::flux();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let [rank, size] = [2, 48];
    let exponent = |index: usize| (index % 3) as i32 - 2;
    let factor = |count: usize| -> Vec<f64> { (0..count).map(|index| 2f64.powi(exponent(index * 7 / 5))).collect() };
    let (down, up) = (factor(rank * size), factor(size * rank));
    let product = {
        let tensor = |values: &[f64], shape: [usize; 2]| Tensor::from_slice(values, &shape[..], &Device::Cpu).unwrap();
        tensor(&up, [size, rank]).matmul(&tensor(&down, [rank, size])).unwrap()
    };
    let name = "transformer_blocks.0.attn.to_q";
    let mut merged = model.canonical();
    merged.insert(format!("{name}.weight"), sum(&merged[&format!("{name}.weight")], &product));
    let write = |dtype: &str, bytes: &dyn Fn(f64) -> Vec<u8>| {
        let of = |values: &[f64]| values.iter().flat_map(|value| bytes(*value)).collect::<Vec<u8>>();
        let (down, up) = (of(&down), of(&up));
        let info = |shape: [usize; 2], at: [usize; 2]| json_of!({"dtype": dtype, "shape": shape, "data_offsets": at});
        let header = json_of!({
            format!("{name}.lora_A.weight"): info([rank, size], [0, down.len()]),
            format!("{name}.lora_B.weight"): info([size, rank], [down.len(), down.len() + up.len()]),
        });
        let header = header.to_string();
        let length = (header.len() as u64).to_le_bytes().to_vec();
        std::fs::write(&path, [length, header.into_bytes(), down, up].concat()).unwrap();
    };
    type Bytes<'a> = &'a dyn Fn(f64) -> Vec<u8>;
    let floats: [(&str, Bytes); 6] = [
        ("F64", &|value| value.to_le_bytes().to_vec()),
        ("F32", &|value| (value as f32).to_le_bytes().to_vec()),
        ("BF16", &|value| ((value as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec()),
        ("F16", &|value| (((value.log2() as i32 + 15) as u16) << 10).to_le_bytes().to_vec()),
        ("F8_E5M2", &|value| vec![((value.log2() as i32 + 15) as u8) << 2]),
        ("F8_E4M3", &|value| vec![((value.log2() as i32 + 7) as u8) << 3]),
    ];
    for (dtype, bytes) in floats {
        write(dtype, bytes);
        model.check(&path, &merged);
    }
    for (dtype, bytes) in [
        ("I8", 1),
        ("U8", 1),
        ("BOOL", 1),
        ("F8_E8M0", 1),
        ("I16", 2),
        ("U16", 2),
        ("I32", 4),
        ("U32", 4),
        ("I64", 8),
        ("U64", 8),
    ] {
        write(dtype, &|_| vec![1; bytes]);
        let error = model.edited(&path, LowRankMode::Separate).err().unwrap_or_else(|| panic!("{dtype} is applied"));
        let names = error.contains(&format!("{name}.lora_A.weight")) && error.contains("bf16, fp16, fp32 or fp8");
        // The host lends plugins narrower signed integers as I64.
        let lent = if ["I16", "I32"].contains(&dtype) { "I64" } else { dtype };
        assert!(names && error.to_lowercase().contains(&lent.to_lowercase()), "{dtype}: {error}");
    }
}

/// OneTrainer names the parts of fused modules by number; the numbers follow from the rules of the layout.
#[test]
fn numbered_parts_of_fused_modules_are_found() {
    let model = Model::flux();
    let [double, single] = ["transformer_blocks.0", "single_transformer_blocks.0"];
    let modules = [
        ("double_blocks.0.img_attn.qkv.0", format!("{double}.attn.to_q")),
        ("double_blocks.0.img_attn.qkv.1", format!("{double}.attn.to_k")),
        ("double_blocks.0.img_attn.qkv.2", format!("{double}.attn.to_v")),
        ("double_blocks.0.txt_attn.qkv.0", format!("{double}.attn.add_q_proj")),
        ("double_blocks.0.txt_attn.qkv.1", format!("{double}.attn.add_k_proj")),
        ("double_blocks.0.txt_attn.qkv.2", format!("{double}.attn.add_v_proj")),
        ("double_blocks.0.img_mlp.0", format!("{double}.ff.net.0.proj")),
        ("single_blocks.0.linear1.0", format!("{single}.attn.to_q")),
        ("single_blocks.0.linear1.1", format!("{single}.attn.to_k")),
        ("single_blocks.0.linear1.2", format!("{single}.attn.to_v")),
        ("single_blocks.0.linear1.3", format!("{single}.proj_mlp")),
        ("single_blocks.0.linear2", format!("{single}.proj_out")),
        ("img_in.proj", "x_embedder".to_owned()),
        ("txt_in", "context_embedder".to_owned()),
    ];
    let name = "onetrainer/original-names.safetensors";
    let file = user_tensors(name);
    let prefixes: Vec<String> = modules.iter().map(|(theirs, _)| format!("transformer.{theirs}")).collect();
    let edits: Vec<(&str, &str, f64)> =
        modules.iter().zip(&prefixes).map(|((_, ours), prefix)| (ours.as_str(), prefix.as_str(), 0.5)).collect();
    let mut merged = with_loras(&model.canonical(), &file, KOHYA, &edits);
    // The halves of the last modulation are swapped in the original layout.
    let [down, up] = KOHYA.map(|suffix| file[&format!("transformer.final_layer.adaLN_modulation.1.{suffix}")].clone());
    let halves = up.chunk(2, 0).unwrap();
    let up = Tensor::cat(&[&halves[1], &halves[0]], 0).unwrap();
    let norm = "norm_out.linear.weight";
    merged.insert(norm.to_owned(), sum(&merged[norm], &scaled(&up.matmul(&down).unwrap(), 0.5)));
    assert_eq!(3 * (modules.len() + 1), file.len());
    model.check(&user_file(name), &merged);
}

#[test]
fn suffixes_joined_to_the_module_are_read() {
    let model = Model::flux();
    let name = "onetrainer/collapsed-loha.safetensors";
    let file = user_tensors(name);
    let factor = |suffix: &str| &file[&format!("lora_transformer_transformer_blocks_0_attn_to_q_hada_{suffix}")];
    let product = |w: &str| factor(&format!("{w}_a")).matmul(factor(&format!("{w}_b"))).unwrap();
    let delta = scaled(&(product("w1") * product("w2")).unwrap(), 0.5);
    let mut merged = model.canonical();
    let weight = "transformer_blocks.0.attn.to_q.weight";
    merged.insert(weight.to_owned(), sum(&merged[weight], &delta));
    model.check(&user_file(name), &merged);
}

#[test]
fn norms_of_a_fused_matrix_are_those_of_the_whole() {
    let model = Model::flux();
    let parts = ["to_q", "to_k", "to_v"].map(|part| format!("transformer_blocks.0.attn.{part}.weight"));
    for name in ["dora-in-qkv", "dora-out-qkv"] {
        let name = format!("dora-on-fused/{name}.safetensors");
        let (file, mut merged) = (user_tensors(&name), model.canonical());
        let tensor = |suffix: &str| &file[&format!("lora_unet_double_blocks_0_img_attn_qkv.{suffix}")];
        let fused = Tensor::cat(&parts.clone().map(|part| merged[&part].clone()), 0).unwrap();
        let [down, up] = KOHYA.map(tensor);
        let whole = sum(&fused, &up.matmul(down).unwrap());
        let magnitude = tensor("dora_scale");
        let axis = usize::from(magnitude.dims()[0] != 1);
        let norms = whole.sqr().unwrap().sum_keepdim(axis).unwrap().sqrt().unwrap();
        let whole = whole.broadcast_mul(&(magnitude / norms).unwrap()).unwrap();
        for (index, part) in parts.iter().enumerate() {
            merged.insert(part.clone(), whole.narrow(0, 48 * index, 48).unwrap());
        }
        model.check(&user_file(&name), &merged);
    }
}

/// The base takes the channels of a control image after those of the latents.
#[test]
fn a_lora_of_the_plain_model_is_padded_for_a_control_model() {
    let plain = Model::flux();
    let mut weights = plain.canonical();
    let control = seeded("x_embedder.weight", &[48, 16], "control/").to_dtype(DType::F64).unwrap();
    let widened = Tensor::cat(&[&weights["x_embedder.weight"], &control], 1).unwrap();
    weights.insert("x_embedder.weight".to_owned(), widened);
    let mut inputs = plain.inputs.clone();
    let latents = &inputs["hidden_states"];
    let hint = seeded("hint", latents.dims(), "");
    inputs.insert("hidden_states".to_owned(), Tensor::cat(&[latents, &hint], D::Minus1).unwrap());
    let model = Model::new("flux", &json("lora/users/lora-on-control-base/config.json"), &weights, inputs);
    let name = "lora-on-control-base/lora.safetensors";
    let mut file = user_tensors(name);
    let down = &file["transformer.x_embedder.lora_A.weight"];
    let padded = down.pad_with_zeros(1, 0, 16).unwrap();
    file.insert("transformer.x_embedder.lora_A.weight".to_owned(), padded);
    let query = "transformer_blocks.0.attn.to_q";
    let edits = [("x_embedder", "transformer.x_embedder", 1.0), (query, &*format!("transformer.{query}"), 1.0)];
    let merged = with_loras(&model.canonical(), &file, PEFT, &edits);
    let notes = model.check(&user_file(name), &merged);
    assert_eq!(
        notes,
        [
            "\"x_embedder.weight\" takes 32 channels and the adapter has 16: it was made for the plain model, and is padded \
          with zeros for the others"
        ]
    );
    // A model without further channels takes no narrower adapter.
    let folder = tempfile::tempdir().unwrap();
    let narrow = folder.path().join("narrow.safetensors");
    let factors = [("x_embedder.lora_A.weight", [2, 8]), ("x_embedder.lora_B.weight", [48, 2])];
    save(&narrow, &factors.map(|(name, shape)| (name.to_owned(), seeded(name, &shape, ""))).into());
    for other in [&plain, &model] {
        let error = other.edited(&narrow, LowRankMode::Separate).err().unwrap();
        assert!(error.contains("found 48 x 8: the adapter was made for another model"), "{error}");
    }
}

#[test]
fn loras_of_a_patch_embedding_are_applied_as_convolutions() {
    let model = Model::open("sd3", "medium35");
    let cases = [("kohya", "lora_unet_x_embedder_proj", KOHYA, 0.5), ("peft", "transformer.pos_embed.proj", PEFT, 1.0)];
    for (name, prefix, suffixes, scale) in cases {
        let name = format!("convolution-lora/{name}.safetensors");
        let edits = [("pos_embed.proj", prefix, scale)];
        let merged = with_loras(&model.canonical(), &user_tensors(&name), suffixes, &edits);
        model.check(&user_file(&name), &merged);
    }
}

/// Every writer's prefix of a text encoder leads to the component that the pipeline has it in.
#[test]
fn text_encoders_are_found_by_every_writers_prefix() {
    let folder = tempfile::tempdir().unwrap();
    assemble_pipeline(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap(), "sd3", folder.path());
    let clip = "text_model.encoder.layers.0.self_attn.q_proj";
    let t5 = "encoder.block.0.layer.0.SelfAttention.q";
    // The text encoders of a FLUX, as far as the file edits them.
    let flux = tempfile::tempdir().unwrap();
    for (component, name, shape) in [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight", [20, 12]),
        ("text_encoder_2", &format!("{t5}.weight"), [20, 20]),
    ] {
        std::fs::create_dir(flux.path().join(component)).unwrap();
        let path = flux.path().join(component).join("model.safetensors");
        save(&path, &[(name.to_owned(), seeded(name, &shape, ""))].into());
    }
    /// A component, its module, and the module's name in the file.
    type Named<'a> = (&'a str, &'a str, &'a str);
    let cases: [(&Path, &str, &[Named]); 3] = [
        (
            folder.path(),
            "comfy-clip-g",
            &[(
                "text_encoder_2",
                clip,
                "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            )],
        ),
        (
            folder.path(),
            "kohya-te2",
            &[("text_encoder_2", clip, "lora_te2_text_model_encoder_layers_0_self_attn_q_proj")],
        ),
        (
            flux.path(),
            "onetrainer-short",
            &[
                ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "clip_l.text_model.encoder.layers.0.mlp.fc1"),
                ("text_encoder_2", t5, "t5.encoder.block.0.layer.0.SelfAttention.q"),
            ],
        ),
    ];
    let model = Model::flux();
    for (pipeline, name, edits) in cases {
        let name = format!("text-encoder-lora/{name}.safetensors");
        let request = AdapterRequest { path: user_file(&name), ..AdapterRequest::default() };
        let components = Components::new(pipeline, None);
        let adapters = Adapters::open(&[request], &registry()).unwrap();
        let edited = adapters.apply_to(model.checkpoint(), Some(&components), &model.reading().manifests).unwrap();
        assert_eq!(edited.reports[0].modules, edits.len(), "{}", edited.reports[0]);
        let file = user_tensors(&name);
        for (component, module, prefix) in edits {
            let stored = Checkpoint::open(pipeline.join(component)).unwrap();
            let name = format!("{module}.weight");
            let base = in_f64(&stored);
            let alpha = file.get(&format!("{prefix}.alpha")).map_or(2.0, |alpha| alpha.to_scalar::<f64>().unwrap());
            let merged = with_loras(&base, &file, KOHYA, &[(module, prefix, alpha / 2.0)]);
            let patched = PatchedSource::new(stored, edited.edits.clone(), component, LowRankMode::Fused);
            assert_close(
                &f64_of(&patched.tensor(&name).unwrap()),
                &merged[&name],
                5e-3,
                &format!("{component} {name}"),
            );
            assert!(support::relative_error(&merged[&name], &base[&name]) > 0.05, "{name}");
        }
    }
}

/// peft's names do not tell the encoder: the folder does, or else the shapes of the weights.
#[test]
fn text_encoders_under_pefts_names_are_found_by_folder_or_shape() {
    let pipeline = tempfile::tempdir().unwrap();
    assemble_pipeline(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap(), "sd3", pipeline.path());
    let model = Model::flux();
    let module = "text_model.encoder.layers.0.self_attn.q_proj";
    let edited = |path: PathBuf| {
        let components = Components::new(pipeline.path(), None);
        let request = AdapterRequest { path, ..AdapterRequest::default() };
        let adapters = Adapters::open(&[request], &registry()).unwrap();
        let edited = adapters.apply_to(model.checkpoint(), Some(&components), &model.reading().manifests);
        edited.map_err(|error| error.to_string())
    };
    for (name, component) in [("clip-l", "text_encoder"), ("clip-g", "text_encoder_2")] {
        let folder = fixture(&format!("lora/peft-folders/{name}"));
        let file = in_f64(&Checkpoint::open(&folder).unwrap());
        let stored = Checkpoint::open(pipeline.path().join(component)).unwrap();
        let base = in_f64(&stored);
        let prefix = format!("base_model.model.{module}");
        let merged = with_loras(&base, &file, PEFT, &[(module, &prefix, 1.5)]);
        let name = format!("{module}.weight");
        for path in [folder.clone(), folder.join("adapter_model.safetensors")] {
            let edited = edited(path).unwrap();
            let stored = Checkpoint::open(pipeline.path().join(component)).unwrap();
            let patched = PatchedSource::new(stored, edited.edits.clone(), component, LowRankMode::Fused);
            assert_close(&f64_of(&patched.tensor(&name).unwrap()), &merged[&name], BOUND, component);
            assert!(support::relative_error(&merged[&name], &base[&name]) > 0.05, "{name}");
        }
    }
    // The folder's name counts more than the shape, and two encoders that fit alike need it.
    let copied = tempfile::tempdir().unwrap();
    let wrong = copied.path().join("text_encoder");
    std::fs::create_dir(&wrong).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::copy(fixture("lora/peft-folders/clip-g").join(file), wrong.join(file)).unwrap();
    }
    let error = edited(wrong).err().unwrap();
    assert!(error.contains("expected 6 x 6") && error.contains("found 8 x 8"), "{error}");
    for file in ["config.json", "model.safetensors"] {
        let [from, to] = ["text_encoder_2", "text_encoder"].map(|component| pipeline.path().join(component).join(file));
        std::fs::copy(from, to).unwrap();
    }
    let error = edited(fixture("lora/peft-folders/clip-g")).err().unwrap();
    assert!(
        error.contains("it fits \"text_encoder\" and \"text_encoder_2\" alike: put the file into a folder"),
        "{error}"
    );
}

/// A form of adapter on one module.
#[derive(Debug, Clone, Copy, PartialEq)]
enum AdapterForm {
    Lora,
    LoraWithCore,
    Loha,
    LohaWithCores,
    Lokr,
    DoraOfRows,
    DoraOfColumns,
    Diff,
}

/// Where the scale comes from.
#[derive(Debug, Clone, Copy)]
enum Alpha {
    /// An alpha of 1 beside factors of rank 2.
    Stored,
    /// Something else that gives this scale.
    Unstored(f64),
}

const FORMS: [AdapterForm; 8] = [
    AdapterForm::Lora,
    AdapterForm::LoraWithCore,
    AdapterForm::Loha,
    AdapterForm::LohaWithCores,
    AdapterForm::Lokr,
    AdapterForm::DoraOfRows,
    AdapterForm::DoraOfColumns,
    AdapterForm::Diff,
];

impl AdapterForm {
    /// The tensors of the adapter for the module `key`, and the module's weight with it, in f64. `None` if a weight of
    /// this shape does not have the form.
    fn on(self, key: &str, weight: &Tensor, alpha: Alpha) -> Option<(Weights, Tensor)> {
        let shape = weight.dims();
        let (rows, inputs, kernel) = (shape[0], shape[1], &shape[2..]);
        let mut file = Weights::new();
        let mut put = |suffix: &str, shape: &[usize]| {
            let name = format!("{key}.{suffix}");
            let tensor = seeded(&name, shape, "adapter/");
            file.insert(name, tensor.clone());
            f64_of(&tensor)
        };
        let with = |first: &[usize]| [first, kernel].concat();
        let ones = vec![1; kernel.len()];
        let (scale, stores_alpha) = match alpha {
            Alpha::Stored => (0.5, !matches!(self, Self::Lokr | Self::Diff)),
            Alpha::Unstored(scale) => (scale, false),
        };
        let scale = if matches!(alpha, Alpha::Stored) && !stores_alpha { 1.0 } else { scale };
        let area: usize = kernel.iter().product();
        let delta = match self {
            Self::LoraWithCore | Self::LohaWithCores if area == 1 => return None,
            Self::Lora | Self::DoraOfRows | Self::DoraOfColumns => {
                let down = matrix(&put("lora_down.weight", &with(&[2, inputs])));
                let up = matrix(&put("lora_up.weight", &[&[rows, 2], &ones[..]].concat()));
                up.matmul(&down).unwrap()
            }
            Self::LoraWithCore => {
                let down = matrix(&put("lora_down.weight", &[2, inputs, 1, 1]));
                let up = matrix(&put("lora_up.weight", &[rows, 2, 1, 1]));
                core_product(&put("lora_mid.weight", &with(&[2, 2])), &up, &down)
            }
            Self::Loha => {
                let mut product = |name: &str| {
                    let a = put(&format!("hada_{name}_a"), &[rows, 2]);
                    a.matmul(&put(&format!("hada_{name}_b"), &[2, inputs * area])).unwrap()
                };
                (product("w1") * product("w2")).unwrap()
            }
            Self::LohaWithCores => {
                let mut product = |number: usize| {
                    let a = put(&format!("hada_w{number}_a"), &[2, rows]).t().unwrap();
                    let b = put(&format!("hada_w{number}_b"), &[2, inputs]);
                    core_product(&put(&format!("hada_t{number}"), &with(&[2, 2])), &a, &b)
                };
                (product(1) * product(2)).unwrap()
            }
            Self::Lokr => {
                let [a, b] = [rows, inputs].map(|size| if size.is_multiple_of(2) { 2 } else { 1 });
                let w1 = put("lokr_w1", &[a, b]);
                let w2 = put("lokr_w2", &with(&[rows / a, inputs / b]));
                kronecker(&w1, &matrix(&w2))
            }
            Self::Diff => put("diff", shape),
        };
        let whole = sum(weight, &scaled(&delta, scale));
        let merged = match self {
            Self::DoraOfRows | Self::DoraOfColumns => {
                let flat = whole.reshape((rows, inputs, area)).unwrap().sqr().unwrap();
                let (kept, mut shape) =
                    if self == Self::DoraOfRows { (0, vec![rows, 1]) } else { (1, vec![1, inputs]) };
                shape.extend(&ones);
                let norms = flat.sum_keepdim(1 - kept).unwrap().sum_keepdim(2).unwrap().sqrt().unwrap();
                let wanted = put("dora_scale", &shape).abs().unwrap().reshape(norms.shape()).unwrap();
                let flat = whole.reshape((rows, inputs, area)).unwrap();
                flat.broadcast_mul(&(wanted / norms).unwrap()).unwrap().reshape(weight.shape()).unwrap()
            }
            _ => whole,
        };
        if let Some(magnitude) = file.get_mut(&format!("{key}.dora_scale")) {
            *magnitude = magnitude.abs().unwrap();
        }
        if stores_alpha {
            file.insert(format!("{key}.alpha"), Tensor::new(1f32, &Device::Cpu).unwrap());
        }
        Some((file, merged))
    }
}

/// Σ up\[o, i\] · core\[i, j, k, l\] · down\[j, c\], place by place of the kernel.
fn core_product(core: &Tensor, up: &Tensor, down: &Tensor) -> Tensor {
    let core = core.flatten_from(2).unwrap();
    let places = (0..core.dim(2).unwrap()).map(|place| {
        let middle = core.narrow(2, place, 1).unwrap().squeeze(2).unwrap().contiguous().unwrap();
        up.contiguous().unwrap().matmul(&middle).unwrap().matmul(down).unwrap()
    });
    Tensor::stack(&places.collect::<Vec<_>>(), 2).unwrap()
}

fn kronecker(a: &Tensor, b: &Tensor) -> Tensor {
    let rows: Vec<Tensor> = a
        .to_vec2::<f64>()
        .unwrap()
        .into_iter()
        .map(|row| Tensor::cat(&row.into_iter().map(|value| scaled(b, value)).collect::<Vec<_>>(), 1).unwrap())
        .collect();
    Tensor::cat(&rows, 0).unwrap()
}

/// A model's tensors under the names of one of its layouts, with every matrix and convolution edited.
struct EditedLayout {
    adapter: Weights,
    /// Canonical tensors with the edits.
    merged: Weights,
}

impl EditedLayout {
    /// `None` if the layout cannot hold the model, or no weight has the form.
    fn new(model: &Model, layout: &str, form: AdapterForm, name: fn(&str) -> String) -> Option<Self> {
        let checkpoint = model.checkpoint();
        let identified = checkpoint.identified();
        let source = checkpoint.source();
        let foreign = identified.to_layout(layout, &source).unwrap();
        let (mut adapter, mut merged) = (Weights::new(), BTreeMap::new());
        for info in foreign.tensors() {
            let tensor = f64_of(&foreign.tensor(&info.name).ok()?);
            let module = info.name.strip_suffix(".weight").filter(|_| info.shape.len() >= 2);
            let edited = module.and_then(|module| form.on(&name(module), &tensor, Alpha::Stored));
            let (tensors, tensor) = edited.unwrap_or((Weights::new(), tensor));
            adapter.extend(tensors);
            merged.insert(info.name, tensor.to_dtype(DType::F32).unwrap());
        }
        if adapter.is_empty() {
            return None;
        }
        let merged: InMemoryTensors = merged.into_iter().collect();
        let sidecar = Sidecar { config: Some(&identified.config), metadata: &BTreeMap::new() };
        let hints = Hints { family: model.hints.family.clone(), ..Hints::default() };
        let merged_model = detect_source(&merged, sidecar, &model.reading().manifests, &hints).unwrap();
        assert_eq!(merged_model.layout, layout);
        Some(Self { adapter, merged: in_f64(&merged_model.canonical(merged).require_complete().unwrap()) })
    }
}

fn dotted(module: &str) -> String {
    module.to_owned()
}

fn underscored(module: &str) -> String {
    format!("lora_unet_{}", module.replace('.', "_"))
}

/// Compares every tensor with `edits`, and the predictions in both modes.
fn check_everywhere(model: &Model, edits: &EditedLayout, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    save(&path, &edits.adapter);
    let edited = model.edited(&path, LowRankMode::Fused).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(edited.reports[0].applied == edits.adapter.len(), "{what}: {}", edited.reports[0]);
    for (name, wanted) in &edits.merged {
        let got = f64_of(&edited.transformer.source().tensor(name).unwrap());
        assert_close(&got, wanted, BOUND, &format!("{what} {name}"));
    }
    let merged = model.with_weights(&edits.merged);
    let merged =
        Model { hints: Hints { config: Some(edited.transformer.config().clone()), ..merged.hints.clone() }, ..merged };
    let wanted = merged.forward(&merged.checkpoint());
    assert_close(&model.forward(&edited.transformer), &wanted, BOUND, &format!("{what}, merged"));
    let beside = model.edited(&path, LowRankMode::Separate).unwrap();
    assert_close(&model.forward(&beside.transformer), &wanted, BOUND, &format!("{what}, beside"));
}

/// Every form on every module of every family, by the names of every layout.
fn check_family(family: &str, names: &[&str], layouts: usize) {
    let mut checked = BTreeSet::new();
    for name in names {
        let model = Model::open(family, name);
        let all: Vec<String> = model.checkpoint().identified().layouts().map(str::to_owned).collect();
        for layout in &all {
            for form in FORMS {
                let what = format!("{family} {name} {layout} {form:?}");
                if let Some(edits) = EditedLayout::new(&model, layout, form, dotted) {
                    check_everywhere(&model, &edits, &what);
                    checked.insert(format!("{name} {layout}"));
                }
            }
            if let Some(edits) = EditedLayout::new(&model, layout, AdapterForm::Lora, underscored) {
                check_everywhere(&model, &edits, &format!("{family} {name} {layout}, underscored"));
            }
        }
    }
    assert_eq!(checked.len(), layouts, "{family}: {checked:?}");
}

#[test]
fn every_form_edits_every_module_of_flux() {
    check_family("flux", &["head24"], 3);
}

#[test]
fn every_form_edits_every_module_of_sd3() {
    check_family("sd3", &["medium", "medium35"], 6);
}

#[test]
fn every_form_edits_every_module_of_pixart() {
    check_family("pixart", &["alpha", "sigma"], 4);
}

#[test]
fn every_form_edits_every_module_of_the_other_families() {
    check_family("dit", &["original"], 2);
    check_family("sit", &["original"], 2);
    check_family("minrf", &["original"], 1);
}

/// Whatever is said to be applied can be computed, in both modes.
#[test]
fn what_is_applied_is_computed() {
    let flux = Model::flux();
    let wider = tensors("lora/expected.safetensors")["bfl_control/hidden_states"].clone();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(fixture("lora")).unwrap().map(|entry| entry.unwrap().path()).collect();
    for folder in std::fs::read_dir(user_file("")).unwrap() {
        files.extend(std::fs::read_dir(folder.unwrap().path()).unwrap().map(|entry| entry.unwrap().path()));
    }
    let mut applied = 0;
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "safetensors")) {
        for mode in MODES {
            let Ok(edited) = flux.edited(file, mode) else { continue };
            let mut inputs = flux.inputs.clone();
            if edited.transformer.identified().size("in_channels") == Some(32) {
                inputs.insert("hidden_states".to_owned(), wider.clone());
            }
            let model = Model { inputs, hints: Hints::default(), folder: tempfile::tempdir().unwrap() };
            model.forward(&edited.transformer);
            applied += 1;
        }
    }
    assert!(applied >= 2 * 28, "{applied}");
}
