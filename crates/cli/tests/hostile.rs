//! The files of tests/fixtures/hostile, each given to the command: refused with the message it must get, soon, in little
//! memory, and without a character that steers a terminal.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use clearform_testkit::fixture;
use common::repository;
use serde::Deserialize;
use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const FILES: &str = "tests/fixtures/hostile";
/// Memory that the command may have, by the shell's own limit, in KiB.
const MEMORY: &str = "1048576";
const LONGEST: Duration = Duration::from_secs(10);

/// What messages.toml tells of a file.
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

/// What files are given beside: a small model with inputs, and a pipeline.
struct Beside {
    folder: tempfile::TempDir,
}

impl Beside {
    fn new() -> Self {
        let beside = Self { folder: tempfile::tempdir().unwrap() };
        let original = repository("tests/fixtures/controlnet");
        std::fs::create_dir(beside.path("model")).unwrap();
        std::fs::copy(original.join("base/config.json"), beside.path("model/config.json")).unwrap();
        let weights = beside.path("model/diffusion_pytorch_model.safetensors");
        std::fs::copy(original.join("base/weights.safetensors"), weights).unwrap();
        let inputs = fixture(original.join("input.safetensors")).into_iter();
        let inputs: HashMap<_, _> = inputs.filter(|(name, _)| !name.starts_with("controlnet")).collect();
        candle_core::safetensors::save(&inputs, beside.path("inputs.safetensors")).unwrap();
        beside
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The pipeline of assets/ with `file` in the place of its second tokenizer.
    fn pipeline_with(&self, file: &Path) -> PathBuf {
        let pipeline = self.path("pipelines").join(file.file_stem().unwrap());
        std::fs::create_dir_all(pipeline.join("tokenizer_2")).unwrap();
        let parts = repository("assets/mini-flux/base").read_dir().unwrap().map(|part| part.unwrap().path());
        for part in parts.filter(|part| !part.ends_with("tokenizer_2")) {
            symlink(part.canonicalize().unwrap(), pipeline.join(part.file_name().unwrap())).unwrap();
        }
        std::fs::copy(file, pipeline.join("tokenizer_2/tokenizer.json")).unwrap();
        pipeline
    }

    /// What a word of a command stands for.
    fn word(&self, word: &str, file: &Path) -> PathBuf {
        match word {
            "FILE" => file.to_owned(),
            "INPUTS" => self.path("inputs.safetensors"),
            "MODEL" => self.path("model"),
            "OUTPUT" => self.path("output"),
            "PIPELINE" => repository("assets/mini-flux/base"),
            "PIPELINE-WITH-TOKENIZER" => self.pipeline_with(file),
            "PLUGINS" => std::env::current_exe().unwrap().parent().unwrap().to_owned(),
            plain => PathBuf::from(plain),
        }
    }

    /// Gives `file` to the command, with a limit on its memory.
    fn give(&self, command: &str, file: &Path) -> Output {
        let limited = format!("ulimit -d {MEMORY} && exec \"$@\"");
        let mut shell = Command::new("sh");
        shell.args(["-c", &limited, "sh", env!("CARGO_BIN_EXE_clearform")]);
        shell.args(command.split(' ').map(|word| self.word(word, file))).output().unwrap()
    }
}

fn cases() -> Vec<Case> {
    let table = std::fs::read_to_string(repository(FILES).join("messages.toml")).unwrap();
    toml::from_str::<Cases>(&table).unwrap().file
}

/// A character that steers a terminal or turns text around.
fn steers(character: char) -> bool {
    character.is_control() && character != '\n' || ('\u{202a}'..='\u{202e}').contains(&character)
}

#[test]
fn every_hostile_file_is_refused_with_its_message() {
    let (cases, beside) = (cases(), Beside::new());
    assert!(cases.len() >= 40);
    for Case { path, command, says } in cases {
        let start = Instant::now();
        let Output { status, stdout, stderr } = beside.give(&command, &repository(FILES).join(&path));
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        let path = path.display();
        assert!(start.elapsed() < LONGEST, "{path} took {:?}", start.elapsed());
        assert_eq!(status.code(), Some(1), "{path}\n{stdout}\n{stderr}");
        assert!(stderr.contains(&says), "{path}: {stderr:?} does not say {says:?}");
        assert!(!stdout.contains(steers) && !stderr.contains(steers), "{path}: {stdout:?} {stderr:?}");
    }
    assert!(!beside.path("output").exists());
    assert!(!Path::new("/tmp/clearform-was-here").exists(), "a pickle ran a command");
}

/// A file is found by names that others chose, too.
#[test]
fn the_names_of_files_do_not_steer_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("\u{1b}[2J\u{202e}model\u{7}.safetensors");
    std::fs::write(&file, "<html>").unwrap();
    let output = Beside::new().give("inspect FILE", &file);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(r"\u{1b}[2J\u{202e}model\u{7}.safetensors: this is an HTML"), "{said:?}");
    assert!(!said.contains(steers), "{said:?}");
}

/// What is answered as JSON is the same JSON, escaped.
#[test]
fn json_does_not_steer_a_terminal() {
    let folder = repository(FILES).join("steering-config");
    let output = Beside::new().give("inspect FILE --json", &folder);
    let text = String::from_utf8(output.stdout).unwrap();
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["contradictions"][0]["declared"], "\u{1b}[2J\u{202e}\nerror: all is well");
    assert!(!text.contains(steers), "{text:?}");
}
