//! Holds the tree to the field's words: names that earlier versions used for themselves must not come back.

use clearform_tests::{code_of, files, identifiers, root};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Identifiers of earlier versions, each with what it is called now.
const OLD_IDENTIFIERS: &[(&str, &str)] = &[
    ("Account", "LoadReport"),
    ("Acting", "ControlNetSchedule"),
    ("ActingBranch", "ActiveControlNet"),
    ("Adapted", "PatchedSource"),
    ("Addresses", "ParameterMap"),
    ("Applied", "ScaledAdapter"),
    ("Beside", "Sidecar or ControlConcat"),
    ("Branch", "ControlNet"),
    ("Canvas", "LatentSpec or SamplingSpec"),
    ("Changes", "WeightEdits"),
    ("Exam", "HeldOutSet"),
    ("Factor", "Lane"),
    ("Fate", "TensorOutcome"),
    ("Frame", "BatchSpec"),
    ("Framing", "BatchSpec"),
    ("Inside", "EmbeddedComponent"),
    ("Instructions", "CpuFeatures"),
    ("Judged", "Validated"),
    ("Lesson", "TrainedStudent or TeacherTargets"),
    ("Level", "Isa"),
    ("Marks", "HeldOutScores"),
    ("Misshapen", "ShapeMismatch"),
    ("Moment", "StepIndex"),
    ("Number", "Scalar"),
    ("Part", "a component, or what it is part of"),
    ("Place", "StorageView or DeviceArg"),
    ("Process", "NoiseProcess"),
    ("Record", "ModelRecord"),
    ("Resident", "InMemoryTensors"),
    ("Scope", "WeightBuilder or MappingContext"),
    ("Share", "TileEfficiency"),
    ("Shelf", "PluginRegistry"),
    ("Sitting", "EvaluationRun"),
    ("Steering", "GuidanceKind"),
    ("Student", "StudentSpec or StudentResult"),
    ("Subject", "Prompt"),
    ("Task", "SimdKernel"),
    ("Under", "PrefixView"),
    ("Unscaled", "Dequantized"),
    ("Windowed", "TiledAttention"),
    ("Workshop", "CheckpointDir"),
    ("develop", "decode"),
    ("framed", "add_size_conditions"),
    ("graduate", "distill_student"),
    ("plainly", "default_options"),
    ("steering", "guidance_kind"),
];

/// Files of earlier versions, without their endings, each in the folder where it was.
const OLD_FILES: &[&str] = &[
    "crates/abi",
    "crates/attention/src/fused/step",
    "crates/attention/src/seam",
    "crates/attention/src/share",
    "crates/cli/src/demo/carried",
    "crates/cli/src/demo/story",
    "crates/cli/src/school",
    "crates/cli/src/sitting",
    "crates/layout/src/account",
    "crates/layout/src/known",
    "crates/layout/src/list",
    "crates/layout/src/near",
    "crates/layout/src/printed",
    "crates/layout/src/under",
    "crates/layout/src/unscaled",
    "crates/layout/src/work",
    "crates/plugins",
    "crates/runtime/src/beside",
    "crates/runtime/src/canvas",
    "kernels/emulation",
    "manifests/known",
    "manifests/parts",
];

/// Keys of manifests of earlier versions; files that still bear them are read.
const OLD_MANIFEST_KEYS: &[&str] = &["part", "parts", "known"];

/// Turns of phrase that a reader would stumble over.
const OLD_PHRASES: &[&str] = &[
    "stands already",
    "stand already",
    "room of the house",
    "rooms of the house",
    "the house",
    "give --",
    "goes on with --",
    "go on with --",
    "mend it",
    "is mended",
    "made plain",
    "held against",
    "at hand",
    "no numbers",
    "nobody",
    "whoever",
    "laid beside",
    "is not there",
    "are not there",
    "what stands here",
];

/// Endings of files that hold prose, code or settings.
const TEXTS: &[&str] = &["rs", "md", "toml", "py", "sh", "h", "cpp", "txt"];

#[test]
fn identifiers_are_the_fields() {
    let mut found = Vec::new();
    let mut read = 0;
    for path in texts().into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "rs")) {
        let is_simulator = shown(&path).starts_with("kernels/simulator/");
        let code = code_of(&read_text(&path));
        for (line, name, before) in identifiers(&code) {
            // Variants of a library's enum are the library's words, and a branch is an instruction of PTX.
            let is_foreign = before.ends_with("Value::") || (is_simulator && name == "Branch");
            if let Some((old, new)) = OLD_IDENTIFIERS.iter().find(|(old, _)| *old == name && !is_foreign) {
                found.push(format!("{}:{line}: {old} is called {new}", shown(&path)));
            }
        }
        read += 1;
    }
    assert!(read > 250, "only {read} files were read");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_type_name_means_one_thing() {
    let mut places = BTreeMap::<String, BTreeSet<String>>::new();
    for path in texts().into_iter().filter(|path| is_product_source(path)) {
        let code = code_of(&read_text(&path));
        let code = code.split("#[cfg(test)]").next().unwrap_or_default();
        for (_, name, before) in identifiers(code) {
            let keyword = before.trim_end().rsplit(' ').next().unwrap_or_default();
            // A type inside a block or a trait belongs to that trait: `type Output`.
            let is_associated = before.starts_with(' ') && keyword == "type";
            if ["struct", "enum", "trait", "union", "type"].contains(&keyword) && !is_associated {
                places.entry(name.to_owned()).or_default().insert(shown(&path));
            }
        }
    }
    assert!(places.len() > 500, "only {} types were found", places.len());
    places.retain(|name, places| places.len() > 1 && name != "Result");
    assert_eq!(places, BTreeMap::new(), "types that share a name");
}

/// Whether `path` is Rust of the main workspace that is not built for tests alone.
fn is_product_source(path: &Path) -> bool {
    let name = shown(path);
    let is_product = ["crates/", "plugins/", "kernels/"].iter().any(|folder| name.starts_with(folder));
    name.ends_with(".rs") && is_product && !name.starts_with("kernels/simulator/") && !name.contains("tests")
}

#[test]
fn files_bear_the_fields_names() {
    let stems: Vec<String> = files(root()).iter().map(|path| shown(&path.with_extension(""))).collect();
    assert!(stems.len() > 500, "only {} files were found", stems.len());
    for old in OLD_FILES {
        let inside = format!("{old}/");
        let found = stems.iter().find(|stem| *stem == old || stem.starts_with(&inside));
        assert_eq!(found, None, "{old} has another name now");
    }
}

#[test]
fn manifests_use_the_fields_keys() {
    let manifests = files(&root().join("manifests"));
    assert!(manifests.len() >= 9, "only {manifests:?} were found");
    for path in manifests {
        for (at, line) in read_text(&path).lines().enumerate() {
            let key = line.trim_start_matches(['[', ' ', '{']).split([']', ' ', '=']).next().unwrap_or_default();
            let is_table = line.starts_with("[[");
            assert!(
                !is_table || !OLD_MANIFEST_KEYS.contains(&key),
                "{}:{}: the key {key:?} has another name now",
                shown(&path),
                at + 1
            );
        }
    }
}

#[test]
fn texts_are_plain_english() {
    let mut found = Vec::new();
    for path in texts() {
        for (at, line) in read_text(&path).lines().enumerate() {
            let small = line.to_lowercase();
            let phrase = OLD_PHRASES.iter().find(|phrase| small.contains(*phrase));
            found.extend(phrase.map(|phrase| format!("{}:{}: {phrase:?}", shown(&path), at + 1)));
        }
    }
    assert!(found.is_empty(), "{} lines:\n{}", found.len(), found.join("\n"));
}

/// Every text of the tree but this file, which lists the words, and texts that come from elsewhere.
fn texts() -> Vec<PathBuf> {
    let is_ours = |path: &PathBuf| {
        let name = shown(path);
        !name.ends_with("tests/structure/vocabulary.rs") && !name.contains("fixtures/") && name != "LICENSE"
    };
    let is_text = |path: &PathBuf| path.extension().is_some_and(|ending| TEXTS.iter().any(|text| ending == *text));
    files(root()).into_iter().filter(is_ours).filter(is_text).collect()
}

fn read_text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned()
}
