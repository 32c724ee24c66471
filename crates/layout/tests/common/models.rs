//! Models of every family and any size: their config.json and their tensors in each layout.

use super::{Fake, detect, manifests};
use clearform_layout::{CanonicalSource, Hints, Identified};
use serde_json::{Value, json};

pub const FAMILIES: [&str; 6] = ["dit", "flux", "minrf", "pixart", "sd3", "sit"];

/// Sizes of a model. `norms` are norms of query and key, `dual` is dual attention, `more` are further conditions:
/// guidance or the image size. Families that do not have one ignore it.
#[derive(Debug, Clone, Copy)]
pub struct Dims {
    pub depth: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub channels: usize,
    pub patch: usize,
    pub norms: bool,
    pub dual: bool,
    pub more: bool,
}

pub const SMALL: Dims =
    Dims { depth: 3, heads: 3, head_dim: 8, channels: 4, patch: 2, norms: true, dual: true, more: true };

/// A model: its config.json and the sizes that config.json does not have.
#[derive(Debug, Clone)]
pub struct Model {
    pub family: &'static str,
    pub config: Value,
    hidden: Value,
}

impl Model {
    pub fn new(family: &'static str, dims: Dims) -> Self {
        let width = dims.heads * dims.head_dim;
        let hidden = json!({ "width": width, "feed_forward_width": 2 * width + 8 });
        let config = match family {
            "flux" => flux(dims),
            "sd3" => sd3(dims),
            "pixart" => pixart(dims),
            "minrf" => minrf(dims),
            _ => dit(dims, family),
        };
        Self { family, config, hidden }
    }

    /// The tensors under canonical names, without the optional ones.
    pub fn canonical(&self) -> Fake {
        let mut config = self.config.clone();
        let hidden = self.hidden.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(hidden);
        let mut fake = Fake::default();
        for expected in manifests().expected(self.family, &config).unwrap().iter().filter(|tensor| !tensor.optional) {
            let shape: Option<Vec<usize>> = expected.shape.iter().copied().collect();
            fake.put(&expected.name, &shape.unwrap());
        }
        fake
    }

    /// The tensors in a layout.
    pub fn foreign(&self, layout: &str) -> Fake {
        let source = self.canonical();
        let identified = detect(&source, Some(&self.config), &Hints::default()).unwrap();
        let exported = identified.to_layout(layout, &source).unwrap();
        assert_eq!(exported.load_report().unmatched().count(), 0);
        Fake::like(&exported)
    }

    /// Detects `source` with this model's config.json and maps it.
    pub fn open<'a>(&self, source: &'a Fake) -> (Identified, CanonicalSource<&'a Fake>) {
        super::open(source, &self.config)
    }
}

fn flux(dims: Dims) -> Value {
    let quarter = dims.head_dim / 4;
    json!({
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": dims.channels, "out_channels": 64,
        "num_layers": dims.depth, "num_single_layers": dims.depth + 1, "attention_head_dim": dims.head_dim,
        "num_attention_heads": dims.heads, "joint_attention_dim": 11, "pooled_projection_dim": 13,
        "guidance_embeds": dims.more, "axes_dims_rope": [2 * quarter, quarter, quarter],
    })
}

fn sd3(dims: Dims) -> Value {
    let dual: Vec<usize> = (0..dims.depth).filter(|number| dims.dual && number % 2 == 0).collect();
    json!({
        "_class_name": "SD3Transformer2DModel", "sample_size": 16, "patch_size": dims.patch,
        "in_channels": dims.channels, "num_layers": dims.depth, "attention_head_dim": dims.head_dim,
        "num_attention_heads": dims.heads, "joint_attention_dim": 11,
        "caption_projection_dim": dims.heads * dims.head_dim, "pooled_projection_dim": 13,
        "out_channels": dims.channels + 1, "pos_embed_max_size": 5, "dual_attention_layers": dual,
        "qk_norm": if dims.norms { "rms_norm".into() } else { Value::Null },
    })
}

fn pixart(dims: Dims) -> Value {
    let width = dims.heads * dims.head_dim;
    json!({
        "_class_name": "PixArtTransformer2DModel", "num_attention_heads": dims.heads,
        "attention_head_dim": dims.head_dim, "in_channels": dims.channels, "out_channels": 2 * dims.channels,
        "num_layers": dims.depth, "cross_attention_dim": width, "sample_size": 8 * dims.patch,
        "patch_size": dims.patch, "caption_channels": 11,
        "use_additional_conditions": dims.more && width.is_multiple_of(3), "interpolation_scale": null,
    })
}

fn dit(dims: Dims, family: &str) -> Value {
    let (class, eps, shift) = match family {
        "dit" => ("DiTTransformer2DModel", 1e-5, 1),
        _ => ("SiTTransformer2DModel", 1e-6, 0),
    };
    json!({
        "_class_name": class, "num_attention_heads": dims.heads, "attention_head_dim": dims.head_dim,
        "in_channels": dims.channels, "out_channels": 2 * dims.channels, "num_layers": dims.depth,
        "sample_size": 8 * dims.patch, "patch_size": dims.patch, "num_embeds_ada_norm": 10, "norm_eps": eps,
        "downscale_freq_shift": shift,
    })
}

fn minrf(dims: Dims) -> Value {
    json!({
        "_class_name": "DiT_Llama", "in_channels": dims.channels, "input_size": 32, "patch_size": dims.patch,
        "dim": dims.heads * dims.head_dim, "n_layers": dims.depth, "n_heads": dims.heads, "num_classes": 10,
        "norm_eps": 1e-5,
    })
}
