//! Holds the tree to its drawing: who may use whom.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Each crate of ours, and those of ours it may use. The order is the way of the data.
const MAY_USE: &[(&str, &[&str])] = &[
    ("abi", &[]),
    ("weights", &[]),
    ("kernels", &[]),
    ("simulator", &[]),
    ("layout", &["weights"]),
    ("ops", &["kernels"]),
    ("attention", &["ops", "kernels"]),
    ("models", &["weights", "layout", "ops", "attention"]),
    ("sampling", &["models"]),
    ("convert", &["weights", "layout", "models", "attention"]),
    ("distill", &["weights", "sampling", "convert", "models", "attention"]),
    ("plugins", &["abi", "weights", "layout", "models"]),
    ("runtime", &["weights", "sampling", "convert", "plugins", "models", "attention", "layout"]),
    ("testkit", &["weights"]),
];

/// What a plugin may use. A new one needs no line here.
const PLUGINS_MAY_USE: &[&str] = &["abi", "weights", "layout", "attention", "models"];

/// May use all of ours.
const TOP: &[&str] = &["cli", "tests"];

#[test]
fn crates_use_only_what_the_drawing_allows() {
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let edges = edges();
    assert!(edges.len() >= MAY_USE.len(), "cargo metadata listed too few crates: {edges:?}");
    for (crate_name, used) in &edges {
        if TOP.contains(&crate_name.as_str()) {
            continue;
        }
        let may = match plugins().contains(crate_name) {
            true => PLUGINS_MAY_USE,
            false => allowed.get(crate_name.as_str()).unwrap_or_else(|| panic!("{crate_name} is not in the drawing")),
        };
        for one in used {
            assert!(may.contains(&one.as_str()), "{crate_name} uses {one}, which the drawing does not allow");
        }
    }
}

/// Packages of the folder plugins/, which crates/plugin-host is not, and the one that is made for a test.
fn plugins() -> BTreeSet<String> {
    let metadata = metadata();
    let root = metadata["workspace_root"].as_str().expect("a root");
    let roots = ["plugins/", "tests/panicking/"].map(|folder| format!("{root}/{folder}"));
    let lies_there = |package: &&serde_json::Value| {
        package["manifest_path"].as_str().is_some_and(|path| roots.iter().any(|root| path.starts_with(root)))
    };
    metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .filter(lies_there)
        .map(|package| short(&package["name"]))
        .collect()
}

/// Normal dependencies among our own crates, without the `clearform-` in front.
fn edges() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().map(|package| (short(&package["name"]), used_by(package))).collect()
}

fn used_by(package: &serde_json::Value) -> BTreeSet<String> {
    let dependencies = package["dependencies"].as_array().expect("dependencies");
    let normal = dependencies.iter().filter(|one| one["kind"].is_null());
    normal
        .filter(|one| one["name"].as_str().is_some_and(|name| name.starts_with("clearform-")))
        .map(|one| short(&one["name"]))
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
