//! Plugins that are linked into the program beside those in libraries: equal results, precedence, lists and checks.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_testkit::{assert_close, fixture, plugin_folder};
use common::{Tiny, repository, text};
use serde_json::Value;
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

const LINKED_LORA: &str = "clearform-lora (linked into the program)";
const LINKED_CONTROLNET: &str = "clearform-controlnet (linked into the program)";

/// The program in a folder of its own, as `cargo install` leaves it: without libraries next to it.
struct Installed {
    folder: TempDir,
}

impl Installed {
    /// Links to this build's program: a program that is being copied cannot be started.
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::hard_link(env!("CARGO_BIN_EXE_clearform"), folder.path().join("clearform")).unwrap();
        Self { folder }
    }

    /// Runs the program; panics unless it exits with `code`.
    fn run(&self, code: i32, arguments: &[&str]) -> Output {
        let output = Command::new(self.folder.path().join("clearform")).args(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "clearform {arguments:?}\n{stderr}");
        output
    }

    fn stdout_of(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.run(0, arguments).stdout).unwrap()
    }

    fn stderr_of(&self, code: i32, arguments: &[&str]) -> String {
        String::from_utf8(self.run(code, arguments).stderr).unwrap()
    }

    /// Id, path and replaced origins of each plugin in the list.
    fn listed(&self, arguments: &[&str]) -> Vec<(String, Value, Value)> {
        let listing = self.stdout_of(&[&["plugins", "list", "--json"], arguments].concat());
        let listing: Value = serde_json::from_str(&listing).unwrap();
        let fields = |plugin: &Value| {
            (plugin["id"].as_str().unwrap().to_owned(), plugin["path"].clone(), plugin["in_place_of"].clone())
        };
        listing["plugins"].as_array().unwrap().iter().map(fields).collect()
    }

    /// Runs `forward`; returns the bytes of its output and stderr.
    fn forward(&self, case: &Case, more: &[&str]) -> (Vec<u8>, String) {
        let output = self.folder.path().join("out.safetensors");
        let message = self.stderr_of(0, &[&case.arguments(&output)[..], more].concat());
        (std::fs::read(&output).unwrap(), message)
    }
}

/// A model, the input of one evaluation, and an adapter.
struct Case {
    model: PathBuf,
    inputs: PathBuf,
    adapter: [String; 2],
}

impl Case {
    fn lora(model: &Tiny) -> Self {
        let fixtures = repository("tests/fixtures/lora");
        let adapter = fixtures.join("kohya.safetensors");
        Self {
            model: model.path().to_owned(),
            inputs: fixtures.join("input.safetensors"),
            adapter: ["--lora".to_owned(), text(&adapter).to_owned()],
        }
    }

    /// Makes the model in `folder`.
    fn controlnet(folder: &Path) -> Self {
        let fixtures = repository("tests/fixtures/controlnet");
        let weights = folder.join("diffusion_pytorch_model.safetensors");
        std::fs::copy(fixtures.join("base/config.json"), folder.join("config.json")).unwrap();
        std::fs::copy(fixtures.join("base/weights.safetensors"), weights).unwrap();
        Self {
            model: folder.to_owned(),
            inputs: fixtures.join("input.safetensors"),
            adapter: ["--controlnet".to_owned(), format!("{}:0.6", text(&fixtures.join("one-two")))],
        }
    }

    fn arguments<'a>(&'a self, output: &'a Path) -> [&'a str; 9] {
        let [flag, adapter] = &self.adapter;
        ["forward", text(&self.model), "--inputs", text(&self.inputs), "-o", text(output), "--overwrite", flag, adapter]
    }
}

/// A file with the description of a plugin `lora`, and no code.
fn write_empty_lora(folder: &Path) -> PathBuf {
    let path = folder.join(format!("{DLL_PREFIX}mine{DLL_SUFFIX}"));
    let description = std::fs::read_to_string(repository("plugins/lora/plugin.toml")).unwrap();
    let [begin, end] = ["<<clearform-plugin-description/1>>", "<<end-of-clearform-plugin-description>>"];
    std::fs::write(&path, format!("{begin}{description}{end}")).unwrap();
    path
}

fn library(name: &str) -> PathBuf {
    plugin_folder().join(format!("{DLL_PREFIX}clearform_{name}{DLL_SUFFIX}"))
}

#[test]
fn linked_plugins_give_the_bits_of_the_libraries() {
    let (installed, tiny, base) = (Installed::new(), Tiny::new(), tempfile::tempdir().unwrap());
    let plugins = plugin_folder();
    let (lora, controlnet) = (Case::lora(&tiny), Case::controlnet(base.path()));
    let libraries = ["--plugin-dir", text(&plugins)];
    let used: Vec<Value> = installed.listed(&libraries).into_iter().map(|(_, path, _)| path).collect();
    assert_eq!(used, ["controlnet_library", "example", "lora_library"].map(|name| text(&library(name)).to_owned()));
    for (case, expected) in [
        (lora, ("lora/expected.safetensors", "kohya/sample")),
        (controlnet, ("controlnet/expected.safetensors", "one-two@0.6/full-full/sample")),
    ] {
        let (linked, message) = installed.forward(&case, &[]);
        let sample = fixture(installed.folder.path().join("out.safetensors"))["sample"].clone();
        let (file, name) = expected;
        assert_close(name, &sample, &fixture(repository("tests/fixtures").join(file))[name], 2e-5);
        assert!(name.contains("one-two") || message.contains("applied 99 of 99 tensors to 33 modules"), "{message}");
        assert!(installed.forward(&case, &libraries).0 == linked, "{name}: the library gives other bits");
    }
}

#[test]
fn a_library_takes_precedence_over_a_linked_plugin() {
    let (installed, tiny, folder) = (Installed::new(), Tiny::new(), tempfile::tempdir().unwrap());
    let (mine, plugins) = (write_empty_lora(folder.path()), plugin_folder());
    let own = ["--plugin-dir", text(folder.path())];
    let program = |id: &str, origin: &[&str]| (id.to_owned(), Value::Null, Value::from(origin));
    assert_eq!(installed.listed(&[]), [program("controlnet", &[]), program("lora", &[])]);
    let replaced = ("lora".to_owned(), Value::from(text(&mine)), Value::from([LINKED_LORA].as_slice()));
    assert_eq!(installed.listed(&own), [program("controlnet", &[]), replaced]);
    let listing = installed.stdout_of(&[&["plugins", "list"], &own[..]].concat());
    assert!(listing.contains(&format!("\n  {}\n  in place of {LINKED_LORA}", text(&mine))), "{listing}");
    assert!(listing.contains(&format!("\n  {LINKED_CONTROLNET}\n")), "{listing}");

    let output = folder.path().join("out.safetensors");
    let case = Case::lora(&tiny);
    let message = installed.stderr_of(1, &[&case.arguments(&output)[..], &own].concat());
    assert!(message.contains(&format!("plugin {}: ", text(&mine))), "{message}");
    assert!(!output.exists());
    // Of two libraries, the first.
    let both = [&["--plugin-dir", text(&plugins)][..], &own].concat();
    let (_, path, replaced) = installed.listed(&both).remove(2);
    assert_eq!(path, text(&library("lora_library")));
    assert_eq!(replaced, Value::from([text(&mine), LINKED_LORA].as_slice()));
    installed.forward(&case, &both);
    // So it is with a library next to the program.
    std::fs::rename(&mine, installed.folder.path().join(mine.file_name().unwrap())).unwrap();
    let (_, path, replaced) = installed.listed(&[]).remove(1);
    assert_eq!(path, text(&installed.folder.path().join(mine.file_name().unwrap())));
    assert_eq!(replaced, Value::from([LINKED_LORA].as_slice()));
}

#[test]
fn without_plugins_linked_ones_are_refused_too() {
    let (installed, tiny, base) = (Installed::new(), Tiny::new(), tempfile::tempdir().unwrap());
    let output = installed.folder.path().join("out.safetensors");
    for case in [Case::lora(&tiny), Case::controlnet(base.path())] {
        let message = installed.stderr_of(1, &[&case.arguments(&output)[..], &["--no-plugins"]].concat());
        assert!(message.contains("plugins are disabled (--no-plugins), but this adapter needs one"), "{message}");
        assert!(!output.exists());
    }
    assert_eq!(installed.stdout_of(&["plugins", "list", "--no-plugins"]), "no plugins\n");
    let message = installed.stderr_of(1, &["plugins", "check", "lora", "--no-plugins"]);
    assert!(message.contains("available plugins: none"), "{message}");
}

#[test]
fn plugins_are_checked_by_library_or_id() {
    let installed = Installed::new();
    for name in ["controlnet_library", "example", "lora_library"] {
        let library = library(name);
        let checked = installed.stdout_of(&["plugins", "check", text(&library)]);
        assert!(checked.contains(text(&library)) && checked.ends_with(" examples passed\n"), "{checked}");
    }
    for (id, origin) in [("lora", LINKED_LORA), ("controlnet", LINKED_CONTROLNET)] {
        let checked = installed.stdout_of(&["plugins", "check", id]);
        assert!(checked.contains(&format!("\n  {origin}\n")) && checked.ends_with(" examples passed\n"), "{checked}");
    }
    let message = installed.stderr_of(1, &["plugins", "check", "mine"]);
    let expected = "mine: expected a plugin's library, or the id of a plugin: found neither; available plugins: \
                    controlnet, lora";
    assert!(message.contains(expected), "{message}");
    let folder = plugin_folder();
    let by_id = installed.stdout_of(&["plugins", "check", "lora", "--plugin-dir", text(&folder)]);
    assert!(by_id.contains(text(&library("lora_library"))), "{by_id}");
}
