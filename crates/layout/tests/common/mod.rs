//! A source of tensors with made-up values, FLUX models of any size, and models of every family ([`models`]).
#![allow(dead_code, clippy::unwrap_used)]

pub mod models;

use clearform_layout::{CanonicalSource, Hints, Identified, LayoutError, Manifests, Sidecar, detect_source};
use clearform_weights::{Dtype, RawTensor, Result, TensorInfo, TensorSource, WeightsError};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Tensors whose bytes are derived from their names.
#[derive(Debug, Clone, Default)]
pub struct Fake {
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Fake {
    pub fn put(&mut self, name: &str, shape: &[usize]) {
        let info = TensorInfo { name: name.to_owned(), dtype: Dtype::BF16, shape: shape.to_vec() };
        self.tensors.insert(name.to_owned(), info);
    }

    pub fn of(names: &[&str]) -> Self {
        let mut fake = Self::default();
        names.iter().for_each(|name| fake.put(name, &[4, 4]));
        fake
    }

    /// The same tensors with `prefix` before their names.
    pub fn with_prefix(&self, prefix: &str) -> Self {
        let mut fake = Self::default();
        self.tensors.iter().for_each(|(name, info)| fake.put(&format!("{prefix}{name}"), &info.shape));
        fake
    }

    /// Names and shapes of another source.
    pub fn like(source: &dyn TensorSource) -> Self {
        Self { tensors: source.tensors().into_iter().map(|info| (info.name.clone(), info)).collect() }
    }
}

impl TensorSource for Fake {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors.values().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).cloned()
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        let info = self.info(name).ok_or(WeightsError::Missing { name: name.to_owned() })?;
        let size = info.shape.iter().product::<usize>() * info.dtype.bitsize() / 8;
        let mut state = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        Ok(RawTensor { dtype: info.dtype, shape: info.shape, bytes: (0..size).map(|_| next()).collect() })
    }
}

/// Sizes of a FLUX model.
#[derive(Debug, Clone, Copy)]
pub struct Flux {
    pub double: usize,
    pub single: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub channels: usize,
    pub guidance: bool,
}

pub const TINY: Flux = Flux { double: 2, single: 3, heads: 2, head_dim: 8, channels: 64, guidance: true };

impl Flux {
    /// The tensors of diffusers' transformer: the list of FLUX.1-dev with these sizes.
    pub fn diffusers(self) -> Fake {
        let mut fake = Fake::default();
        for line in include_str!("../data/flux1_dev.txt").lines() {
            let (name, rest) = line.split_once('\t').unwrap();
            let sizes = rest[1..rest.find(']').unwrap()].split(", ");
            let shape: Vec<usize> = sizes.map(|size| self.replace_size(name, size.parse().unwrap())).collect();
            if name.contains("guidance_embedder") && !self.guidance {
                continue;
            }
            let blocks = if name.starts_with("single") { self.single } else { self.double };
            for block in 0..if name.contains("{N}") { blocks } else { 1 } {
                fake.put(&name.replace("{N}", &block.to_string()), &shape);
            }
        }
        fake
    }

    /// The size in this model of what is `size` in FLUX.1-dev.
    fn replace_size(self, name: &str, size: usize) -> usize {
        match size {
            64 if name.starts_with("x_embedder") => self.channels,
            64 if name.starts_with("proj_out") => 64,
            128 => self.head_dim,
            256 | 768 | 4096 => size,
            multiple => multiple / 3072 * self.heads * self.head_dim,
        }
    }

    /// Its config.json.
    pub fn config(self) -> Value {
        let quarter = self.head_dim / 4;
        json!({
            "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.35.2", "patch_size": 1,
            "in_channels": self.channels, "out_channels": if self.channels == 64 { Value::Null } else { 64.into() },
            "num_layers": self.double, "num_single_layers": self.single,
            "attention_head_dim": self.head_dim, "num_attention_heads": self.heads, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": self.guidance,
            "axes_dims_rope": [quarter * 2, quarter, quarter],
        })
    }

    /// The tensors in another layout.
    pub fn foreign(self, layout: &str) -> Fake {
        let source = self.diffusers();
        let identified = detect(&source, Some(&self.config()), &Hints::default()).unwrap();
        let exported = identified.to_layout(layout, &source).unwrap();
        assert_eq!(exported.load_report().unmatched().count(), 0);
        Fake::like(&exported)
    }
}

pub fn manifests() -> Manifests {
    Manifests::embedded().unwrap()
}

pub fn detect(source: &Fake, config: Option<&Value>, hints: &Hints) -> std::result::Result<Identified, LayoutError> {
    detect_source(source, Sidecar { config, metadata: &BTreeMap::new() }, &manifests(), hints)
}

/// Detects and maps.
pub fn open<'a>(source: &'a Fake, config: &Value) -> (Identified, CanonicalSource<&'a Fake>) {
    let identified = detect(source, Some(config), &Hints::default()).unwrap();
    let canonical = identified.canonical(source);
    (identified, canonical)
}
