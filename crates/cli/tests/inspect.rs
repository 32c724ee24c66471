//! docs/inspect.md shows what the command prints: every example is run on sparse files with the tensor names and shapes
//! of published models.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{Hints, Manifests, Sidecar, detect_source};
use clearform_models::FamilyRegistry;
use clearform_weights::{Dtype, RawTensor, TensorInfo, TensorSource, WeightsError};
use common::{clearform, repository, run, text};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const PAGE: &str = "docs/inspect.md";
const EXAMPLE: &str = "```console\n$ clearform ";
const END: &str = "```\n";
/// If set, the test rewrites the page's examples.
const UPDATE: &str = "UPDATE_DOCS";

/// Tensors without values.
#[derive(Debug, Clone, Default)]
struct Shapes(BTreeMap<String, TensorInfo>);

impl TensorSource for Shapes {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.values().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).cloned()
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        Err(WeightsError::Missing { name: name.to_owned() })
    }
}

impl Shapes {
    fn put(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        self.0.insert(name.to_owned(), TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() });
    }

    /// The tensors of a model in a layout; `hidden` has the sizes that `config` does not state.
    fn of(family: &str, config: &Value, hidden: &Value, layout: &str, dtype: Dtype) -> Self {
        let manifests = Manifests::embedded().unwrap();
        let mut sizes = config.clone();
        sizes.as_object_mut().unwrap().extend(hidden.as_object().unwrap().clone());
        let mut canonical = Self::default();
        for tensor in manifests.expected(family, &sizes).unwrap().iter().filter(|tensor| !tensor.optional) {
            canonical.put(&tensor.name, dtype, &tensor.shape.iter().copied().collect::<Option<Vec<_>>>().unwrap());
        }
        let sidecar = Sidecar { config: Some(config), metadata: &BTreeMap::new() };
        let identified = detect_source(&canonical, sidecar, &manifests, &Hints::default()).unwrap();
        let foreign = identified.to_layout(layout, &canonical).unwrap();
        Self(foreign.tensors().into_iter().map(|info| (info.name.clone(), info)).collect())
    }

    fn rename(&mut self, from: &str, to: &str) {
        let info = self.0.remove(from).unwrap();
        self.put(to, info.dtype, &info.shape);
    }

    /// The matrices in fp8, each with a scale, as ComfyUI stores them.
    fn scaled(mut self, prefix: &str) -> Self {
        self.put(&format!("{prefix}scaled_fp8"), Dtype::F8_E4M3, &[0]);
        for info in self.tensors().iter().filter(|info| info.shape.len() == 2) {
            self.put(&info.name, Dtype::F8_E4M3, &info.shape);
            self.put(&info.name.replace(".weight", ".scale_weight"), Dtype::F32, &[]);
        }
        self
    }

    /// Writes a sparse safetensors file: a header, and a hole for the values.
    fn write(&self, path: &Path) {
        let (mut header, mut end) = (Map::new(), 0);
        for (name, TensorInfo { dtype, shape, .. }) in &self.0 {
            let begin = end;
            end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let entry = json!({"dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": [begin, end]});
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_len((8 + header.len() + end) as u64).unwrap();
    }
}

fn flux(layout: &str) -> Shapes {
    let config = json!({
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": 64, "num_layers": 19,
        "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": true, "axes_dims_rope": [16, 56, 56],
    });
    Shapes::of("flux", &config, &json!({"width": 3072}), layout, Dtype::BF16)
}

fn sd35_medium() -> Shapes {
    let config = json!({
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
        "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
        "dual_attention_layers": (0..13).collect::<Vec<_>>(), "qk_norm": "rms_norm",
    });
    Shapes::of("sd3", &config, &json!({"width": 1536}), "original", Dtype::BF16)
}

/// Writes a diffusers folder.
fn pixart_sigma(folder: &Path) {
    let config = json!({
        "_class_name": "PixArtTransformer2DModel", "num_attention_heads": 16, "attention_head_dim": 72,
        "in_channels": 4, "out_channels": 8, "num_layers": 28, "cross_attention_dim": 1152, "sample_size": 128,
        "patch_size": 2, "caption_channels": 4096, "use_additional_conditions": false, "interpolation_scale": 2,
    });
    let folder = folder.join("transformer");
    let shapes = Shapes::of("pixart", &config, &json!({"width": 1152}), "diffusers", Dtype::F32);
    shapes.write(&folder.join("diffusion_pytorch_model.safetensors"));
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// In Facebook's names, with the positions that its files contain.
fn dit_xl_2(size: usize) -> Shapes {
    let config = json!({
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
        "out_channels": 8, "num_layers": 28, "sample_size": size / 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-5, "downscale_freq_shift": 1,
    });
    let hidden = json!({"width": 1152, "class_rows": 1001});
    let mut shapes = Shapes::of("dit", &config, &hidden, "original", Dtype::F32);
    shapes.put("pos_embed", Dtype::F32, &[1, (size / 16).pow(2), 1152]);
    shapes
}

fn minrf() -> Shapes {
    let config = json!({
        "_class_name": "DiT_Llama", "in_channels": 1, "input_size": 32, "patch_size": 2, "dim": 64, "n_layers": 6,
        "n_heads": 4, "num_classes": 10, "norm_eps": 1e-5,
    });
    let hidden = json!({
        "width": 64, "stem_width": 32, "class_rows": 11, "condition_width": 64, "feed_forward_width": 256,
    });
    Shapes::of("minrf", &config, &hidden, "original", Dtype::F32)
}

/// Writes the files of the page's examples.
fn files(folder: &Path) {
    flux("bfl").write(&folder.join("flux1-dev.safetensors"));
    flux("comfy").scaled("model.diffusion_model.").write(&folder.join("flux1-dev-fp8-scaled.safetensors"));
    let mut broken = flux("bfl");
    broken.rename("double_blocks.3.img_attn.qkv.weight", "double_blocks.3.img_attn.to_qkv.weight");
    broken.put("ema_decay", Dtype::F32, &[]);
    broken.0.remove("single_blocks.37.linear2.bias").unwrap();
    broken.write(&folder.join("broken.safetensors"));
    sd35_medium().write(&folder.join("sd3.5_medium.safetensors"));
    pixart_sigma(&folder.join("PixArt-Sigma-XL-2-1024-MS"));
    dit_xl_2(256).write(&folder.join("DiT-XL-2-256x256.safetensors"));
    dit_xl_2(512).write(&folder.join("SiT-XL-2-512x512.safetensors"));
    minrf().write(&folder.join("mnist.safetensors"));
}

/// Runs a command in `folder`; returns stdout and stderr.
fn printed(command: &str, folder: &Path) -> String {
    let arguments: Vec<&str> = command.split(' ').collect();
    let output = clearform(&arguments).current_dir(folder).output().unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

/// The page with the current output of its examples.
fn updated(page: &str, folder: &Path) -> String {
    let mut sections = page.split(EXAMPLE);
    let mut updated = sections.next().unwrap().to_owned();
    for section in sections {
        let (command, rest) = section.split_once('\n').unwrap();
        let (_, after) = rest.split_once(END).unwrap();
        updated += &format!("{EXAMPLE}{command}\n{}{END}{after}", printed(command, folder));
    }
    updated
}

#[test]
fn the_page_shows_what_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    files(folder.path());
    let page = std::fs::read_to_string(repository(PAGE)).unwrap();
    let wanted = updated(&page, folder.path());
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(repository(PAGE), &wanted).unwrap();
        return;
    }
    assert_eq!(page.matches(EXAMPLE).count(), 8);
    let differing = page.lines().zip(wanted.lines()).find(|(page, wanted)| page != wanted);
    assert!(page == wanted, "{PAGE} is stale (set {UPDATE} to update it): {differing:?}");
    let wide = |line: &&str| {
        line.chars().count() > 100 && !["error: ", "unmatched "].iter().any(|word| line.starts_with(word))
    };
    assert_eq!(
        wanted.split(EXAMPLE).skip(1).filter_map(|section| section.split(END).next()).flat_map(str::lines).find(wide),
        None
    );
}

#[test]
fn json_contains_what_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    files(folder.path());
    let found = |name: &str, code| common::json(code, &["inspect", text(&folder.path().join(name))]);
    let scaled = found("flux1-dev-fp8-scaled.safetensors", 0);
    let stored = |at: usize| ["format", "tensors", "bytes"].map(|key| scaled["stored"][at][key].clone());
    assert_eq!(stored(0), [json!("F8_E4M3 with scales"), json!(314), json!(11_898_322_944_u64)]);
    assert_eq!(stored(1), [json!("BF16"), json!(466), json!(2 * 3_085_376)]);
    assert_eq!(scaled["dtypes"], json!({"BF16": 1160}));
    assert_eq!(scaled["variant"]["defaults"]["evaluations"], 1);
    let at_8k = &scaled["estimates"][3];
    assert_eq!([&at_8k["side_pixels"], &at_8k["image_tokens"], &at_8k["text_tokens"]], [8192, 262_144, 512]);
    assert_eq!(at_8k["clear"][1]["radius_tokens"], 16);
    let ratio = at_8k["full_teraflop_per_evaluation"].as_f64().unwrap()
        / at_8k["clear"][1]["teraflop_per_evaluation"].as_f64().unwrap();
    assert!((ratio - at_8k["clear"][1]["full_over_clear"].as_f64().unwrap()).abs() < 1e-9 && ratio > 10.0);

    let broken = found("broken.safetensors", 1);
    let right = "double_blocks.3.img_attn.qkv.weight";
    let wrong = "double_blocks.3.img_attn.to_qkv.weight";
    assert_eq!(broken["suggestions"], json!({right: wrong, wrong: right}));
    assert_eq!((broken["missing"].as_array().unwrap().len(), broken["unmatched"].as_array().unwrap().len()), (4, 2));
}

/// The manifests state the evaluations per step for every variant; the models decide by guidance scale.
#[test]
fn evaluations_per_step_agree_with_the_models() {
    let folder = tempfile::tempdir().unwrap();
    files(folder.path());
    let variants: [(&str, &[&str]); 6] = [
        ("flux1-dev.safetensors", &["--variant", "dev"]),
        ("flux1-dev.safetensors", &["--variant", "schnell"]),
        ("sd3.5_medium.safetensors", &["--variant", "sd3.5-medium"]),
        ("sd3.5_medium.safetensors", &["--variant", "sd3.5-large-turbo"]),
        ("DiT-XL-2-256x256.safetensors", &["--family", "dit"]),
        ("SiT-XL-2-512x512.safetensors", &["--family", "sit"]),
    ];
    let plain = ["PixArt-Sigma-XL-2-1024-MS", "mnist.safetensors"].map(|name| (name, &[][..]));
    for (name, arguments) in variants.into_iter().chain(plain) {
        let path = folder.path().join(name);
        let output = run(0, &[&["inspect", text(&path), "--json"], arguments].concat());
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let architecture =
            FamilyRegistry::default().get(found["family"].as_str().unwrap()).unwrap().parse(&found["config"]).unwrap();
        let defaults = &found["variant"]["defaults"];
        let guidance_kind = architecture.pipeline_spec().guidance_kind();
        let evaluations = if guidance_kind.guides(defaults["guidance"].as_f64().unwrap()) { 2 } else { 1 };
        assert_eq!(defaults["evaluations"], evaluations, "{name} {arguments:?}");
    }
}
