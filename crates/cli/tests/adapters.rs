//! Adapters on the command line: their effect, their reports, and that no plugin is loaded without need.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use clearform_testkit::{assert_close, fixture, plugin_folder, relative_error};
use clearform_weights::Dtype;
use common::{Tiny, clearform, json, repository, run, stderr_of, text};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The folder of the plugins' libraries.
fn plugins() -> String {
    text(&plugin_folder()).to_owned()
}

fn lora(format: &str) -> String {
    text(&repository(&format!("tests/fixtures/lora/{format}.safetensors"))).to_owned()
}

fn expected_lora(name: &str) -> Tensor {
    fixture(repository("tests/fixtures/lora/expected.safetensors"))[&format!("{name}/sample")].clone()
}

/// Runs `forward` on the inputs of a fixture with further arguments; returns the sample and stderr.
fn forward(model: &Path, inputs: &HashMap<String, Tensor>, more: &[&str]) -> (Tensor, String) {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    candle_core::safetensors::save(inputs, &input).unwrap();
    let arguments = [
        "forward",
        text(model),
        "--inputs",
        text(&input),
        "-o",
        text(&output),
        "--overwrite",
        "--plugin-dir",
        &plugins(),
    ];
    let message = stderr_of(0, &[&arguments, more].concat());
    (fixture(&output)["sample"].clone(), message)
}

fn lora_inputs() -> HashMap<String, Tensor> {
    fixture(repository("tests/fixtures/lora/input.safetensors")).into_iter().collect()
}

#[test]
fn a_lora_is_applied_and_reported() {
    let tiny = Tiny::new();
    let (sample, message) = forward(tiny.path(), &lora_inputs(), &["--lora", &lora("kohya")]);
    assert_close("kohya", &sample, &expected_lora("kohya"), 2e-5);
    assert!(message.contains("kohya.safetensors: applied 99 of 99 tensors to 33 modules"), "{message}");
    let half = format!("{}:0.5", lora("kohya"));
    let fused = ["--lora", &half, "--lora-apply-mode", "immediately"];
    assert_close("half", &forward(tiny.path(), &lora_inputs(), &fused).0, &expected_lora("kohya@0.5"), 2e-5);
    let nowhere = format!("{}:double=0,single=0,_in=0,final_layer=0", lora("kohya"));
    let plain = forward(tiny.path(), &lora_inputs(), &[]).0;
    assert_close("off", &forward(tiny.path(), &lora_inputs(), &["--lora", &nowhere]).0, &plain, 1e-6);
}

/// "double" and "single" are in the names of the original layout, and select blocks of a LoRA in diffusers' names too.
#[test]
fn strengths_of_blocks_may_have_the_names_of_any_layout() {
    let tiny = Tiny::new();
    let run =
        |setting: &str| forward(tiny.path(), &lora_inputs(), &["--lora", &format!("{}{setting}", lora("peft"))]).0;
    let others = "x_embedder=0,context_embedder=0,time_text_embed=0,norm_out=0,proj_out=0";
    let plain = forward(tiny.path(), &lora_inputs(), &[]).0;
    assert_close("off", &run(&format!(":double=0,single=0,{others}")), &plain, 1e-6);
    // The same blocks by diffusers' names.
    let original = run(":0.8:double=0.8,single=0.5");
    let own = run(":0.8:single_transformer_blocks=0.5");
    assert_close("single", &original, &own, 1e-6);
    assert!(relative_error(&original, &run(":0.8")).unwrap() > 1e-3);
}

/// Files that are no LoRAs, with what each is told.
#[test]
fn other_kinds_of_files_are_named() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    let (input, output, adapter) = (path("in.safetensors"), path("out.safetensors"), path("adapter.safetensors"));
    candle_core::safetensors::save(&lora_inputs(), &input).unwrap();
    let plugins = plugins();
    let told = |adapter: &Path, flag: &str| {
        let arguments = ["forward", text(tiny.path()), "--inputs", text(&input), "-o", text(&output), "--overwrite"];
        let message = stderr_of(1, &[&arguments[..], &["--plugin-dir", &plugins, flag, text(adapter)]].concat());
        assert!(!message.contains("panicked") && !output.exists(), "{message}");
        message
    };
    let controlnet = told(&repository("tests/fixtures/controlnet/one-two"), "--lora");
    assert!(controlnet.contains("opens it as a ControlNet: give it with --controlnet"), "{controlnet}");
    let style = told(Path::new(&lora("peft")), "--controlnet");
    assert!(style.contains("give it with --lora"), "{style}");
    for (names, expected) in [
        (
            &["lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", "lora_unet_double_blocks_0_img_attn_qkv.alpha"][..],
            "this is an OFT",
        ),
        (&["base_model.model.a.oft_R.weight"], "this is an OFT"),
        (&["lora_unet_a.on_input", "lora_unet_a.weight"], "this is an IA3"),
        (&["base_model.model.a.ia3_l"], "this is an IA3"),
        (&["base_model.model.a.vera_lambda_b"], "this is a GLoRA or VeRA"),
        (&["emb_params"], "this is a textual inversion"),
        (&["clip_g", "clip_l"], "this is a textual inversion"),
        (&["<cat-toy>"], "this is a textual inversion"),
        (
            &["unet.up_blocks.0.attentions.0.to_q.lora_A.weight", "unet.up_blocks.0.attentions.0.to_q.lora_B.weight"],
            "U-Net (1.5, 2 or XL; B-LoRAs",
        ),
        (
            &[
                "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
                "lora_unet_input_blocks_4_1_proj_in.lora_up.weight",
            ],
            "U-Net (1.5, 2 or XL",
        ),
    ] {
        let tensor = |name: &&str| ((*name).to_owned(), Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap());
        candle_core::safetensors::save(&names.iter().map(tensor).collect::<HashMap<_, _>>(), &adapter).unwrap();
        let message = told(&adapter, "--lora");
        assert!(message.contains(expected), "{names:?}: {message}");
    }
    std::fs::write(&adapter, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n").unwrap();
    for flag in ["--lora", "--controlnet", "--adapter"] {
        let pointer = told(&adapter, flag);
        assert!(pointer.contains("this is a git-lfs pointer, not the file itself: run `git lfs pull`"), "{pointer}");
    }
}

#[test]
fn unmatched_adapter_tensors_exit_1() {
    let (tiny, broken) = (Tiny::new(), lora("broken"));
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    candle_core::safetensors::save(&lora_inputs(), &input).unwrap();
    let plugins = plugins();
    let arguments =
        ["forward", text(tiny.path()), "--inputs", text(&input), "-o", text(&output), "--overwrite", "--lora", &broken];
    let message = stderr_of(1, &[&arguments[..], &["--plugin-dir", &plugins]].concat());
    assert!(message.contains("totally.unknown") && message.contains("--allow-partial"), "{message}");
    assert!(!output.exists());
    run(0, &[&arguments[..], &["--plugin-dir", &plugins, "--allow-partial"]].concat());
    // Of the file, the modules of two layers match.
    let matching = ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear2"];
    let tensors =
        fixture(&broken).into_iter().filter(|(name, _)| matching.iter().any(|module| name.starts_with(module)));
    let tensors: HashMap<_, _> = tensors.collect();
    assert_eq!(tensors.len(), 6);
    let rest = folder.path().join("rest.safetensors");
    candle_core::safetensors::save(&tensors, &rest).unwrap();
    let wanted = forward(tiny.path(), &lora_inputs(), &["--lora", text(&rest)]).0;
    assert_close("the matching modules", &fixture(&output)["sample"], &wanted, 0.0);
    assert!(relative_error(&wanted, &forward(tiny.path(), &lora_inputs(), &[]).0).unwrap() > 1e-2);
    let off = stderr_of(1, &[&arguments[..], &["--no-plugins"]].concat());
    assert!(off.contains("plugins are disabled (--no-plugins)"), "{off}");
}

/// What `forward` says of adapters that it refuses, with further arguments.
fn refused(adapter: &str, more: &[&str]) -> String {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let (input, output) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    candle_core::safetensors::save(&lora_inputs(), &input).unwrap();
    let plugins = plugins();
    let arguments =
        ["forward", text(tiny.path()), "--inputs", text(&input), "-o", text(&output), "--overwrite", "--lora", adapter];
    let message = stderr_of(1, &[&arguments[..], &["--plugin-dir", &plugins], more].concat());
    assert!(!message.contains("panicked") && !output.exists(), "{message}");
    message
}

/// `forward` loads no text encoders, so nothing of this LoRA has an effect there.
#[test]
fn an_adapter_of_which_nothing_is_applied_is_refused() {
    for more in [&[][..], &["--allow-partial"]] {
        let message = refused(&lora("users/text-encoder-lora/kohya-te2"), more);
        assert!(message.contains(": applied 0 of 3 tensors to 0 modules"), "{message}");
        assert!(message.contains("no text encoder is loaded"), "{message}");
        assert!(message.contains("nothing of it can be applied here: leave it out"), "{message}");
    }
}

#[test]
fn strengths_out_of_range_are_named() {
    for (setting, found) in [
        (":nan", "the strength: expected a number from -1000 to 1000, found NaN"),
        (":-inf", "found -inf"),
        (":1e30", "found 1e30"),
        (":0.5:double=inf", "the strength of \"double\": expected a number from -1000 to 1000, found inf"),
        (":double=1,single=-1001", "the strength of \"single\": expected a number from -1000 to 1000, found -1001"),
        (":single=x", "single=x: expected a number"),
    ] {
        let message = refused(&format!("{}{setting}", lora("kohya")), &[]);
        assert!(message.contains("kohya.safetensors: ") && message.contains(found), "{message}");
    }
}

/// Every number format of safetensors that no weight can be computed with.
#[test]
fn a_lora_in_another_number_format_is_refused_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    for dtype in [
        Dtype::BOOL,
        Dtype::F4,
        Dtype::F6_E2M3,
        Dtype::F6_E3M2,
        Dtype::U8,
        Dtype::I8,
        Dtype::F8_E8M0,
        Dtype::I16,
        Dtype::U16,
        Dtype::I32,
        Dtype::U32,
        Dtype::I64,
        Dtype::U64,
        Dtype::C64,
    ] {
        let mut tensors = common::RawTensors::default();
        for (name, shape) in [("proj_out.lora_A.weight", [8, 48]), ("proj_out.lora_B.weight", [16, 8])] {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            tensors.put(name.to_owned(), dtype, &shape, vec![0; bytes]);
        }
        clearform_weights::save(&path, &tensors, &BTreeMap::new()).unwrap();
        let message = refused(text(&path), &[]).to_lowercase();
        assert!(message.contains("\"proj_out.lora_a.weight\""), "{message}");
        let name = format!("{dtype:?}").to_lowercase();
        let says = [format!("stored in {name}"), format!("found {name}")];
        assert!(says.iter().any(|says| message.contains(says)), "{name}: {message}");
    }
}

/// peft's folders of a FLUX, one for each component, as one adapter.
#[test]
fn peft_folders_by_component_are_merged_and_recorded() {
    let (tiny, folder, plugins) = (Tiny::new(), tempfile::tempdir().unwrap(), plugins());
    let folders = repository("tests/fixtures/lora/peft-folders");
    let (adapter, model) = (folders.join("flux"), folder.path().join("model"));
    let components = repository("tests/fixtures/components/generation4");
    let convert = ["convert", text(tiny.path()), "-o", text(&model), "--attention", "full", "--no-distill"];
    let more = ["--plugin-dir", &plugins, "--components", text(&components), "--lora", text(&adapter)];
    let message = stderr_of(0, &[&convert[..], &more].concat());
    assert!(message.contains("peft-folders/flux: applied 8 of 8 tensors to 4 modules"), "{message}");
    let stored = |component: &str, file: &str| fixture(model.join(component).join(file));
    let merged = [
        ("transformer/", stored("transformer", "diffusion_pytorch_model.safetensors")),
        ("text_encoder/", stored("text_encoder", "model.safetensors")),
        ("text_encoder_2/", stored("text_encoder_2", "model.safetensors")),
    ];
    for (name, expected) in fixture(folders.join("expected.safetensors")) {
        let (prefix, tensors) = merged.iter().find(|(prefix, _)| name.starts_with(prefix)).unwrap();
        let own = &name[prefix.len()..];
        let found = tensors.get(own).unwrap_or_else(|| &tensors[&format!("text_model.{own}")]);
        assert_close(&name, &found.to_dtype(DType::F32).unwrap(), &expected, 1e-6);
    }
    let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let record = record["adapter"][0].as_table().unwrap();
    let names: Vec<&str> = record["file"].as_array().unwrap().iter().filter_map(|file| file["name"].as_str()).collect();
    assert_eq!(record["name"].as_str(), Some("flux"));
    assert_eq!(
        names,
        [
            "text_encoder/adapter_config.json",
            "text_encoder_2/adapter_model.safetensors",
            "text_encoder_2/adapter_config.json",
            "transformer/adapter_model.safetensors",
            "transformer/adapter_config.json",
        ]
    );
    let message = refused(text(&adapter.join("text_encoder")), &[]);
    assert!(message.contains("text_encoder: applied 0 of 2 tensors"), "{message}");
    // Of a folder with all components `forward` applies the transformer's part, wherever its strengths fit.
    let half = format!("{}:0.5:double=1,norm_out=0.5", text(&adapter));
    let (_, message) = forward(tiny.path(), &lora_inputs(), &["--lora", &half]);
    assert!(message.contains("applied 4 of 8 tensors to 2 modules"), "{message}");
    assert!(
        message.contains("\"text_encoder/base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight\""),
        "{message}"
    );
}

#[test]
fn adapters_of_any_kind_find_their_plugin() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let path = folder.path().join("scale.safetensors");
    let twice = Tensor::full(2f32, 16, &Device::Cpu).unwrap();
    let scales = ["proj_out.weight", "final_layer.linear.bias"];
    let tensors = scales.map(|name| (format!("{name}.channel_scale"), twice.clone()));
    candle_core::safetensors::save(&HashMap::from(tensors), &path).unwrap();
    let plain = forward(tiny.path(), &lora_inputs(), &[]).0;
    let (sample, message) = forward(tiny.path(), &lora_inputs(), &["--adapter", text(&path)]);
    assert_close("twice", &sample, &(plain * 2.0).unwrap(), 1e-6);
    assert!(message.contains("applied 2 of 2 tensors to 2 modules"), "{message}");
}

#[test]
fn controlnets_agree_with_diffusers() {
    let fixtures = repository("tests/fixtures/controlnet");
    let model = tempfile::tempdir().unwrap();
    std::fs::copy(fixtures.join("base/config.json"), model.path().join("config.json")).unwrap();
    let weights = model.path().join("diffusion_pytorch_model.safetensors");
    std::fs::copy(fixtures.join("base/weights.safetensors"), weights).unwrap();
    let inputs: HashMap<_, _> = fixture(fixtures.join("input.safetensors")).into_iter().collect();
    let controlnet = |name: &str| text(&fixtures.join(name)).to_owned();
    let expected = fixture(fixtures.join("expected.safetensors"));
    let check = |more: &[&str], name: &str| {
        assert_close(name, &forward(model.path(), &inputs, more).0, &expected[&format!("{name}/sample")], 2e-5);
    };
    let weaker = format!("{}:0.6", controlnet("one-two"));
    check(&["--controlnet", &weaker], "one-two@0.6/full-full");
    let linear =
        ["--controlnet", &controlnet("two-two"), "--attention", "clear:r=3", "--controlnet-attention", "clear:r=3"];
    check(&linear, "two-two/r3-r3");
    let union = format!("{},mode=2", controlnet("union"));
    check(&["--controlnet", &union], "union/full-full");
    let two = [format!("{}:0.7", controlnet("one-two")), format!("{}:0.5", controlnet("two-two"))];
    check(&["--controlnet", &two[0], "--controlnet", &two[1]], "multi/full-full");
}

/// A merged LoRA is part of the model: the same sample without it, and its name in the record.
#[test]
fn convert_merges_a_lora() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let (model, plugins) = (folder.path().join("model"), plugins());
    let components = repository("tests/fixtures/components/generation4");
    let adapter = lora("kohya_te");
    let convert = ["convert", text(tiny.path()), "-o", text(&model), "--attention", "full", "--no-distill"];
    let more = ["--lora", &adapter, "--plugin-dir", &plugins, "--components", text(&components)];
    let message = stderr_of(0, &[&convert[..], &more].concat());
    assert!(message.contains("applied 57 of 57 tensors to 19 modules"), "{message}");
    run(0, &["verify", text(&model)]);
    let sample = forward(&model, &lora_inputs(), &[]).0;
    assert_close("merged", &sample, &expected_lora("kohya_te"), 2e-5);
    let record = std::fs::read_to_string(model.join("clearform.toml")).unwrap();
    assert!(record.contains("[[adapter]]") && record.contains("kohya_te.safetensors"), "{record}");
    let name = "text_model.encoder.layers.0.self_attn.q_proj.weight";
    let merged = encoder(&model)[name].clone();
    let stored = encoder(&components)[name].clone();
    let factor = |name: &str| fixture(&adapter)[name].to_dtype(DType::F32).unwrap();
    let module = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj";
    let down = factor(&format!("{module}.lora_down.weight"));
    let up = factor(&format!("{module}.lora_up.weight"));
    let scale = f64::from(factor(&format!("{module}.alpha")).to_scalar::<f32>().unwrap()) / down.dims()[0] as f64;
    let wanted = (stored.to_dtype(DType::F32).unwrap() + (up.matmul(&down).unwrap() * scale).unwrap()).unwrap();
    assert_close("text encoder", &merged.to_dtype(DType::F32).unwrap(), &wanted, 1e-6);
}

/// The record of a merged adapter has the hash of every file that decides what it does, and strengths by block.
#[test]
fn the_record_of_a_merged_adapter_is_complete() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let (adapter, model, plugins) = (folder.path().join("style"), folder.path().join("model"), plugins());
    std::fs::create_dir(&adapter).unwrap();
    let shards = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"];
    let stored = fixture(repository("tests/fixtures/lora/users/peft-folder-alpha/adapter_model.safetensors"));
    let mut weight_map = serde_json::Map::new();
    for (shard, module) in shards.iter().zip([".to_q.", ".proj_out."]) {
        let tensors = stored.iter().filter(|(name, _)| name.contains(module));
        let tensors: HashMap<_, _> = tensors.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        weight_map.extend(tensors.keys().map(|name| (name.clone(), (*shard).into())));
        candle_core::safetensors::save(&tensors, adapter.join(shard)).unwrap();
    }
    let index = adapter.join("adapter_model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({"weight_map": weight_map}).to_string()).unwrap();
    let config = repository("tests/fixtures/lora/users/peft-folder-alpha/adapter_config.json");
    std::fs::copy(config, adapter.join("adapter_config.json")).unwrap();
    let given = format!("{}:0.5:double=1,single=0.25", text(&index));
    let convert = ["convert", text(tiny.path()), "-o", text(&model), "--attention", "full", "--no-distill"];
    run(0, &[&convert[..], &["--lora", &given, "--plugin-dir", &plugins]].concat());
    let record: toml::Table = std::fs::read_to_string(model.join("clearform.toml")).unwrap().parse().unwrap();
    let record = record["adapter"][0].as_table().unwrap();
    assert_eq!(record["strength"].as_float(), Some(0.5));
    let blocks = record["blocks"].as_table().unwrap();
    assert_eq!((blocks["double"].as_float(), blocks["single"].as_float()), (Some(1.0), Some(0.25)));
    let digest = |name: &str| clearform_weights::digest(adapter.join(name)).unwrap().sha256;
    assert_eq!(record["sha256"].as_str(), Some(digest(shards[0]).as_str()));
    let further = record["file"].as_array().unwrap();
    for (file, name) in further.iter().zip([shards[1], "adapter_config.json"]) {
        assert_eq!((file["name"].as_str(), file["sha256"].as_str()), (Some(name), Some(digest(name).as_str())));
    }
    assert_eq!(further.len(), 2);
}

fn encoder(model: &Path) -> std::collections::BTreeMap<String, Tensor> {
    fixture(model.join("text_encoder/model.safetensors"))
}

/// Files that no trainer writes: each is refused with a message, and nothing is written.
#[test]
fn damaged_adapters_are_refused_with_a_message() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    let (input, output, adapter) = (path("in.safetensors"), path("out.safetensors"), path("adapter.safetensors"));
    candle_core::safetensors::save(&lora_inputs(), &input).unwrap();
    type Case<'a> = (&'a [(&'a str, &'a [usize])], &'a str);
    let cases: [Case; 13] = [
        (&[("proj_out.lora_A.weight", &[2, 48])], "the factor that belongs to it is missing from the file"),
        (
            &[("proj_out.lora_A.weight", &[2, 48]), ("proj_out.lora_B.weight", &[16, 3])],
            "\"proj_out.lora_A.weight\" [2, 48], \"proj_out.lora_B.weight\" [16, 3]",
        ),
        (&[("proj_out.lora_A.weight", &[0, 48]), ("proj_out.lora_B.weight", &[16, 0])], "have rank 0"),
        (&[("proj_out.lora_A.weight", &[48]), ("proj_out.lora_B.weight", &[16])], "its factors do not fit together"),
        (&[("proj_out.lora_A.weight", &[]), ("proj_out.lora_B.weight", &[])], "1 x 1"),
        (
            &[("proj_out.lora_A.weight", &[2, 48]), ("proj_out.lora_B.weight", &[16, 2]), ("proj_out.alpha", &[2])],
            "expected one finite value",
        ),
        // A module that takes no control image is not widened, and one that does only by as many channels as it has.
        (&[("proj_out.lora_A.weight", &[2, 96]), ("proj_out.lora_B.weight", &[16, 2])], "expected 16 x 48 for"),
        (
            &[("x_embedder.lora_A.weight", &[2, 20]), ("x_embedder.lora_B.weight", &[48, 2])],
            "expected 48 x 16 (or 32 with a control image) for \"x_embedder.weight\", found 48 x 20",
        ),
        (
            &[("proj_out.hada_w1_a", &[16, 2]), ("proj_out.hada_w1_b", &[2, 48])],
            "only one of the two products of a LoHa",
        ),
        (
            &[
                ("proj_out.hada_w1_a", &[16, 2]),
                ("proj_out.hada_w1_b", &[3, 48]),
                ("proj_out.hada_w2_a", &[16, 2]),
                ("proj_out.hada_w2_b", &[2, 48]),
            ],
            "its factors do not fit together",
        ),
        (&[("proj_out.lokr_w1", &[4, 4])], "only one of the two factors of a LoKr"),
        (&[("proj_out.lokr_w1", &[0, 4]), ("proj_out.lokr_w2", &[4, 12])], "0 x 48"),
        (
            &[("proj_out.lora_A.weight", &[2, 48]), ("transformer.proj_out.lora_A.weight", &[2, 48])],
            "are the same tensor of one module",
        ),
    ];
    for (tensors, expected) in cases {
        let made = tensors
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), Tensor::ones(*shape, DType::F32, &Device::Cpu).unwrap()));
        candle_core::safetensors::save(&made.collect::<HashMap<_, _>>(), &adapter).unwrap();
        let plugins = plugins();
        let arguments = ["forward", text(tiny.path()), "--inputs", text(&input), "-o", text(&output), "--overwrite"];
        let message = stderr_of(1, &[&arguments[..], &["--plugin-dir", &plugins, "--lora", text(&adapter)]].concat());
        assert!(message.contains(expected), "{tensors:?}: {message}");
        assert!(!message.contains("panicked") && !output.exists(), "{tensors:?}: {message}");
    }
}

/// A plugin that writes to a file when it is loaded shows how often that was.
#[test]
fn plugins_are_loaded_only_for_their_adapters() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    let (folder, log, adapter) = (path("plugins"), path("log"), path("scale.safetensors"));
    std::fs::create_dir(&folder).unwrap();
    compile_logging_plugin(&folder, &log);
    let factors = Tensor::full(2f32, 16, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("proj_out.weight.c_scale", factors)]), &adapter).unwrap();
    let more = |more: &[&str]| forward(tiny.path(), &lora_inputs(), &[&["--plugin-dir", text(&folder)], more].concat());

    run(0, &["plugins", "list", "--plugin-dir", text(&folder)]);
    run(1, &["inspect", text(&adapter)]);
    more(&[]);
    more(&["--lora", &lora("kohya")]);
    let (input, output) = (path("in.safetensors"), path("out.safetensors"));
    candle_core::safetensors::save(&lora_inputs(), &input).unwrap();
    let refused = ["forward", text(tiny.path()), "--inputs", text(&input), "-o", text(&output), "--overwrite"];
    let off = ["--plugin-dir", text(&folder), "--no-plugins", "--adapter", text(&adapter)];
    assert!(stderr_of(1, &[&refused[..], &off].concat()).contains("--no-plugins"));
    assert!(!log.exists());
    let (_, message) = more(&["--adapter", text(&adapter)]);
    assert!(message.contains("applied 1 of 1 tensors"), "{message}");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "loaded\n");
}

fn compile_logging_plugin(folder: &Path, log: &Path) {
    let library = folder.join(format!("libscale.{}", std::env::consts::DLL_EXTENSION));
    let define = format!("-DTRACE=\"{}\"", text(log));
    let (include, source) = (repository("crates/plugin-abi/include"), repository("tests/abi/scale.c"));
    let arguments = ["-shared", "-fPIC", "-I", text(&include), &define, text(&source), "-o", text(&library)];
    assert!(std::process::Command::new("cc").args(arguments).status().unwrap().success());
}

/// The teacher with a LoRA trained by peft and a ControlNet trained by diffusers.
#[test]
fn generate_applies_adapters() {
    let (assets, folder) = (repository("assets/mini-flux"), tempfile::tempdir().unwrap());
    let (base, lora, controlnet) = (assets.join("base"), assets.join("lora"), assets.join("controlnet"));
    let plugins = plugins();
    let generate = |name: &str, more: &[&str]| {
        let output = folder.path().join(name);
        let arguments = ["generate", text(&base), "hedgehog", "--steps", "4", "-o", text(&output), "--seed", "3"];
        run(0, &[&arguments[..], &["--plugin-dir", &plugins], more].concat());
        image::open(&output).unwrap().to_rgb8()
    };
    let plain = generate("plain.png", &[]);
    let styled = generate("styled.png", &["--lora", text(&lora)]);
    // The LoRA's style is chalk on a dark board.
    assert!(brightness(&plain) > brightness(&styled) + 60.0, "{} {}", brightness(&plain), brightness(&styled));
    let edges =
        image::RgbImage::from_fn(128, 128, |x, y| image::Rgb([if (x / 4 + y / 4) % 8 == 0 { 255 } else { 0 }; 3]));
    let image = folder.path().join("edges.png");
    edges.save(&image).unwrap();
    let controlled = generate("controlled.png", &["--controlnet", text(&controlnet), "--control-image", text(&image)]);
    let late = format!("{}:start=0.99", text(&controlnet));
    let untouched = generate("late.png", &["--controlnet", &late, "--control-image", text(&image)]);
    assert_ne!(plain, controlled);
    assert_eq!(plain, untouched);
    let missing = ["generate", text(&base), "hedgehog", "--plugin-dir", &plugins, "--controlnet", text(&controlnet)];
    assert!(stderr_of(1, &missing).contains("--control-image"));
}

/// A LoRA that widens the input makes the model take a control image; if its new columns are zero, the image has no
/// effect.
#[test]
fn generate_applies_a_control_lora() {
    let (base, folder) = (repository("assets/mini-flux/base"), tempfile::tempdir().unwrap());
    let plugins = plugins();
    let path = |name: &str| folder.path().join(name);
    let write = |name: &str, new: f64| {
        let latents = Tensor::full(0.02f32, (2, 16), &Device::Cpu).unwrap();
        let up = Tensor::full(0.05f32, (192, 2), &Device::Cpu).unwrap();
        let new = (Tensor::ones((2, 16), DType::F32, &Device::Cpu).unwrap() * new).unwrap();
        let down = Tensor::cat(&[&latents, &new], 1).unwrap();
        let tensors = HashMap::from([("img_in.lora_A.weight", down), ("img_in.lora_B.weight", up)]);
        candle_core::safetensors::save(&tensors, path(name)).unwrap();
    };
    write("blind", 0.0);
    write("seeing", 0.3);
    for (name, shade) in [("black.png", 0), ("white.png", 255)] {
        image::RgbImage::from_pixel(64, 64, image::Rgb([shade; 3])).save(path(name)).unwrap();
    }
    let generate = |lora: &str, more: &[&str]| {
        let (output, lora) = (path("out.png"), path(lora));
        let arguments = [
            "generate",
            text(&base),
            "hedgehog",
            "--steps",
            "2",
            "-o",
            text(&output),
            "--lora",
            text(&lora),
            "--overwrite",
        ];
        let done = clearform(&[&arguments[..], &["--plugin-dir", &plugins], more].concat()).output().unwrap();
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        done.status.success().then(|| image::open(&output).unwrap().to_rgb8()).ok_or(message)
    };
    let (black, white) = (text(&path("black.png")).to_owned(), text(&path("white.png")).to_owned());
    let controlled = |lora: &str, image: &str| generate(lora, &["--control-image", image]).unwrap();
    assert_eq!(controlled("blind", &black), controlled("blind", &white));
    assert_ne!(controlled("seeing", &black), controlled("seeing", &white));
    let message = generate("seeing", &[]).unwrap_err();
    assert!(message.contains("the transformer takes one, found none; pass --control-image FILE"), "{message}");
}

fn brightness(image: &image::RgbImage) -> f64 {
    image.as_raw().iter().map(|byte| f64::from(*byte)).sum::<f64>() / image.as_raw().len() as f64
}

/// The distilled attention of a base is applied to a variant without a guidance embedding, from a file as CLEAR
/// publishes them: no metadata, the plan in the file name.
#[test]
fn a_published_patch_fits_a_sibling_variant() {
    let (mut sibling, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    sibling.tensors.retain(|name, _| !name.contains("guidance_embedder"));
    sibling.save();
    let config = std::fs::read_to_string(sibling.path().join("config.json")).unwrap();
    let config = config.replace("\"guidance_embeds\": true", "\"guidance_embeds\": false");
    std::fs::write(sibling.path().join("config.json"), config).unwrap();

    let distilled = [".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out."];
    let attention =
        Tiny::new().tensors.into_iter().filter(|(name, _)| distilled.iter().any(|layer| name.contains(layer)));
    let mut patch: HashMap<String, Tensor> = attention.map(|(name, tensor)| (name, (tensor * 1.5).unwrap())).collect();
    for layer in ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"] {
        let pool = Tensor::full(0.25f32, &[1, 1, 1, 2, 1, 2, 1], &Device::Cpu).unwrap();
        patch.insert(format!("{layer}.attn.processor.spatial_weight"), pool);
    }
    let file = folder.path().join("clear_local_3_down_2.safetensors");
    candle_core::safetensors::save(&patch, &file).unwrap();
    let model = folder.path().join("model");
    let written = json(0, &["patch", "apply", text(&file), "--to", text(sibling.path()), "-o", text(&model)]);
    assert_eq!(written["attention"], "clear:r=3,d=2");
    let stored = fixture(model.join("transformer/diffusion_pytorch_model.safetensors"));
    for (name, tensor) in &patch {
        assert_close(name, &stored[name], tensor, 0.0);
    }
    let mut inputs = lora_inputs();
    inputs.remove("guidance");
    let patched = forward(&model, &inputs, &[]).0;
    // The same tensors in the sibling itself; pooling that averages is what a model without pooling tensors gets.
    let attention = patch.into_iter().filter(|(name, _)| !name.ends_with("spatial_weight"));
    sibling.tensors.extend(attention);
    sibling.save();
    let plan = ["--attention", "clear:r=3,d=2"];
    assert_close("patched", &patched, &forward(sibling.path(), &inputs, &plan).0, 0.0);
}
