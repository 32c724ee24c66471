//! The command refuses each file of tests/fixtures/hostile with the message in messages.toml, within a time and memory
//! limit, and prints no control characters.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use clearform_testkit::{fixture, plugin_folder};
use common::repository;
use serde::Deserialize;
use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const FILES: &str = "tests/fixtures/hostile";
/// Memory limit of the command, set by the shell, in KiB.
const MEMORY: &str = "1048576";
const LONGEST: Duration = Duration::from_secs(10);

/// An entry of messages.toml: a file, the arguments, and the text that stderr must contain.
#[derive(Debug, Deserialize)]
struct Case {
    path: PathBuf,
    command: String,
    says: String,
}

#[derive(Debug, Deserialize)]
struct Cases {
    file: Vec<Case>,
}

/// A folder with a small model and its inputs, for commands that need more than the hostile file.
struct Workspace {
    folder: tempfile::TempDir,
}

impl Workspace {
    fn new() -> Self {
        let workspace = Self { folder: tempfile::tempdir().unwrap() };
        let original = repository("tests/fixtures/controlnet");
        std::fs::create_dir(workspace.path("model")).unwrap();
        std::fs::copy(original.join("base/config.json"), workspace.path("model/config.json")).unwrap();
        let weights = workspace.path("model/diffusion_pytorch_model.safetensors");
        std::fs::copy(original.join("base/weights.safetensors"), weights).unwrap();
        let inputs = fixture(original.join("input.safetensors")).into_iter();
        let inputs: HashMap<_, _> = inputs.filter(|(name, _)| !name.starts_with("controlnet")).collect();
        candle_core::safetensors::save(&inputs, workspace.path("inputs.safetensors")).unwrap();
        workspace
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The pipeline of assets/ with `file` as its second tokenizer.
    fn pipeline_with(&self, file: &Path) -> PathBuf {
        let pipeline = self.path("pipelines").join(file.file_stem().unwrap());
        std::fs::create_dir_all(pipeline.join("tokenizer_2")).unwrap();
        let entries = repository("assets/mini-flux/base").read_dir().unwrap().map(|entry| entry.unwrap().path());
        for entry in entries.filter(|entry| !entry.ends_with("tokenizer_2")) {
            symlink(entry.canonicalize().unwrap(), pipeline.join(entry.file_name().unwrap())).unwrap();
        }
        std::fs::copy(file, pipeline.join("tokenizer_2/tokenizer.json")).unwrap();
        pipeline
    }

    /// The argument that a word of a command stands for.
    fn argument(&self, word: &str, file: &Path) -> PathBuf {
        match word {
            "FILE" => file.to_owned(),
            "INPUTS" => self.path("inputs.safetensors"),
            "MODEL" => self.path("model"),
            "OUTPUT" => self.path("output"),
            "OUTPUT.safetensors" => self.path("output.safetensors"),
            "IMAGE" => self.path("output.png"),
            "PIPELINE" => repository("assets/mini-flux/base"),
            "PIPELINE-WITH-TOKENIZER" => self.pipeline_with(file),
            "PLUGINS" => plugin_folder(),
            other => PathBuf::from(other),
        }
    }

    /// Runs the command on `file`, with the memory limit.
    fn run(&self, command: &str, file: &Path) -> Output {
        let limited = format!("ulimit -d {MEMORY} && exec \"$@\"");
        let mut shell = Command::new("sh");
        shell.args(["-c", &limited, "sh", env!("CARGO_BIN_EXE_clearform")]);
        shell.args(command.split(' ').map(|word| self.argument(word, file))).output().unwrap()
    }
}

fn cases() -> Vec<Case> {
    let table = std::fs::read_to_string(repository(FILES).join("messages.toml")).unwrap();
    toml::from_str::<Cases>(&table).unwrap().file
}

/// A character that controls a terminal or reverses text.
fn is_control(character: char) -> bool {
    character.is_control() && character != '\n' || ('\u{202a}'..='\u{202e}').contains(&character)
}

/// Whether a command says that something is complete, written or applied.
fn claims_success(output: &str) -> bool {
    output.lines().any(|line| {
        ["complete", "written to", "verified"].iter().any(|claim| line.starts_with(claim))
            || line.contains(": applied ") && !line.contains(": applied 0 of")
    })
}

#[test]
fn every_hostile_file_is_refused_with_its_message() {
    let cases = cases();
    let workspace = Workspace::new();
    assert!(cases.len() >= 80);
    for Case { path, command, says } in cases {
        let start = Instant::now();
        let Output { status, stdout, stderr } = workspace.run(&command, &repository(FILES).join(&path));
        let stdout = String::from_utf8(stdout).unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        let path = path.display();
        assert!(start.elapsed() < LONGEST, "{path} took {:?}", start.elapsed());
        assert_eq!(status.code(), Some(1), "{path}\n{stdout}\n{stderr}");
        assert!(stderr.contains(&says), "{path}: {stderr:?} does not contain {says:?}");
        assert!(!claims_success(&stdout) && !claims_success(&stderr), "{path}: {stdout:?} {stderr:?}");
        assert!(!stdout.contains(is_control) && !stderr.contains(is_control), "{path}: {stdout:?} {stderr:?}");
    }
    assert!(!workspace.path("output").exists() && !workspace.path("output.png").exists());
    assert!(!Path::new("/tmp/clearform-was-here").exists(), "a pickle ran a command");
}

/// File names are untrusted too.
#[test]
fn control_characters_in_file_names_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("\u{1b}[2J\u{202e}model\u{7}.safetensors");
    std::fs::write(&file, "<html>").unwrap();
    let output = Workspace::new().run("inspect FILE", &file);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains(r"\u{1b}[2J\u{202e}model\u{7}.safetensors: this is an HTML"), "{message:?}");
    assert!(!message.contains(is_control), "{message:?}");
}

/// Escaping keeps the JSON value.
#[test]
fn control_characters_in_json_are_escaped() {
    let folder = repository(FILES).join("steering-config");
    let output = Workspace::new().run("inspect FILE --json", &folder);
    let text = String::from_utf8(output.stdout).unwrap();
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["contradictions"][0]["declared"], "\u{1b}[2J\u{202e}\nerror: all is well");
    assert!(!text.contains(is_control), "{text:?}");
}
