//! Settings: those without effect are said and not recorded, and images carry those that they were made with.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Device;
use clearform::VaePrecision;
use clearform_runtime::GenerationParameters;
use clearform_runtime::image_file::read_parameters;
use clearform_testkit::assemble_pipeline;
use clearform_weights::{Checkpoint, TensorInfo, TensorSource as _};
use common::{Tiny, copy_folder, json, repository, run, stderr_of, text};
use std::path::Path;

const BASE: &str = "assets/mini-flux/base";

/// As few computations as an image takes.
const QUICK: [&str; 6] = ["--width", "64", "--height", "64", "--steps", "1"];

/// Generates an image with mini-flux; what is said, and the image's parameters.
fn generated(folder: &Path, more: &[&str]) -> (String, GenerationParameters) {
    let image = folder.join("out.png");
    let base = repository(BASE);
    let arguments = ["generate", text(&base), "cat face", "--overwrite", "-o", text(&image)];
    let said = stderr_of(0, &[&arguments, &QUICK[..], more].concat());
    (said, read_parameters(&image).unwrap())
}

#[test]
fn settings_without_effect_are_said_and_not_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &[&str]); 10] = [
        (&[], &[]),
        (&["--guidance", "5"], &["--guidance has no effect: this model takes no guidance scale"]),
        (&["--negative-prompt", "dog"], &["--negative-prompt has no effect with --true-cfg-scale 1"]),
        (&["--true-cfg-scale", "4"], &["--true-cfg-scale 4 has no effect without --negative-prompt"]),
        (&["--lora-apply-mode", "immediately"], &["--lora-apply-mode has no effect without --lora"]),
        (&["--controlnet-attention", "clear:r=4"], &["--controlnet-attention has no effect without --controlnet"]),
        (&["--allow-partial"], &["--allow-partial has no effect without --lora"]),
        (&["--no-resolution-binning"], &["--no-resolution-binning has no effect"]),
        (&["--attention", "clear:r=3"], &["it was not distilled for clear:r=3"]),
        (&["--attention", "clear:r=1e9"], &["covers the whole image"]),
    ];
    for (more, expected) in cases {
        let (said, recorded) = generated(folder.path(), more);
        assert_eq!(said.lines().count(), expected.len(), "{more:?}: {said}");
        assert!(expected.iter().all(|expected| said.contains(expected)), "{more:?}: {said}");
        assert_eq!((recorded.guidance, recorded.true_cfg_scale), (None, Some(1.0)), "{more:?}");
        assert_eq!(recorded.negative_prompt, "", "{more:?}");
    }
    let (said, recorded) = generated(folder.path(), &["--negative-prompt", "dog", "--true-cfg-scale", "4"]);
    assert_eq!(said, "");
    assert_eq!((recorded.negative_prompt.as_str(), recorded.true_cfg_scale), ("dog", Some(4.0)));
}

/// Families with classifier-free guidance.
#[test]
fn guidance_that_is_off_is_said() {
    for family in ["dit", "pixart", "sd3"] {
        let folder = tempfile::tempdir().unwrap();
        let (model, image) = (folder.path().join("model"), folder.path().join("out.png"));
        assemble_pipeline(&repository(""), family, &model);
        let (prompt, off): (&[&str], &[&str]) = match family {
            "dit" => (&["--class", "3"], &["--guided-channels", "3"]),
            _ => (&["a red apple"], &["--negative-prompt", "a cat"]),
        };
        let generate = |guidance: &str| {
            let arguments = ["generate", text(&model), "--steps", "1", "--overwrite", "-o", text(&image)];
            let said = stderr_of(0, &[&arguments, prompt, off, &["--guidance", guidance]].concat());
            (said, read_parameters(&image).unwrap())
        };
        let (said, recorded) = generate("1");
        assert!(said.contains(&format!("{} has no effect", off[0])), "{family}: {said}");
        assert_eq!((recorded.guidance, recorded.negative_prompt.as_str()), (Some(1.0), ""), "{family}");
        let (said, recorded) = generate("4");
        assert!(!said.contains("has no effect"), "{family}: {said}");
        assert_eq!((recorded.guidance, recorded.true_cfg_scale), (Some(4.0), None), "{family}");
    }
}

/// mini-flux's encoders take 16 tokens. CLIP marks start and end of a prompt, T5 its end.
#[test]
fn cut_prompts_are_told_with_counts() {
    let folder = tempfile::tempdir().unwrap();
    let base = repository(BASE);
    let generate = |words: usize| {
        let prompt = vec!["cat"; words].join(" ");
        let image = folder.path().join("out.png");
        let arguments = ["generate", text(&base), &prompt, "--overwrite", "-o", text(&image)];
        stderr_of(0, &[&arguments, &QUICK[..]].concat())
    };
    // Two tokens for each word, as transformers' tokenizers count too.
    assert_eq!(generate(7), "");
    for words in [8, 20] {
        let said = generate(words);
        for (encoder, marks) in [("text_encoder (CLIPTextModel)", 2), ("text_encoder_2 (T5EncoderModel)", 1)] {
            let tokens = 2 * words + marks;
            let line = said.lines().find(|line| line.starts_with(encoder)).unwrap();
            assert!(line.contains(&format!("has {tokens}: the last {} are cut", tokens - 16)), "{line}");
        }
    }
}

#[test]
fn images_are_written_as_their_names_say_and_generated_again_from_their_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let base = repository(BASE);
    let path = |name: &str| folder.path().join(name);
    let pixels = |name: &str| image::load_from_memory(&std::fs::read(path(name)).unwrap()).unwrap().to_rgb8();
    let settings = [&QUICK[..], &["--seed", "7", "--attention", "clear:r=2"]].concat();
    let starts: [(&str, &[u8]); 3] = [("a.png", b"\x89PNG"), ("new/b.jpg", b"\xff\xd8"), ("c.webp", b"RIFF")];
    for (name, start) in starts {
        run(0, &[&["generate", text(&base), "cat face", "-o", text(&path(name))], &settings[..]].concat());
        assert!(std::fs::read(path(name)).unwrap().starts_with(start), "{name}");
        let again = path(&format!("again-{}.png", &name[name.len() - 3..]));
        run(0, &["generate", text(&base), "--from-metadata", text(&path(name)), "-o", text(&again)]);
        assert_eq!(image::open(&again).unwrap().to_rgb8(), pixels("a.png"), "{name}");
    }
    assert_eq!(pixels("c.webp"), pixels("a.png"));
    // What is given counts more.
    let (first, other) = (path("a.png"), path("other.png"));
    let arguments = ["generate", text(&base), "--from-metadata", text(&first), "--seed", "8", "-o", text(&other)];
    assert_eq!(json(0, &arguments)["seed"], 8);
    assert_ne!(pixels("other.png"), pixels("a.png"));
}

/// Before anything is computed: the model does not even exist.
#[test]
fn outputs_that_cannot_be_written_are_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |output: &str| stderr_of(1, &["generate", "no-model", "a cat", "-o", output]);
    assert!(refused("-").contains("-o -: results are written to files"));
    let directory = text(folder.path()).to_owned();
    for name in ["out", "out.gif", "out.png.bak"] {
        let said = refused(&format!("{directory}/{name}"));
        assert!(said.contains("expected a file name that ends in .png, .jpg, .jpeg or .webp"), "{said}");
    }
    for name in ["", "new/"] {
        let said = refused(&format!("{directory}/{name}"));
        assert!(said.contains("is a folder; expected a file name, such as") && said.contains("out.png"), "{said}");
    }
    let said = refused("/sys/clearform/out.png");
    assert!(said.contains("/sys/clearform"), "{said}");
    let forward = ["forward", "no-model", "--inputs", "none", "-o"];
    let said = stderr_of(1, &[&forward[..], &["/sys/clearform/out.safetensors"]].concat());
    assert!(said.contains("/sys/clearform"), "{said}");
    for folder in [directory.clone(), format!("{directory}/new/")] {
        let said = stderr_of(1, &[&forward[..], &[&folder]].concat());
        assert!(said.contains("is a folder; expected a file name"), "{said}");
    }
    let said = stderr_of(1, &["compare", "no-model", "no-model", "-o", "/sys/clearform"]);
    assert!(said.contains("/sys/clearform"), "{said}");
}

#[test]
fn a_failed_command_leaves_no_empty_folders() {
    let folder = tempfile::tempdir().unwrap();
    let output = |name: &str| text(&folder.path().join("new/folder").join(name)).to_owned();
    let (image, report, tensors) = (output("out.png"), output("report"), output("out.safetensors"));
    for arguments in [
        ["generate", "no-model", "a cat", "-o", &image],
        ["compare", "no-model", "no-model", "-o", &report],
        ["transfer", "no-model", "no-model", "-o", &report],
        ["export", "no-model", "--to=bfl", "-o", &tensors],
    ] {
        stderr_of(1, &arguments);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{arguments:?}");
    }
}

/// A class, a prompt in the model's place, and what will not be measured or learnt.
#[test]
fn settings_that_cannot_be_meant_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (dit, flux) = (repository("assets/mini-dit/model"), repository(BASE));
    let path = |name: &str| text(&folder.path().join(name)).to_owned();
    let (image, model, classes, lora) = (path("out.png"), path("model"), path("classes.txt"), path("vae.safetensors"));
    let damaged = path("damaged.safetensors");
    let [down, up] = [[4usize, 192], [192, 4]].map(|shape| {
        (candle_core::Tensor::ones(&shape, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap() * f64::NAN)
            .unwrap()
    });
    let module = "transformer.transformer_blocks.0.attn.to_q";
    let factors = [(format!("{module}.lora_A.weight"), down), (format!("{module}.lora_B.weight"), up)];
    candle_core::safetensors::save(&factors.into_iter().collect(), &damaged).unwrap();
    std::fs::write(&classes, "3\n10\n").unwrap();
    std::fs::copy(flux.join("vae/diffusion_pytorch_model.safetensors"), &lora).unwrap();
    let convert = ["convert", text(&dit), "-o", &model, "--radius", "4", "--dry-run"];
    let cases: [(&[&str], &str); 17] = [
        (&["generate", text(&dit), "--class", "10", "-o", &image], "class: expected 0 to 9, found 10"),
        (&["generate", "a cat", text(&flux), "-o", &image], "the model comes before the prompt"),
        (
            &[&convert[..], &["--prompts", &classes]].concat(),
            "expected class indices of 0 to 9, one per line, found \"10\"",
        ),
        (&[&convert[..], &["--prompts", "none.txt"]].concat(), "none.txt"),
        (&[&convert[..], &["--losses", "0,0,0"]].concat(), "--losses: expected weights of 0 or more"),
        (&[&convert[..], &["--held-out", "100000000000"]].concat(), "--held-out: expected at most 1000000"),
        (&[&convert[..], &["--require-error", "0.1", "--held-out", "0"]].concat(), "but --held-out is 0"),
        (&["generate", text(&flux), "a cat", "--lora", &lora, "-o", &image], "the file is a VAE"),
        (&[&convert[..], &["--pool", "1"]].concat(), "is not an integer from 2 to 256"),
        (&["convert", text(&dit), "-o", &model, "--pool", "300", "--no-distill"], "is not an integer from 2 to 256"),
        (&["generate", text(&flux), "a cat", "-o", &path("%70000d.png")], "expected a number pattern such as %03d"),
        (&[&convert[..], &["--prompts", "/dev/zero"]].concat(), "/dev/zero: not a regular file"),
        (&["generate", text(&flux), "--from-metadata", "/dev/zero", "-o", &image], "/dev/zero: not a regular file"),
        (&["generate", text(&flux), "a cat", "--lora", &damaged, "-o", &image], "have NaN or infinity"),
        (&["generate", text(&flux), "a cat", "--steps", "1000000000000", "-o", &image], "steps: expected 1 to 100000"),
        (
            &["generate", text(&dit), "--class", "3", "--negative-prompt", "x", "-o", &image],
            "takes no text; leave it out",
        ),
        (&["bench", "model", text(&dit), "--text", "4"], "--text 4: the model takes no text"),
    ];
    for (arguments, expected) in cases {
        let said = stderr_of(1, arguments);
        assert!(said.contains(expected), "{arguments:?}: {said}");
        let shown = run(1, arguments).stdout;
        assert!(shown.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&shown));
    }
}

#[test]
fn images_that_exist_are_kept_unless_overwrite_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let base = repository(BASE);
    let image = folder.path().join("out.png");
    let arguments = [&["generate", text(&base), "cat face", "-o", text(&image)], &QUICK[..]].concat();
    let saved = |more: &[&str]| json(0, &[&arguments[..], more].concat())["pictures"].clone();
    let expected = |names: &[&str]| -> serde_json::Value {
        names.iter().map(|name| serde_json::Value::from(text(&folder.path().join(name)))).collect()
    };
    assert_eq!(saved(&[]), expected(&["out.png"]));
    let first = std::fs::read(&image).unwrap();
    assert_eq!(saved(&["--seed", "1"]), expected(&["out-001.png"]));
    assert_eq!(std::fs::read(&image).unwrap(), first);
    assert_eq!(saved(&["--seed", "1", "--batch", "2"]), expected(&["out-002.png", "out-003.png"]));
    assert_eq!(saved(&["--seed", "1", "--overwrite"]), expected(&["out.png"]));
    assert_ne!(std::fs::read(&image).unwrap(), first);
    // The name is announced when the image is certain to be made.
    let announced = |code, more: &[&str]| stderr_of(code, &[&arguments[..], more].concat());
    assert!(announced(0, &[]).contains("out.png exists, so the image is"));
    for (model, more) in [(text(&base), &["--control-image", text(&image)][..]), ("no-model", &[])] {
        let arguments = [&["generate", model, "cat", "-o", text(&image)], &QUICK[..], more].concat();
        assert!(!stderr_of(1, &arguments).contains("exists, so the image is"));
    }
}

#[test]
fn a_random_seed_is_printed_and_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let (said, recorded) = generated(folder.path(), &["--seed", "random"]);
    assert_eq!(said.trim(), format!("seed {}", recorded.seed));
}

#[test]
fn a_control_image_of_another_shape_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let edges = folder.path().join("edges.png");
    let mut control = image::RgbImage::new(128, 64);
    control.put_pixel(3, 3, image::Rgb([255; 3]));
    control.save(&edges).unwrap();
    let controlnet = repository("assets/mini-flux/controlnet");
    let (said, _) = generated(folder.path(), &["--controlnet", text(&controlnet), "--control-image", text(&edges)]);
    assert!(said.contains("edges.png: 128 x 64 px, but the image has 64 x 64; it is resized"), "{said}");
    let photograph = folder.path().join("edges.jpg");
    control.save(&photograph).unwrap();
    let bytes = std::fs::read(&photograph).unwrap();
    std::fs::write(&photograph, &bytes[..bytes.len() / 2]).unwrap();
    let common = ["generate", text(&repository(BASE)), "cat", "--controlnet", text(&controlnet)].map(str::to_owned);
    let common: Vec<&str> = common.iter().map(String::as_str).collect();
    let said = stderr_of(1, &[&common[..], &["--control-image", text(&photograph)]].concat());
    assert!(said.contains("edges.jpg: the image is cut short"), "{said}");
}

#[test]
fn comments_in_a_prompts_file_are_no_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let (base, prompts) = (repository(BASE), folder.path().join("prompts.txt"));
    std::fs::write(&prompts, "# animals\ncat face\n\n  # and\n hedgehog \n").unwrap();
    let report = folder.path().join("report");
    let arguments = ["compare", text(&base), text(&base), "--prompts", text(&prompts), "-o", text(&report)];
    let found = json(0, &[&arguments[..], &["--size", "64", "--steps", "1"]].concat());
    let names: Vec<&str> =
        found["pictures"].as_array().unwrap().iter().map(|pair| pair["prompt"].as_str().unwrap()).collect();
    assert_eq!(names, ["cat face", "hedgehog"]);
    std::fs::write(&prompts, "# nothing\n").unwrap();
    let said = stderr_of(1, &[&arguments[..], &["--overwrite"]].concat());
    assert!(said.contains("expected prompts, one per line, found none"), "{said}");
}

#[test]
fn numbers_out_of_range_are_wrong_usage() {
    for wrong in [["--threads", "0"], ["--guidance", "nan"], ["--true-cfg-scale", "inf"], ["--seed", "-1"]] {
        run(2, &[&["generate", "model", "a cat"], &wrong[..]].concat());
    }
    for wrong in [["--losses", "1,x,0.5,0.5"], ["--lr", "nan"], ["--radius", "inf"]] {
        run(2, &[&["convert", "a", "-o", "b"], &wrong[..]].concat());
    }
}

/// What would be ignored beside another flag.
#[test]
fn flags_that_exclude_each_other_are_refused() {
    let cases: [&[&str]; 4] = [
        &["convert", "a", "-o", "b", "--no-distill", "--lora-apply-mode", "immediately"],
        &["convert", "a", "-o", "b", "--no-distill", "--device", "cpu"],
        &["bench", "attention", "--radius", "4", "--attention", "full"],
        &["bench", "model", "a", "--format", "q8_0"],
    ];
    for arguments in cases {
        let said = stderr_of(2, arguments);
        assert!(said.contains("cannot be used with"), "{said}");
    }
    let said = stderr_of(2, &["distill", "a", "--teacher", "b", "--resume"]);
    assert!(said.contains("<--output <DIR>|--overwrite>"), "{said}");
}

/// A model converted without its pipeline is compared with the teacher's parts.
#[test]
fn compare_takes_the_teachers_parts() {
    let folder = tempfile::tempdir().unwrap();
    let (base, student, report) = (repository(BASE), folder.path().join("student"), folder.path().join("report"));
    let transformer = base.join("transformer");
    run(0, &["convert", text(&transformer), "-o", text(&student), "--radius", "2", "--no-distill"]);
    assert!(!student.join("scheduler").exists());
    let size = ["--size", "64", "--steps", "1"];
    let compare = ["compare", text(&base), text(&student), "-o", text(&report)];
    let printed = run(0, &[&compare[..], &size].concat());
    let printed = String::from_utf8(printed.stdout).unwrap();
    // Its weights are the teacher's, so it draws what the teacher draws with this attention.
    assert!(printed.contains("undistilled") && printed.contains("The student"), "{printed}");
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(report.join("report.json")).unwrap()).unwrap();
    assert_eq!(found["undistilled"][0], found["psnr"]);
    assert_eq!((&found["teacher"]["attention"], &found["student"]["attention"]), (&"full".into(), &"clear:r=2".into()));
    let page = std::fs::read_to_string(report.join("report.html")).unwrap();
    for expected in ["teacher: base", "student: student", "s per image", "64 x 64 px", "PSNR is"] {
        assert!(page.contains(expected), "{expected}");
    }
}

#[test]
fn a_linear_model_is_no_teacher() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let path = |name: &str| folder.path().join(name);
    let (linear, again) = (path("linear"), path("again"));
    run(0, &["convert", text(tiny.path()), "-o", text(&linear), "--radius", "3", "--no-distill"]);
    let convert = ["convert", text(&linear), "-o", text(&again), "--radius", "4"];
    let said = stderr_of(1, &convert);
    assert!(
        said.contains("is a linear model already (attention clear:r=3)") && said.contains("clearform distill"),
        "{said}"
    );
    let said = stderr_of(0, &[&convert[..], &["--no-distill"]].concat());
    assert!(said.contains("its weights are those for attention clear:r=3, not for clear:r=4"), "{said}");
}

/// The variant "custom" is what no published variant fits: there is nothing to say about it.
#[test]
fn the_variant_custom_is_not_asked_for() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let (model, file) = (folder.path().join("model"), folder.path().join("file.safetensors"));
    let said = stderr_of(0, &["convert", text(tiny.path()), "-o", text(&model), "--radius", "3", "--no-distill"]);
    let exported = stderr_of(0, &["export", text(&model), "--to", "bfl", "-o", text(&file)]);
    assert!(!said.contains("variant") && !exported.contains("requested variant"), "{said}{exported}");
    assert_eq!(json(0, &["inspect", text(&model)])["variant"]["name"], "custom");
    let base = repository(BASE);
    let converted = folder.path().join("converted");
    run(0, &["convert", text(&base), "-o", text(&converted), "--radius", "3", "--no-distill"]);
    let image = folder.path().join("out.png");
    let said = stderr_of(0, &[&["generate", text(&converted), "cat face", "-o", text(&image)], &QUICK[..]].concat());
    // It was not distilled, which is all that is said.
    assert!(said.contains("it was not distilled for clear:r=3") && said.lines().count() == 1, "{said}");
}

#[test]
fn places_that_are_no_models_are_named() {
    let said = stderr_of(1, &["verify", text(&repository(BASE))]);
    assert!(said.contains("base: is not a portable model: it has no clearform.toml"), "{said}");
    let said = stderr_of(1, &["inspect", text(&repository("assets/mini-flux"))]);
    assert!(said.contains("the models in it are [\"base\"") && said.contains("give one of them"), "{said}");
    let said = stderr_of(1, &["forward", "no-model", "--inputs", "none", "-o", "none", "--device", "cuda"]);
    assert!(!said.contains("expected cpu"), "{said}");
}

/// With the front matter that hubs read, and what a reader wants to know.
#[test]
fn a_model_has_a_card() {
    let folder = tempfile::tempdir().unwrap();
    let cached = folder.path().join("models--some-body--mini-flux/snapshots/0123");
    copy_folder(&repository(BASE), &cached);
    std::fs::write(cached.join("README.md"), "---\nlicense: apache-2.0\ntags:\n- icons\n---\n# mini-flux\n").unwrap();
    let model = folder.path().join("linear");
    run(0, &["convert", text(&cached), "-o", text(&model), "--radius", "3", "--no-distill"]);
    let card = std::fs::read_to_string(model.join("README.md")).unwrap();
    let (front, text) = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    for line in ["license: apache-2.0", "base_model: some-body/mini-flux", "pipeline_tag: text-to-image", "- clearform"]
    {
        assert!(front.lines().any(|found| found == line), "{line} in {front}");
    }
    for expected in ["`clear:r=3`", "clearform generate", "full attention", "set_attn_processor"] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

/// The files that the guide shows.
#[test]
fn plans_and_manifests_of_the_guide_are_read() {
    let page = std::fs::read_to_string(repository("docs/formats.md")).unwrap();
    let blocks: Vec<&str> = page.split("```toml\n").skip(1).map(|rest| rest.split_once("```").unwrap().0).collect();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file.toml");
    std::fs::write(&file, blocks[0]).unwrap();
    let plan = clearform::parse_plan(text(&file)).unwrap();
    assert_eq!(plan.policy("single_transformer_blocks.37.attn").to_string(), "clear:r=32");
    std::fs::write(&file, blocks[1]).unwrap();
    let tiny = Tiny::new();
    let said = stderr_of(1, &["inspect", text(tiny.path()), "--manifest", text(&file), "--variant", "nothing"]);
    assert!(said.contains("\"my-finetune\"") && said.contains("\"schnell\""), "{said}");
}

/// The table begins with the size of the pipeline: mini-flux draws 128 px with a VAE that reduces them by 4.
#[test]
fn inspect_shows_the_pipeline_around_a_model() {
    let found = json(0, &["inspect", text(&repository(BASE))]);
    assert_eq!([&found["trained_side_pixels"], &found["estimates"][0]["side_pixels"]], [128, 128]);
    assert_eq!(found["estimates"][0]["image_tokens"], 256);
    // Weights in memory: encoders as they are stored, the VAE in f32.
    for (component, file) in
        [("text_encoder", "model"), ("text_encoder_2", "model"), ("vae", "diffusion_pytorch_model")]
    {
        let tensors = Checkpoint::open(repository(BASE).join(component).join(format!("{file}.safetensors"))).unwrap();
        let bytes = |info: &TensorInfo| if component == "vae" { 4 * info.element_count() } else { info.byte_count() };
        let bytes: u64 = tensors.tensors().iter().map(bytes).sum();
        assert_eq!(found["component_bytes"][component], bytes, "{component}");
    }
    // mini-flux takes no guidance scale, and its prompts have 16 tokens.
    assert_eq!((&found["takes_guidance"], &found["estimates"][0]["text_tokens"]), (&false.into(), &16.into()));
    // Columns stay apart, however large their numbers are.
    let printed = String::from_utf8(run(0, &["inspect", text(&repository(BASE))]).stdout).unwrap();
    let rows: Vec<&str> = printed.lines().filter(|line| line.starts_with(' ') && line.contains(" px ")).collect();
    assert!(!rows.is_empty() && rows.iter().all(|row| row.split_whitespace().count() == 12), "{printed}");
    assert!(printed.contains(" steps, 16 text tokens)") && !printed.contains("guidance"), "{printed}");
    let dit = json(0, &["inspect", text(&repository("assets/mini-dit/model"))]);
    assert_eq!(dit["takes_guidance"], true);
}

/// What `inspect` says about a distillation is what `convert` forecasts, for a model of text and one of classes.
#[test]
fn inspect_knows_the_memory_of_a_distillation() {
    let folder = tempfile::tempdir().unwrap();
    for (index, model) in [BASE, "assets/mini-dit/model"].into_iter().enumerate() {
        let (source, target) = (repository(model), folder.path().join(index.to_string()));
        let inspected = ["inspect", text(&source), "--threads", "2"];
        let found = json(0, &inspected)["distillation"].clone();
        let megabytes = found["memory_bytes"].as_u64().unwrap() as f64 / 1e6;
        let convert = ["convert", text(&source), "-o", text(&target), "--radius", "3", "--threads", "2"];
        let short = ["--steps", "1", "--sample-count", "1", "--sample-steps", "1", "--held-out", "0"];
        let said = stderr_of(0, &[&convert[..], &short].concat());
        assert!(said.contains(&format!("; about {megabytes:.0} MB of memory")), "{model}: {found} but {said}");
        let printed = String::from_utf8(run(0, &inspected).stdout).unwrap();
        let line = format!("of memory, with {} samples of {} px per step", found["batch"], found["side_pixels"]);
        assert!(printed.lines().any(|text| text.starts_with("distilling") && text.ends_with(&line)), "{printed}");
    }
}

/// Of many prompts those that are cut are counted, and syntax that other programs take is noted, in every set of
/// prompts.
#[test]
fn prompts_that_are_not_read_as_they_are_written_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let (base, prompts, report) = (repository(BASE), folder.path().join("prompts.txt"), folder.path().join("report"));
    let long = ["cat"; 10].join(" ");
    let several: String = ["a", "b", "c", "d"].map(|last| format!("{long} {last}\n")).concat();
    std::fs::write(&prompts, format!("{several}cat <lora:style:0.8>\na (red:1.2) cat\n")).unwrap();
    let compare = ["compare", text(&base), text(&base), "--prompts", text(&prompts), "-o", text(&report)];
    let model = folder.path().join("model");
    let convert = ["convert", text(&base), "-o", text(&model), "--radius", "3", "--prompts", text(&prompts)];
    let short =
        ["--steps", "1", "--sample-count", "6", "--sample-steps", "1", "--sample-size", "64", "--held-out", "0"];
    for command in [[&compare[..], &["--size", "64", "--steps", "1"]].concat(), [&convert[..], &short].concat()] {
        let said = stderr_of(0, &command);
        for expected in [
            "text_encoder (CLIPTextModel): ",
            "text_encoder_2 (T5EncoderModel): ",
            "prompts are longer than the 16 tokens that it takes; their ends are cut (most: ",
            "1 of 6 prompts has \"<lora:style:0.8>\", read as text: LoRAs are given with --lora FILE:0.8",
            "1 of 6 prompts has \"(red:1.2)\", read as text: weights of words are not supported",
        ] {
            assert!(said.contains(expected), "{expected} in {said}");
        }
        assert!(!said.contains(&long), "{said}");
    }
    let image = folder.path().join("out.png");
    let generate = ["generate", text(&base), "cat <lyco:a:1>", "-o", text(&image)];
    let said = stderr_of(0, &[&generate[..], &QUICK].concat());
    assert!(said.contains("the prompt has \"<lyco:a:1>\", read as text: LoRAs are given with --lora FILE:1"), "{said}");
}

#[test]
fn what_a_control_image_is_for_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (base, edges) = (repository(BASE), folder.path().join("edges.png"));
    image::RgbImage::new(64, 64).save(&edges).unwrap();
    let image = folder.path().join("out.png");
    let generate = [&["generate", text(&base), "cat", "-o", text(&image)], &QUICK[..]].concat();
    let said = stderr_of(1, &[&generate[..], &["--control-image", text(&edges)]].concat());
    assert!(
        said.contains("the model takes none, and there is no ControlNet for 1: pass one with --controlnet FILE"),
        "{said}"
    );
    let controlnet = repository("assets/mini-flux/controlnet");
    let controlled = [&generate[..], &["--controlnet", text(&controlnet), "--control-image", text(&edges)]].concat();
    let said = stderr_of(1, &[&controlled[..], &["--control-mask", text(&edges)]].concat());
    assert!(said.contains("--control-mask: no ControlNet takes a mask"), "{said}");
}

/// What acts in no step, or with strength 0, changes nothing.
#[test]
fn adapters_without_effect_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let assets = repository("assets/mini-flux");
    let [base, lora, net, image] = ["base", "lora", "controlnet", "references.png"].map(|name| assets.join(name));
    let output = folder.path().join("out.png");
    let generate = |more: &[&str]| {
        let common = ["generate", text(&base), "cat face", "-o", text(&output), "--overwrite"];
        stderr_of(0, &[&common[..], &QUICK[..], more].concat())
    };
    let said = generate(&["--lora", &format!("{}:0", text(&lora))]);
    assert!(said.contains("has no effect: its strength") && !said.contains("applied"), "{said}");
    let said = generate(&["--lora", &format!("{}:1:double=0,single=0", text(&lora))]);
    assert!(said.contains("has no effect: its strength"), "{said}");
    assert_eq!(read_parameters(&output).unwrap().adapters, "");
    let never = format!("{}:0.7:start=0.1,end=0.2", text(&net));
    let said = generate(&["--controlnet", &never, "--control-image", text(&image)]);
    assert!(said.contains("start=0.1 and end=0.2 it acts in none of"), "{said}");
    let said = stderr_of(1, &["generate", text(&base), "-o", text(&output)]);
    assert!(said.contains("pass a prompt, --class N"), "{said}");
}

/// A file that is read is never written to, and one that exists is kept.
#[test]
fn tensors_are_not_written_over_others() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Tiny::new();
    let copied = folder.path().join("model");
    copy_folder(tiny.path(), &copied);
    let weights = std::fs::read_dir(&copied).unwrap().map(|entry| entry.unwrap().path());
    let weights = weights.into_iter().find(|path| path.extension().is_some_and(|kind| kind == "safetensors")).unwrap();
    let before = std::fs::read(&weights).unwrap();
    let inputs = folder.path().join("inputs.safetensors");
    std::fs::write(&inputs, &before).unwrap();
    let forward = |output: &Path, more: &[&str]| {
        let arguments = ["forward", text(&copied), "--inputs", text(&inputs), "-o", text(output)];
        stderr_of(1, &[&arguments, more].concat())
    };
    for output in [&weights, &inputs] {
        let said = forward(output, &["--overwrite"]);
        assert!(said.contains("which is read; choose another name"), "{said}");
        assert_eq!(std::fs::read(output).unwrap(), before);
    }
    let other = folder.path().join("other.safetensors");
    std::fs::write(&other, "kept").unwrap();
    assert!(forward(&other, &[]).contains("already exists; pass --overwrite"));
    assert_eq!(std::fs::read(&other).unwrap(), b"kept");
    let export = ["export", text(&copied), "--to", "bfl", "-o", text(&weights), "--overwrite"];
    assert!(stderr_of(1, &export).contains("which is read"));
}

/// What a user put beside a model stays there.
#[test]
fn other_files_of_a_folder_are_not_replaced_with_the_model() {
    let (tiny, folder) = (Tiny::new(), tempfile::tempdir().unwrap());
    let model = folder.path().join("model");
    let convert = ["convert", text(tiny.path()), "-o", text(&model), "--radius", "3", "--no-distill", "--overwrite"];
    run(0, &convert);
    run(0, &convert);
    std::fs::write(model.join("mine.txt"), "kept").unwrap();
    let said = stderr_of(1, &convert);
    assert!(said.contains("holds files that are not the model's, mine.txt: move them"), "{said}");
    assert!(model.join("mine.txt").exists());
}

/// As with `2>&1 | tee log` after an interrupt, which ends `tee` too.
#[test]
fn a_closed_stderr_ends_no_work() {
    use std::process::Stdio;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("out.png");
    let base = repository(BASE);
    let mut child = common::clearform(&["generate", text(&base), "cat", "--seed", "random", "-o", text(&image)])
        .args(QUICK)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success() && image.exists());
}

/// A conversion that would be resumed is shown with the options it was begun with, and a time limits the forecast.
#[test]
fn a_dry_run_shows_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dit) = (folder.path().join("model"), repository("assets/mini-dit/model"));
    let convert = ["convert", text(&dit), "-o", text(&model), "--dry-run"];
    let said = stderr_of(0, &[&convert[..], &["--radius", "4", "--time", "90s"]].concat());
    assert!(said.contains("90 s for training"), "{said}");
    let work = folder.path().join("model.work");
    std::fs::create_dir(&work).unwrap();
    let begun = json(0, &[&convert[..], &["--radius", "4"]].concat());
    assert_eq!(begun["family"], "minrf");
    let record = r#"{"command": "convert", "source": "", "output": "", "attention": "clear:r=5"}"#;
    std::fs::write(work.join("options.json"), record).unwrap();
    let said = stderr_of(0, &[&convert[..], &["--resume"]].concat());
    assert!(said.contains("with attention clear:r=5"), "{said}");
    let said = stderr_of(1, &[&convert[..], &["--resume", "--radius", "9"]].concat());
    assert!(said.contains("begun with attention \"clear:r=5\""), "{said}");
}

/// What pixels depend on in their last bits is recorded, and told where it differs.
#[test]
fn the_computation_of_an_image_is_recorded() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(generated(folder.path(), &[]).1.computation, "");
    let (_, recorded) = generated(folder.path(), &["--dtype", "f32", "--vae-precision", "bf16"]);
    // On a processor without such products the precision has no effect, and is not recorded.
    let has_effect = VaePrecision::Bf16.on(&Device::Cpu) == VaePrecision::Bf16;
    let computation = if has_effect { "--dtype f32 --vae-precision bf16" } else { "--dtype f32" };
    assert_eq!(recorded.computation, computation);
    let image = folder.path().join("out.png");
    let (again, base) = (folder.path().join("again.png"), repository(BASE));
    let generate = ["generate", text(&base), "--from-metadata", text(&image), "-o", text(&again)];
    let said = stderr_of(0, &generate);
    let told = format!("was computed with {computation}, and this one is with the defaults");
    assert!(said.contains(&told), "{said}");
}

/// Tiles never take more than the whole image, and a model without a VAE has none.
#[test]
fn tiling_is_planned_and_told() {
    let folder = tempfile::tempdir().unwrap();
    generated(folder.path(), &["--vae-tiling", "on", "--max-memory", "300M"]);
    let (dit, image) = (repository("assets/mini-dit/model"), folder.path().join("digit.png"));
    let generate = ["generate", text(&dit), "--class", "3", "--steps", "1", "-o", text(&image)];
    let said = stderr_of(0, &[&generate[..], &["--vae-tiling", "on", "--vae-precision", "bf16"]].concat());
    assert!(said.contains("--vae-tiling has no effect: the model has no VAE"), "{said}");
    assert!(said.contains("--vae-precision has no effect: the model has no VAE"), "{said}");
}

/// A variant of a user's manifest is a hint where the manifest is given, and none elsewhere.
#[test]
fn a_model_of_a_variant_of_ones_own_opens_without_its_manifest() {
    let folder = tempfile::tempdir().unwrap();
    let (manifest, model) = (folder.path().join("my.toml"), folder.path().join("model"));
    let variant = "[[variant]]\nname = \"mine\"\nwhere = { in_channels = 16, guidance_embeds = false }\n";
    std::fs::write(&manifest, format!("edition = 1\nfamily = \"flux\"\n\n{variant}")).unwrap();
    let base = repository(BASE);
    let convert = ["convert", text(&base), "-o", text(&model), "--radius", "4", "--no-distill"];
    run(0, &[&convert[..], &["--manifest", text(&manifest)]].concat());
    let record = std::fs::read_to_string(model.join("clearform.toml")).unwrap();
    assert!(record.contains("variant = \"mine\""), "{record}");
    let image = folder.path().join("out.png");
    run(0, &[&["generate", text(&model), "cat face", "-o", text(&image)], &QUICK[..]].concat());
}

/// A folder from which a conversion takes nothing is said, and says nothing of the model.
#[test]
fn components_that_are_not_used_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dit, base) = (folder.path().join("model"), repository("assets/mini-dit/model"), repository(BASE));
    let convert = ["convert", text(&dit), "-o", text(&model), "--radius", "4", "--no-distill"];
    let said = stderr_of(0, &[&convert[..], &["--components", text(&base)]].concat());
    assert!(said.contains("has no effect: nothing is taken from it") && !said.contains("32 x 32"), "{said}");
    std::fs::remove_dir_all(&model).unwrap();
    assert!(!stderr_of(0, &convert).contains("has no effect"));
}
