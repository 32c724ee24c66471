//! The page "What can I load?" lists what the program prints when it is asked for something that does not exist.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::Tensor;
use clearform_testkit::{assemble_pipeline, seeded_file};
use common::{Tiny, repository, stderr_of, text};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const PAGE: &str = "docs/what-can-i-load.md";
const BEGIN: &str = "<!-- begin: printed by the program -->\n";
const END: &str = "<!-- end -->";
/// Set this to write the page instead of comparing it.
const UPDATE: &str = "UPDATE_DOCS";

/// A name that nothing has.
const NOTHING: &str = "nothing";

/// A model of `family`, and how it is read.
fn model(family: &str, folder: &Path) -> (PathBuf, Vec<String>) {
    let path = folder.join(family);
    match family {
        "flux" => {
            let tiny = Tiny::new();
            std::fs::create_dir_all(&path).unwrap();
            for file in tiny.path().read_dir().unwrap().map(|file| file.unwrap()) {
                std::fs::copy(file.path(), path.join(file.file_name())).unwrap();
            }
            (path, Vec::new())
        }
        "minrf" | "sit" => {
            let shapes = repository(&format!("tests/fixtures/{family}/original/shapes.json"));
            let tensors: HashMap<String, Tensor> = seeded_file(shapes, "").into_iter().collect();
            let file = path.with_extension("safetensors");
            candle_core::safetensors::save(&tensors, &file).unwrap();
            let config = path.with_extension("json");
            std::fs::write(&config, r#"{"attention_head_dim": 12}"#).unwrap();
            let config = ["--config".to_owned(), text(&config).to_owned()];
            (file, if family == "sit" { config.to_vec() } else { Vec::new() })
        }
        _ => {
            assemble_pipeline(&repository(""), family, &path);
            (path, Vec::new())
        }
    }
}

/// The names in "choose one of [...]".
fn choices(said: &str) -> Vec<String> {
    let list = said.split_once("choose one of ").unwrap_or_else(|| panic!("{said}")).1;
    let end = list.find(']').unwrap();
    let list: Value = serde_json::from_str(&list[..=end]).unwrap();
    list.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn families() -> Vec<String> {
    let tiny = Tiny::new();
    choices(&stderr_of(1, &["inspect", text(tiny.path()), "--family", NOTHING]))
}

/// A row of the table: the family, its variants and its layouts.
fn row(family: &str, folder: &Path) -> String {
    let (path, reading) = model(family, folder);
    let reading: Vec<&str> = ["--family", family].into_iter().chain(reading.iter().map(String::as_str)).collect();
    let listed = |command: &[&str]| {
        let names = choices(&stderr_of(1, &[&[command[0], text(&path)], &command[1..], &reading].concat()));
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    };
    let file = folder.join("never.safetensors");
    let variants = listed(&["inspect", "--variant", NOTHING]);
    let layouts = listed(&["export", "--to", NOTHING, "-o", text(&file)]);
    format!("| `{family}` | {variants} | {layouts} |\n")
}

/// What is told apart and refused, by name.
fn refused() -> String {
    let text = std::fs::read_to_string(repository("manifests/unsupported.toml")).unwrap();
    let table: toml::Table = text.parse().unwrap();
    let mut names: Vec<&str> = Vec::new();
    for entry in ["refused", "recognised"].iter().flat_map(|kind| table[*kind].as_array().unwrap()) {
        let name = entry["name"].as_str().unwrap();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.iter().map(|name| format!("- {name}\n")).collect()
}

#[test]
fn the_page_lists_what_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let families = families();
    assert!(families.len() >= 6, "{families:?}");
    let rows: String = families.iter().map(|family| row(family, folder.path())).collect();
    let printed = format!(
        "| `--family` | `--variant` | `export --to` |\n|---|---|---|\n{rows}\nRecognised and refused by name:\n\n{}",
        refused()
    );
    let page = std::fs::read_to_string(repository(PAGE)).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let wanted = format!("{before}{BEGIN}{printed}{END}{after}");
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(repository(PAGE), wanted).unwrap();
        return;
    }
    let differing = page.lines().zip(wanted.lines()).find(|(page, wanted)| page != wanted);
    assert!(page == wanted, "{PAGE} is stale (set {UPDATE} to update it): {differing:?}");
}
