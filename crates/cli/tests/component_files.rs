//! Components in files of their own, in the forms that ComfyUI, OpenCLIP and llama.cpp give them, generate what the
//! same components in folders do.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{fixture, seeded};
use clearform_weights::{InMemoryTensors, TensorSource, save};
use common::forms::{BothForms, FLUX, SAMPLING, SD3, Tensors, as_in_comfyui, pixels, same_bits};
use common::{repository, run, stderr_of, text};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// A component's tensors as a writer names them.
type Writer = fn(&Tensors) -> Tensors;

fn renamed(tensors: &Tensors, name: impl Fn(&str) -> String) -> Tensors {
    tensors.iter().map(|(old, tensor)| (name(old), tensor.clone())).collect()
}

fn as_saved(tensors: &Tensors) -> Tensors {
    tensors.clone()
}

/// The authors' names, as in ae.safetensors.
fn latent_diffusion(tensors: &Tensors) -> Tensors {
    tensors.iter().map(|(name, tensor)| as_in_comfyui("", "vae", name, tensor.clone())).collect()
}

fn first_stage(tensors: &Tensors) -> Tensors {
    renamed(&latent_diffusion(tensors), |name| format!("first_stage_model.{name}"))
}

/// CLIP as ComfyUI's files have it: with the logit scale and position ids.
fn comfy_clip(tensors: &Tensors) -> Tensors {
    let mut tensors = tensors.clone();
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("logit_scale".to_owned(), ones(&[]));
    tensors.insert("text_model.embeddings.position_ids".to_owned(), ones(&[1, 16]).to_dtype(DType::I64).unwrap());
    tensors
}

fn prefixed_clip(tensors: &Tensors) -> Tensors {
    renamed(tensors, |name| format!("text_encoders.clip_l.transformer.{name}"))
}

/// OpenCLIP's names; query, key and value are one tensor, and the projection is transposed.
fn open_clip(tensors: &Tensors) -> Tensors {
    let mut written = Tensors::new();
    for (name, tensor) in tensors {
        let name = name.strip_prefix("text_model.").unwrap_or(name);
        if name.contains(".k_proj.") || name.contains(".v_proj.") {
            continue;
        }
        if name.contains(".q_proj.") {
            let part = |part: &str| tensors[&format!("text_model.{}", name.replace("q_proj", part))].clone();
            let joined = Tensor::cat(&[part("q_proj"), part("k_proj"), part("v_proj")], 0).unwrap();
            let name = name.replace("self_attn.q_proj.", "attn.in_proj_");
            written.insert(name.replace("encoder.layers.", "transformer.resblocks."), joined);
            continue;
        }
        if name == "text_projection.weight" {
            written.insert("text_projection".to_owned(), tensor.t().unwrap().contiguous().unwrap());
            continue;
        }
        let pairs = [
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm", "ln_"),
            ("self_attn.", "attn."),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("final_ln_", "ln_final"),
        ];
        let name = pairs.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replace(ours, theirs));
        written.insert(name, tensor.clone());
    }
    written.insert("logit_scale".to_owned(), Tensor::ones((), DType::F32, &Device::Cpu).unwrap());
    written
}

/// T5 with its token embedding under its other name only.
fn tied(tensors: &Tensors) -> Tensors {
    renamed(tensors, |name| name.replace("shared.weight", "encoder.embed_tokens.weight"))
}

/// llama.cpp's names, as the gguf package maps them.
fn llama_cpp(tensors: &Tensors) -> Tensors {
    let pairs = [
        ("shared.", "token_embd."),
        ("encoder.block.", "enc.blk."),
        ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
        ("layer.0.SelfAttention.", "attn_"),
        ("layer.0.layer_norm", "attn_norm"),
        ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
        ("layer.1.DenseReluDense.wi_1", "ffn_up"),
        ("layer.1.DenseReluDense.wo", "ffn_down"),
        ("layer.1.layer_norm", "ffn_norm"),
        ("encoder.final_layer_norm", "enc.output_norm"),
    ];
    renamed(tensors, |name| pairs.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replace(ours, theirs)))
}

/// Numbers of types in GGUF.
const F32: u32 = 0;
const BF16: u32 = 30;

/// Writes tensors in F32 or BF16 as GGUF; vectors in F32, as llama.cpp's converter does.
fn save_gguf(path: &Path, tensors: &Tensors) {
    let (mut listed, mut values) = (Vec::new(), Vec::new());
    for (name, tensor) in tensors {
        let plain = tensor.rank() < 2 || tensor.dtype() != DType::BF16;
        let tensor = tensor.to_dtype(if plain { DType::F32 } else { DType::BF16 }).unwrap();
        listed.extend([&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat());
        listed.extend((tensor.rank() as u32).to_le_bytes());
        listed.extend(tensor.dims().iter().rev().flat_map(|size| (*size as u64).to_le_bytes()));
        listed.extend((if plain { F32 } else { BF16 }).to_le_bytes());
        listed.extend((values.len() as u64).to_le_bytes());
        values.extend(InMemoryTensors::from_iter([(name.clone(), tensor)]).read(name).unwrap().bytes);
        values.resize(values.len().next_multiple_of(32), 0);
    }
    let mut file = [b"GGUF".to_vec(), 3u32.to_le_bytes().to_vec()].concat();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend([0; 8]);
    file.extend(listed);
    file.resize(file.len().next_multiple_of(32), 0);
    fs::write(path, [file, values].concat()).unwrap();
}

/// The tensors of a component in the folders.
fn component(both: &BothForms, name: &str) -> Tensors {
    fixture(both.weights(name)).into_iter().collect()
}

/// Writes a component's file, as GGUF if `path` says so.
fn write(path: &Path, tensors: &Tensors) {
    match path.extension().is_some_and(|extension| extension == "gguf") {
        true => save_gguf(path, tensors),
        false => save(path, &tensors.clone().into_iter().collect::<InMemoryTensors>(), &BTreeMap::new()).unwrap(),
    }
}

/// The transformer alone, in a file.
fn transformer(both: &BothForms) -> PathBuf {
    both.path("exported.safetensors")
}

/// Writes files of components, and returns the options that pass them, with the folder of tokenizers and scheduler.
fn options(both: &BothForms, files: &[(&str, &str, Writer, &str)]) -> Vec<String> {
    let mut options = vec!["--components".to_owned(), text(&both.path("others")).to_owned()];
    let config = both.path("folders/transformer/config.json");
    options.extend(["--config".to_owned(), text(&config).to_owned()]);
    for (option, name, writer, file) in files {
        let path = both.path(file);
        write(&path, &writer(&component(both, name)));
        options.extend([(*option).to_owned(), text(&path).to_owned()]);
    }
    options
}

fn generate(both: &BothForms, options: &[String]) -> Vec<u8> {
    let (image, model) = (both.path("files.png"), transformer(both));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let command = ["generate", text(&model), "a red apple", "-o", text(&image)];
    run(0, &[&command[..], &SAMPLING, &options].concat());
    pixels(&image)
}

/// (option, component, its writer, name of the file)
type Files = [(&'static str, &'static str, Writer, &'static str); 3];

const FLUX_FORMS: [Files; 3] = [
    [
        ("--vae", "vae", latent_diffusion, "ae.safetensors"),
        ("--clip-l", "text_encoder", comfy_clip, "clip_l.safetensors"),
        ("--t5xxl", "text_encoder_2", as_saved, "t5xxl.safetensors"),
    ],
    [
        ("--vae", "vae", first_stage, "first_stage.safetensors"),
        ("--clip_l", "text_encoder", open_clip, "open_clip.safetensors"),
        ("--t5xxl", "text_encoder_2", llama_cpp, "t5-encoder.gguf"),
    ],
    [
        ("--vae", "vae", as_saved, "vae.safetensors"),
        ("--clip-l", "text_encoder", prefixed_clip, "prefixed.safetensors"),
        ("--t5xxl", "text_encoder_2", tied, "tied.safetensors"),
    ],
];

#[test]
fn flux_generates_the_same_from_files_in_every_form() {
    let both = BothForms::new(&FLUX);
    let wanted = both.generate(&both.path("folders"));
    for files in FLUX_FORMS {
        assert_eq!(generate(&both, &options(&both, &files)), wanted, "{:?}", files.map(|file| file.3));
    }
}

/// OpenCLIP's projection is the transpose of transformers'; here it is not square.
#[test]
fn sd3_generates_the_same_from_files() {
    let both = BothForms::new(&SD3);
    let wanted = both.generate(&both.path("folders"));
    for clip in [comfy_clip as Writer, open_clip] {
        let files = [
            ("--vae", "vae", latent_diffusion as Writer, "ae.safetensors"),
            ("--clip-l", "text_encoder", clip, "clip_l.safetensors"),
            ("--clip-g", "text_encoder_2", clip, "clip_g.safetensors"),
            ("--t5xxl", "text_encoder_3", llama_cpp, "t5.gguf"),
        ];
        assert_eq!(generate(&both, &options(&both, &files)), wanted);
    }
}

/// Rounds the weights of a component in the folders to `dtype`.
fn rounded(both: &BothForms, name: &str, dtype: DType) {
    let round = |(name, tensor): (String, Tensor)| (name, tensor.to_dtype(dtype).unwrap());
    let tensors: HashMap<_, _> = component(both, name).into_iter().map(round).collect();
    candle_core::safetensors::save(&tensors, both.weights(name)).unwrap();
}

/// T5 in scaled fp8: its matrices divided by 0.25.
fn scaled_fp8(tensors: &Tensors) -> Tensors {
    let mut written = Tensors::new();
    for (name, tensor) in tensors {
        let matrix = name.strip_suffix("weight").filter(|_| name.contains("SelfAttention.q") || name.contains("wi_"));
        written.insert(name.clone(), matrix.map_or(tensor.clone(), |_| fp8(tensor)));
        if let Some(module) = matrix {
            written.insert(format!("{module}scale_weight"), Tensor::new(0.25f32, &Device::Cpu).unwrap());
        }
    }
    written.insert("scaled_fp8".to_owned(), Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap());
    written
}

fn fp8(tensor: &Tensor) -> Tensor {
    (tensor.to_dtype(DType::F32).unwrap() * 4.0).unwrap().to_dtype(DType::F8E4M3).unwrap()
}

#[test]
fn files_in_f16_and_fp8_are_read_as_those_values() {
    let both = BothForms::new(&FLUX);
    rounded(&both, "text_encoder", DType::F16);
    rounded(&both, "vae", DType::F16);
    let files = [
        ("--vae", "vae", latent_diffusion as Writer, "ae.safetensors"),
        ("--clip-l", "text_encoder", comfy_clip, "clip_l.safetensors"),
        ("--t5xxl", "text_encoder_2", scaled_fp8, "t5xxl_fp8.safetensors"),
    ];
    let options = options(&both, &files);
    let plain = both.generate(&both.path("folders"));
    let products = component(&both, "text_encoder_2").into_iter().map(|(name, tensor)| {
        let scaled = name.contains("SelfAttention.q") || name.contains("wi_");
        let value = || (fp8(&tensor).to_dtype(DType::F32).unwrap() * 0.25).unwrap().to_dtype(DType::BF16).unwrap();
        (name, if scaled { value() } else { tensor.clone() })
    });
    let products: HashMap<String, Tensor> = products.collect();
    candle_core::safetensors::save(&products, both.weights("text_encoder_2")).unwrap();
    let wanted = both.generate(&both.path("folders"));
    assert_ne!(plain, wanted, "fp8 changes nothing");
    assert_eq!(generate(&both, &options), wanted);
}

/// What `convert` writes from files is the components themselves; `compare` takes the same files.
#[test]
fn converting_from_files_writes_the_components() {
    let both = BothForms::new(&FLUX);
    let options = options(&both, &FLUX_FORMS[1]);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let (model, file) = (both.path("model"), transformer(&both));
    run(0, &[&["convert", text(&file), "--no-distill", "-o", text(&model)], &options[..]].concat());
    run(0, &["verify", text(&model)]);
    for (name, _) in FLUX.components {
        let got = fixture(model.join(name).join(both.weights(name).file_name().unwrap()));
        let wanted = component(&both, name);
        assert!(got.keys().eq(wanted.keys()), "{name}");
        let equal =
            |(name, tensor): (&String, &Tensor)| same_bits(&tensor.to_dtype(DType::BF16).unwrap(), &wanted[name]);
        assert!(got.iter().all(equal), "{name}");
    }
    assert_eq!(both.generate(&model), both.generate(&both.path("folders")));
    let record: toml::Table = fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let recorded = record["component"].as_array().unwrap().iter().map(|component| {
        let field = |key: &str| component[key].as_str().unwrap().to_owned();
        (field("name"), field("file"), field("sha256"))
    });
    let given = FLUX_FORMS[1].iter().map(|(_, component, _, file)| {
        let sha256 = clearform_weights::digest(both.path(file)).unwrap().sha256;
        ((*component).to_owned(), (*file).to_owned(), sha256)
    });
    assert_eq!(recorded.collect::<BTreeSet<_>>(), given.collect::<BTreeSet<_>>());
    let (prompts, report) = (both.path("prompts.txt"), both.path("report"));
    fs::write(&prompts, "a red apple\n").unwrap();
    let compare = ["compare", text(&both.path("folders")), text(&model), "-o", text(&report)].map(str::to_owned);
    let compare: Vec<&str> = compare.iter().map(String::as_str).collect();
    let files = options.iter().skip(4).copied().collect::<Vec<_>>();
    let sampling = ["--prompts", text(&prompts), "--steps", "1", "--size", "64"];
    run(0, &[&compare[..], &sampling, &files].concat());
}

#[test]
fn a_wrong_or_missing_file_is_named_with_what_to_do() {
    let both = BothForms::new(&FLUX);
    let t5 = both.path("t5.gguf");
    write(&t5, &llama_cpp(&component(&both, "text_encoder_2")));
    let file = transformer(&both);
    let config = both.path("folders/transformer/config.json");
    let others = both.path("others");
    let ask = |further: &[&str]| {
        let command = ["generate", text(&file), "a red apple", "--config", text(&config), "-o", "no.png"];
        stderr_of(1, &[&command[..], further].concat())
    };
    for (options, parts) in [
        (&["--clip-l", text(&t5)][..], &["--clip-l", "this is a T5 text encoder", "--t5xxl"][..]),
        (&["--clip-g", text(&t5)], &["clip_g", "clip_l", "t5xxl", "vae"]),
        (&["--t5xxl", text(&both.path("none.gguf"))], &["none.gguf"]),
        (&["--t5xxl", text(&t5)], &["scheduler is missing", "--components DIR"]),
        (&["--components", text(&others)], &["others/text_encoder: no .safetensors"]),
    ] {
        let message = ask(options);
        assert!(parts.iter().all(|part| message.contains(part)), "{options:?}: {message}");
    }
    fs::remove_dir_all(others.join("vae")).unwrap();
    let message = ask(&["--components", text(&others)]);
    assert!(message.contains("vae is missing") && message.contains("--vae"), "{message}");
    let both_in_one = both.path("one.safetensors");
    let message = ask(&["--components", text(&others), "--vae", text(&t5), "--clip-l", text(&both_in_one)]);
    assert!(message.contains("--vae: this is a T5 text encoder"), "{message}");
    let message = stderr_of(1, &["inspect", text(&t5)]);
    assert!(message.contains("a T5 text encoder") && message.contains("with --t5xxl"), "{message}");
}

/// The tensors of TAESD, whose latents have as many channels as those of mini-flux, with seeded values.
fn taesd() -> Tensors {
    let block = |layer: usize| [0, 2, 4].map(|conv| format!("layers.{layer}.conv.{conv}"));
    let blocks = |layers: &[usize]| layers.iter().flat_map(|layer| block(*layer)).collect::<Vec<_>>();
    let mut tensors = Tensors::new();
    let mut add = |name: String, outputs: usize, inputs: usize, has_bias: bool| {
        let weight = format!("{name}.weight");
        tensors.insert(weight.clone(), seeded(&weight, &[outputs, inputs, 3, 3], "taesd/"));
        if has_bias {
            let bias = format!("{name}.bias");
            tensors.insert(bias.clone(), seeded(&bias, &[outputs], "taesd/"));
        }
    };
    for name in blocks(&[1, 3, 4, 5, 7, 8, 9, 11, 12, 13]) {
        add(format!("encoder.{name}"), 64, 64, true);
    }
    for name in blocks(&[2, 3, 4, 7, 8, 9, 12, 13, 14, 17]) {
        add(format!("decoder.{name}"), 64, 64, true);
    }
    for name in ["encoder.layers.2", "encoder.layers.6", "encoder.layers.10"] {
        add(name.to_owned(), 64, 64, false);
    }
    for name in ["decoder.layers.6", "decoder.layers.11", "decoder.layers.16"] {
        add(name.to_owned(), 64, 64, false);
    }
    add("encoder.layers.0".to_owned(), 64, 3, true);
    add("encoder.layers.14".to_owned(), 4, 64, true);
    add("decoder.layers.0".to_owned(), 64, 4, true);
    add("decoder.layers.18".to_owned(), 3, 64, true);
    tensors
}

/// The half `side` of a tiny autoencoder as its author names it: in the decoder the layer that squashes latents counts.
fn half(tensors: &Tensors, side: &str) -> Tensors {
    let own = tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(side)?, tensor)));
    let renamed = own.map(|(name, tensor)| {
        let (layer, rest) = name.strip_prefix(".layers.").unwrap().split_once('.').unwrap();
        let layer = layer.parse::<usize>().unwrap() + usize::from(side == "decoder");
        (format!("{layer}.{rest}"), tensor.clone())
    });
    renamed.collect()
}

/// In diffusers' names, and as ComfyUI takes it. A portable model may have it too.
#[test]
fn a_tiny_autoencoder_decodes_in_place_of_the_vae() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base = repository("assets/mini-flux/base");
    let both = taesd();
    let decoder: Tensors = both.clone().into_iter().filter(|(name, _)| name.starts_with("decoder")).collect();
    let mut images = Vec::new();
    for (name, tensors) in [("both", &both), ("decoder", &decoder), ("author", &half(&both, "decoder"))] {
        let (file, image) = (path(&format!("{name}.safetensors")), path(&format!("{name}.png")));
        write(&file, tensors);
        run(
            0,
            &[
                "generate",
                text(&base),
                "cat",
                "--steps=1",
                "--width=64",
                "--height=64",
                "--tae",
                text(&file),
                "-o",
                text(&image),
            ],
        );
        images.push(pixels(&image));
    }
    assert!(images.iter().all(|image| *image == images[0]));
    let (file, model, image) = (path("decoder.safetensors"), path("model"), path("converted.png"));
    let full =
        ["convert", text(&base), "--attention", "full", "--no-distill", "--tae", text(&file), "-o", text(&model)];
    run(0, &full);
    run(0, &["generate", text(&model), "cat", "--steps=1", "--width=64", "--height=64", "-o", text(&image)]);
    assert_eq!(pixels(&image), images[0]);
    let encoder = path("encoder.safetensors");
    write(&encoder, &half(&both, "encoder"));
    let refused = |flag: &str, file: &Path| {
        stderr_of(1, &["generate", text(&base), "cat", flag, text(file), "-o", text(&path("none.png"))])
    };
    let said = refused("--tae", &encoder);
    assert!(
        said.contains("the encoder of a tiny autoencoder") && said.contains("takes the file with the decoder"),
        "{said}"
    );
    let said = refused("--vae", &file);
    assert!(said.contains("a tiny autoencoder") && said.contains("this file with --tae"), "{said}");
    let said = refused("--lora", &file);
    assert!(said.contains("the file is a tiny autoencoder"), "{said}");
    // A control image needs the encoder.
    let (net, control) = (repository("assets/mini-flux/controlnet"), repository("assets/mini-flux/references.png"));
    let said = stderr_of(
        1,
        &[
            "generate",
            text(&base),
            "cat",
            "--tae",
            text(&file),
            "--controlnet",
            text(&net),
            "--control-image",
            text(&control),
            "-o",
            text(&path("none.png")),
        ],
    );
    assert!(said.contains("has a decoder alone"), "{said}");
}
