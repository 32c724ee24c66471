//! A manifest: alone, and together with the embedded ones; each of its families is then detected in a small model.
#![no_main]

use clearform_fuzz::SCRATCH;
use clearform_layout::{Hints, Inspection, Manifests, Sidecar, detect_source};
use clearform_weights::{Dtype, RawTensor, Result, TensorInfo, TensorSource, WeightsError};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::LazyLock;

static EMBEDDED: LazyLock<Manifests> = LazyLock::new(|| Manifests::embedded().expect("the manifests"));
static MODEL: LazyLock<Model> = LazyLock::new(Model::new);

const CONFIG: &str = include_str!("../../tests/fixtures/dit/diffusers/config.json");

/// Names and shapes.
struct Model(BTreeMap<String, TensorInfo>);

impl Model {
    /// A DiT with canonical names.
    fn new() -> Self {
        let mut config: Value = serde_json::from_str(CONFIG).expect("a config.json");
        config["width"] = 40.into();
        let expected = EMBEDDED.expected("dit", &config).expect("a DiT");
        let shape = |shape: Vec<Option<usize>>| shape.into_iter().map(|extent| extent.unwrap_or(1)).collect();
        let describe = |name: String, shape| (name.clone(), TensorInfo { name, dtype: Dtype::BF16, shape });
        Self(expected.into_iter().map(|tensor| describe(tensor.name, shape(tensor.shape))).collect())
    }
}

impl TensorSource for Model {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.values().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).cloned()
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        let missing = || WeightsError::Missing { name: name.to_owned() };
        let TensorInfo { dtype, shape, .. } = self.info(name).ok_or_else(missing)?;
        let bytes = vec![0; shape.iter().product::<usize>() * 2];
        Ok(RawTensor { dtype, shape, bytes })
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let alone = Manifests::alone("manifest.toml", text);
    let together = EMBEDDED.clone().with_file(SCRATCH.write("manifest.toml", bytes));
    [alone, together].into_iter().flatten().for_each(|manifests| identify(&manifests));
});

fn identify(manifests: &Manifests) {
    let sidecar = Sidecar { config: None, metadata: &BTreeMap::new() };
    for family in manifests.families() {
        let hints = Hints { family: Some(family.clone()), ..Hints::default() };
        let Ok(identified) = detect_source(&*MODEL, sidecar, manifests, &hints) else { continue };
        let _ = Inspection::new(&identified, &identified.canonical(&*MODEL)).to_string();
        let Ok(canonical) = identified.canonical(&*MODEL).require_complete() else { continue };
        for layout in manifests.layouts(&family) {
            if let Ok(exported) = identified.to_layout(&layout, &canonical) {
                clearform_fuzz::read(&exported);
            }
        }
    }
}
