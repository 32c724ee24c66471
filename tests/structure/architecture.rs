//! Checks that each crate depends on exactly the crates that ARCHITECTURE.md draws.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Each crate and the crates of this workspace that it depends on, in the order in which data flows.
const EDGES: &[(&str, &[&str])] = &[
    ("plugin-abi", &[]),
    ("kernels", &[]),
    ("weights", &[]),
    ("layout", &["weights"]),
    ("ops", &["kernels", "weights"]),
    ("attention", &["kernels", "ops"]),
    ("models", &["attention", "ops", "weights"]),
    ("sampling", &["models", "ops"]),
    ("portable-model", &["attention", "layout", "weights"]),
    ("convert", &["attention", "layout", "ops", "portable-model", "weights"]),
    ("distill", &["attention", "models", "ops", "sampling", "weights"]),
    ("plugin-host", &["layout", "models", "plugin-abi", "weights"]),
    ("runtime", &["attention", "layout", "models", "plugin-host", "portable-model", "sampling", "weights"]),
    (
        "clearform",
        &[
            "attention",
            "controlnet",
            "convert",
            "distill",
            "layout",
            "lora",
            "models",
            "ops",
            "plugin-host",
            "portable-model",
            "runtime",
            "sampling",
            "weights",
        ],
    ),
    ("cli", &["clearform", "distill", "models", "plugin-host", "portable-model", "runtime", "weights"]),
    ("testkit", &[]),
    ("tests", &[]),
];

/// What a plugin may depend on. The C table alone is enough; the others are for plugins that compute with our models.
/// The library of a plugin that is also linked into the program depends on that plugin and on the C table.
const PLUGIN_EDGES: &[&str] = &["attention", "layout", "models", "plugin-abi", "weights"];

#[test]
fn crates_depend_on_exactly_what_is_drawn() {
    let (plugins, crates): (BTreeMap<_, _>, BTreeMap<_, _>) =
        edges().into_iter().partition(|(name, _)| plugins().contains(name));
    let drawn: BTreeMap<String, BTreeSet<String>> =
        EDGES.iter().map(|(name, used)| ((*name).to_owned(), names(used))).collect();
    assert_eq!(crates, drawn);
    let (libraries, plugins): (BTreeMap<_, _>, BTreeMap<_, _>) =
        plugins.into_iter().partition(|(name, _)| name.ends_with("-library"));
    let used: BTreeSet<String> = plugins.into_values().flatten().collect();
    assert_eq!(used, names(PLUGIN_EDGES), "what the bundled plugins use together");
    assert_eq!(libraries.len(), 2);
    for (library, used) in libraries {
        assert_eq!(used, names(&[library.trim_end_matches("-library"), "plugin-abi"]), "{library}");
    }
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Packages of the folder plugins/, and the one that exists for a test.
fn plugins() -> BTreeSet<String> {
    let metadata = metadata();
    let root = metadata["workspace_root"].as_str().expect("a root");
    let roots = ["plugins/", "tests/panicking/"].map(|folder| format!("{root}/{folder}"));
    let is_plugin = |package: &&serde_json::Value| {
        package["manifest_path"].as_str().is_some_and(|path| roots.iter().any(|root| path.starts_with(root)))
    };
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().filter(is_plugin).map(|package| short(&package["name"])).collect()
}

/// Normal dependencies among our own crates, without the `clearform-` in front.
fn edges() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().map(|package| (short(&package["name"]), used_by(package))).collect()
}

fn used_by(package: &serde_json::Value) -> BTreeSet<String> {
    let dependencies = package["dependencies"].as_array().expect("dependencies");
    let normal = dependencies.iter().filter(|dependency| dependency["kind"].is_null());
    normal
        .filter(|dependency| {
            dependency["name"].as_str().is_some_and(|name| name == "clearform" || name.starts_with("clearform-"))
        })
        .map(|dependency| short(&dependency["name"]))
        .collect()
}

fn short(name: &serde_json::Value) -> String {
    name.as_str().expect("a name").trim_start_matches("clearform-").to_owned()
}

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}
