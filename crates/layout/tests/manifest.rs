//! Users' manifests: every kind of rule in both directions, and the errors of invalid ones.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{
    ExpectedTensor, Hints, Identified, LayoutError, Manifests, Sidecar, TensorOutcome, detect_source,
};
use clearform_weights::TensorSource;
use common::{Fake, TINY};
use std::collections::BTreeMap;

const TOY: &str = r#"
edition = 1
family = "toy"
class = "ToyModel"
settings = [
  { key = "depth", blocks = "layers.{n}." },
  { key = "width", extent = [["embed.weight", 0]] },
]
tensors = [
  { name = "embed.{p}", shape = ["width", 3] },
  { name = "token", shape = [1, "width"] },
  { name = "layers.{n}.mix.weight", shape = ["3*width", "width"] },
  { name = "layers.{n}.table", shape = [5, 2] },
  { name = "extra.table", shape = [5, 2] },
]

[[layout]]
name = "toy"
present = ["embed.weight", "token"]
prefixes = [""]

[[layout]]
name = "old"
present = ["e.weight"]
prefixes = ["", "m."]
rules = [
  { foreign = "e.{p}", canonical = "embed.{p}" },
  { foreign = "t", canonical = "token", foreign_shape = ["width"] },
  { foreign = ["l.{n}.a", "l.{n}.b"], canonical = "layers.{n}.mix.weight", rows = [1, 2] },
  { foreign = "table", copy = ["layers.{n}.table", "extra.table"] },
  { foreign = "unused.{n}", drop = "a buffer of training" },
]
"#;

fn with(text: &str) -> Result<Manifests, LayoutError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("toy.toml");
    std::fs::write(&path, text).unwrap();
    Manifests::embedded().unwrap().with_file(&path)
}

fn old() -> Fake {
    let mut source = Fake::default();
    for (name, shape) in [
        ("e.weight", &[4, 3][..]),
        ("e.bias", &[4]),
        ("t", &[4]),
        ("l.0.a", &[4, 4]),
        ("l.0.b", &[8, 4]),
        ("l.1.a", &[4, 4]),
        ("l.1.b", &[8, 4]),
        ("table", &[5, 2]),
        ("unused.0", &[9]),
    ] {
        source.put(name, shape);
    }
    source
}

fn identify(source: &Fake) -> Identified {
    let sidecar = Sidecar { config: None, metadata: &BTreeMap::new() };
    detect_source(source, sidecar, &with(TOY).unwrap(), &Hints::default()).unwrap()
}

#[test]
fn joins_reshapes_copies_and_drops_work_in_both_directions() {
    let source = old();
    let identified = identify(&source);
    assert_eq!((identified.family.as_str(), identified.layout.as_str()), ("toy", "old"));
    let canonical = identified.canonical(&source).require_complete().unwrap();
    let bytes = |name: &str| source.read(name).unwrap().bytes;
    let mix = canonical.read("layers.0.mix.weight").unwrap();
    assert_eq!((mix.shape, mix.bytes), (vec![12, 4], [bytes("l.0.a"), bytes("l.0.b")].concat()));
    let token = canonical.read("token").unwrap();
    assert_eq!((token.shape, token.bytes), (vec![1, 4], bytes("t")));
    assert_eq!(canonical.tensor("token").unwrap().dims(), [1, 4]);
    for copy in ["layers.0.table", "layers.1.table", "extra.table"] {
        assert_eq!(canonical.read(copy).unwrap().bytes, bytes("table"));
    }
    let dropped = TensorOutcome::Skipped { reason: "a buffer of training".to_owned() };
    assert_eq!(canonical.load_report().outcomes["unused.0"], dropped);
    let back = identified.to_layout("old", &canonical).unwrap();
    for name in source.tensors.keys().filter(|name| *name != "unused.0") {
        assert_eq!(back.read(name).unwrap(), source.read(name).unwrap(), "{name}");
    }
    assert_eq!(back.tensors().len(), source.tensors.len() - 1);
}

#[test]
fn a_join_needs_all_of_its_inputs() {
    let mut source = old();
    source.tensors.remove("l.0.b");
    source.put("l.0.a", &[4, 4]);
    let canonical = identify(&source).canonical(&source).require_complete().unwrap_err().to_string();
    assert!(canonical.contains("\"l.0.a\"") && canonical.contains("\"l.0.b\", which is missing"), "{canonical}");
}

#[test]
fn a_layout_and_a_variant_are_added_to_a_family() {
    let text = r#"
        edition = 1
        family = "flux"
        [[layout]]
        name = "mine"
        like = "bfl"
        prefixes = ["mine."]
        [[variant]]
        name = "house"
        where = { in_channels = 64 }
        defaults = { guidance = 1.5 }
    "#;
    let manifests = with(text).unwrap();
    let source = TINY.foreign("bfl").with_prefix("mine.");
    let config = TINY.config();
    let sidecar = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
    let identified = detect_source(&source, sidecar, &manifests, &Hints::default()).unwrap();
    assert_eq!((identified.layout.as_str(), identified.variant.name.as_str()), ("mine", "house"));
    assert_eq!((identified.variant.defaults.guidance, identified.variant.defaults.steps), (1.5, 28));
    assert_eq!(identified.canonical(&source).require_complete().unwrap().tensors(), TINY.diffusers().tensors());
}

/// A manifest of an earlier version has the key `part`.
#[test]
fn components_are_added_to_a_family_under_the_old_key_too() {
    let mut source = TINY.foreign("comfy");
    source.put("mine.decoder.conv_in.weight", &[1, 1, 3, 3]);
    for key in ["component", "part"] {
        let text = format!(
            "edition = 1\nfamily = \"flux\"\n[[{key}]]\nname = \"vae\"\nkind = \"vae\"\nprefixes = [\"mine.\"]\n\
             settings = {{ scaling_factor = 0.5 }}"
        );
        let config = TINY.config();
        let sidecar = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
        let identified = detect_source(&source, sidecar, &with(&text).unwrap(), &Hints::default()).unwrap();
        let components = identified.components_in(&source);
        let found: Vec<(&str, &str)> = components.iter().map(|one| (one.name.as_str(), one.prefix.as_str())).collect();
        assert_eq!(found, [("vae", "mine.")], "{key}");
    }
}

const KIN: &str = r#"
edition = 1
family = "kin"
class = "KinModel"
pixels_per_token = "4*side"
optional_components = ["extra"]
settings = [
  { key = "depth", blocks = "layers.{n}." },
  { key = "width", extent = [["embed", 0]] },
  { key = "side", extent = [["table", 0]], over = "2*width", root = true, times = 3, plus = -1 },
  { key = "wide", numbers = "layers.{n}.wide" },
  { key = "kind", present = "layers.{n}.wide", yes = "broad" },
  { key = "scale", optional = true },
  { key = "eps", published = [{ value = 0.5, when = { width = [4, 5] } }, { value = 0.25 }] },
]
tensors = [
  { name = "embed", shape = ["width"] },
  { name = "layers.{n}.mix", shape = ["2*width"], except = "last" },
  { name = "layers.{n}.mix", shape = ["width"], only = "last" },
  { name = "layers.{n}.wide", shape = [7], only = "wide" },
  { name = "layers.{n}.narrow", shape = [1], except = "wide" },
  { name = "broad", shape = [1], when = "kind" },
]
[[layout]]
name = "kin"
present = ["embed"]
prefixes = [""]
[[layout]]
name = "old"
present = ["e"]
prefixes = [""]
settings = { eps = 0.125 }
rules = [
  { foreign = "e", canonical = "embed" },
  { foreign = "l.{n}.mix", canonical = "layers.{n}.mix", except = "last" },
  { foreign = "l.{n}.mix", canonical = "layers.{n}.mix", edit = "swap-halves", only = "last" },
  { foreign = "l.{n}.w", canonical = "layers.{n}.wide", only = "wide" },
  { foreign = "l.{n}.s", canonical = "layers.{n}.narrow", except = "wide" },
  { foreign = "broad", canonical = "broad" },
  { foreign = "table", drop = "seen by its shape" },
]
[[variant]]
name = "broad"
where = { kind = true, wide = true, width = [3, 4] }
[[variant]]
name = "plain"
where = { kind = false, wide = [] }
"#;

/// Every keyword of the notation that the manifest above does not use.
#[test]
fn settings_and_blocks_are_read_as_a_manifest_states() {
    let manifests = Manifests::alone("kin.toml", KIN).unwrap();
    let sizes = serde_json::json!({ "depth": 3, "width": 4, "side": 8, "wide": [1], "kind": "broad" });
    let expected = manifests.expected("kin", &sizes).unwrap();
    let shapes: Vec<(String, Vec<usize>)> = expected
        .into_iter()
        .map(|ExpectedTensor { name, shape, .. }| (name, shape.into_iter().flatten().collect()))
        .collect();
    let named = |name: &str, shape: &[usize]| (name.to_owned(), shape.to_vec());
    let model = [
        named("embed", &[4]),
        named("layers.0.mix", &[8]),
        named("layers.1.mix", &[8]),
        named("layers.2.mix", &[4]),
        named("layers.1.wide", &[7]),
        named("layers.0.narrow", &[1]),
        named("layers.2.narrow", &[1]),
        named("broad", &[1]),
    ];
    assert_eq!(shapes, model);
    let mut source = Fake::default();
    model.iter().for_each(|(name, shape)| source.put(name, shape));
    let sidecar = Sidecar { config: Some(&sizes), metadata: &BTreeMap::new() };
    let identified = detect_source(&source, sidecar, &manifests, &Hints::default()).unwrap();
    let found = serde_json::json!({
        "_class_name": "KinModel", "depth": 3, "width": 4, "side": 8, "wide": [1], "kind": "broad", "scale": null,
        "eps": 0.5,
    });
    assert_eq!((&identified.config, identified.variant.name.as_str()), (&found, "broad"));
    assert_eq!((identified.pixels_per_token(), identified.optional_components()), (32, &["extra".to_owned()][..]));
    let exported = identified.to_layout("old", &source).unwrap();
    assert_eq!(exported.load_report().unmatched().count(), 0);
    let halves = source.read("layers.2.mix").unwrap().bytes;
    assert_eq!(exported.read("l.2.mix").unwrap().bytes, [&halves[4..], &halves[..4]].concat());
    assert_eq!(exported.read("l.1.mix").unwrap(), source.read("layers.1.mix").unwrap());
    assert_eq!(exported.tensors().len(), source.tensors.len());
    let mut old = Fake::like(&exported);
    old.put("table", &[72, 2]);
    let sidecar = Sidecar { config: None, metadata: &BTreeMap::new() };
    let identified = detect_source(&old, sidecar, &manifests, &Hints::default()).unwrap();
    // 72 / (2 * 4) = 9, its root is 3, 3 * 3 - 1 = 8; and this layout has its own eps.
    let mut found = found;
    found["eps"] = 0.125.into();
    assert_eq!(identified.config, found);
    let canonical = identified.canonical(&old).require_complete().unwrap();
    let theirs = old.read("l.2.mix").unwrap().bytes;
    assert_eq!(canonical.read("layers.2.mix").unwrap().bytes, [&theirs[4..], &theirs[..4]].concat());
    assert_eq!(canonical.read("layers.0.mix").unwrap().bytes, old.read("l.0.mix").unwrap().bytes);
    assert_eq!(canonical.load_report().skipped().collect::<Vec<_>>(), [("table", "seen by its shape")]);
}

#[test]
fn broken_manifests_are_explained() {
    for (text, expected) in [
        ("edition = 1", "missing field `family`"),
        (
            "edition = 1\nfamily = \"flux\"\n[[component]]\nname = \"a\"\nkind = \"b\"\nprefixes = [\"a.\"]",
            "component \"a\" is of the unknown kind \"b\"; use one of [\"clip\", \"t5\", \"tae\", \"vae\"]",
        ),
        ("edition = 2\nfamily = \"x\"\nclass = \"X\"", "upgrade"),
        ("edition = 1\nfamily = \"x\"", "needs a class"),
        ("edition = 1\nfamily = \"flux\"\nsurprise = 1", "surprise"),
        (
            "edition = 1\nfamily = \"flux\"\n[[layout]]\nname = \"a\"\nlike = \"b\"\nprefixes = []",
            "is like \"b\", which is unknown",
        ),
        (
            "edition = 1\nfamily = \"flux\"\n[[layout]]\nname = \"a\"\nprefixes = [\"\"]\nrules = [{ foreign = \"a\" }]",
            "exactly one of canonical, split, copy and drop",
        ),
        (
            "edition = 1\nfamily = \"flux\"\n[[layout]]\nname = \"a\"\nprefixes = []\n\
             rules = [{ foreign = \"a\", split = [\"b\", \"c\"], rows = [1] }]",
            "2 shares",
        ),
        (
            "edition = 1\nfamily = \"flux\"\n[[layout]]\nname = \"a\"\nprefixes = []\n\
             rules = [{ foreign = \"a\", canonical = \"b\", only = \"last\" }]",
            "need a {n} on both sides",
        ),
        (
            "edition = 1\nfamily = \"x\"\nclass = \"X\"\ntensors = [{ name = \"a.{n}\", shape = [], only = \"some\" }]",
            "\"some\" is neither \"last\" nor a setting that lists block numbers",
        ),
        ("edition = 1\nfamily = \"x\"\nclass = \"X\"\nlike = \"y\"", "like the family \"y\", which is unknown"),
        (
            "edition = 1\nfamily = \"x\"\nclass = \"X\"\nlike = \"dit\"\ntensors = [{ name = \"a\", shape = [] }]",
            "must not list tensors",
        ),
        ("edition = 1\nfamily = \"flux\"\nlike = \"dit\"", "already a family"),
    ] {
        let error = with(text).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("toy.toml"), "{error:?} does not contain {expected:?}");
    }
}
