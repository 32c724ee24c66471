//! [`ParameterMap`]: where a parameter that is named in any layout lies in the model. It moves no bytes: what edits
//! parameters uses it to find their rows.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::FamilyManifest;
use crate::mapping::{Mapping, MappingContext};
use clearform_weights::{Dtype, TensorInfo};
use std::collections::BTreeMap;
use std::ops::Range;

/// Rows of a parameter that are rows of a canonical tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSegment {
    /// Rows of the parameter, as it was named.
    pub from: Range<usize>,
    /// The canonical tensor.
    pub canonical: String,
    /// Its first row that they are.
    pub to: usize,
}

/// A parameter under a name of some layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutParameter {
    /// Its name there.
    pub name: String,
    /// Its extents there.
    pub shape: Vec<usize>,
    /// Where its rows lie; those of a parameter that several canonical tensors share stand once for each.
    pub segments: Vec<RowSegment>,
}

/// Every parameter of a model, under its names in all layouts.
#[derive(Debug, Clone, Default)]
pub struct ParameterMap {
    /// By name with underscores for dots.
    parameters: BTreeMap<String, LayoutParameter>,
    prefixes: Vec<String>,
}

impl ParameterMap {
    /// The parameters of a model of `sizes`, under their names in all layouts of its family.
    pub(crate) fn new(manifest: &FamilyManifest, sizes: &ConfigValues) -> Self {
        let mut addresses = Self::default();
        let known = manifest.expected(sizes).into_iter().filter_map(|expected| {
            let shape = expected.shape.into_iter().collect::<Option<Vec<_>>>()?;
            Some(TensorInfo { name: expected.name, dtype: Dtype::U8, shape })
        });
        let canonical: Vec<_> = known.map(|info| (info.name.clone(), info)).collect();
        let context = MappingContext { family: manifest, sizes: Some(sizes) };
        for layout in &manifest.layouts {
            addresses.prefixes.extend(layout.prefixes.iter().map(|prefix| underscored(prefix)));
            let foreign = Mapping::new(&layout.outward, &canonical, context).tensors.into_values();
            let foreign: Vec<_> = foreign.map(|tensor| (tensor.info.name.clone(), tensor.info)).collect();
            let inward = Mapping::new(&layout.inward, &foreign, context);
            for (name, info) in foreign {
                let segments = segments(&name, &inward);
                let parameter = LayoutParameter { name: name.clone(), shape: info.shape, segments };
                addresses.parameters.entry(underscored(&name)).or_insert(parameter);
            }
        }
        addresses.prefixes.sort_by_key(|prefix| std::cmp::Reverse(prefix.len()));
        addresses.prefixes.dedup();
        addresses
    }

    /// The parameter `name` of any layout, with dots or with underscores in their place, and with any prefix that the
    /// layouts know. A module's "weight" is its one parameter also where that is called "scale", or nothing of its own.
    pub fn find(&self, name: &str) -> Option<&LayoutParameter> {
        let name = underscored(name);
        let module = name.strip_suffix("_weight");
        let others = module.map(|module| [module.to_owned(), format!("{module}_scale")]);
        self.find_underscored(&name).or_else(|| others?.iter().find_map(|name| self.find_underscored(name)))
    }

    fn find_underscored(&self, name: &str) -> Option<&LayoutParameter> {
        let stripped = self.prefixes.iter().filter_map(|prefix| name.strip_prefix(prefix.as_str()));
        stripped.filter_map(|name| self.parameters.get(name)).next()
    }

    /// Every name, in some layout, of the parameters that rows of `canonical` are in.
    pub fn names<'a>(&'a self, canonical: &'a str) -> impl Iterator<Item = &'a str> {
        let holds =
            move |parameter: &&LayoutParameter| parameter.segments.iter().any(|segment| segment.canonical == canonical);
        self.parameters.values().filter(holds).map(|parameter| parameter.name.as_str())
    }

    /// The parameters of `tensors` that have but one layout, a text encoder's say, in which `prefix` may stand before a
    /// name or not.
    pub fn of_tensors(tensors: &[TensorInfo], prefix: &str) -> Self {
        let whole = |info: &TensorInfo| {
            let rows = info.shape.first().copied().unwrap_or(1);
            let segments = vec![RowSegment { from: 0..rows, canonical: info.name.clone(), to: 0 }];
            let key = underscored(info.name.strip_prefix(prefix).unwrap_or(&info.name));
            (key, LayoutParameter { name: info.name.clone(), shape: info.shape.clone(), segments })
        };
        Self { parameters: tensors.iter().map(whole).collect(), prefixes: vec![underscored(prefix), String::new()] }
    }
}

/// Where rows of the foreign tensor `name` went. Sizes are counted in bytes of one each, so bytes are elements here.
fn segments(name: &str, inward: &Mapping) -> Vec<RowSegment> {
    let mut segments = Vec::new();
    for (canonical, assembly) in &inward.tensors {
        let row = assembly.info.shape.iter().skip(1).product::<usize>().max(1);
        let mut to = 0;
        for (tensor, bytes) in assembly.pieces() {
            if tensor == name {
                segments.push(RowSegment {
                    from: bytes.start / row..bytes.end / row,
                    canonical: canonical.clone(),
                    to,
                });
            }
            to += bytes.len() / row;
        }
    }
    segments.sort_by_key(|segment| (segment.from.start, segment.to));
    segments
}

fn underscored(name: &str) -> String {
    name.replace('.', "_")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Hints, Identified, Manifests, Sidecar, detect_source};
    use clearform_weights::InMemoryTensors;
    use serde_json::json;

    /// A FLUX of 2 double and 1 single blocks, 8 wide.
    fn flux() -> Identified {
        let config = json!({
            "width": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 4,
            "num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5, "guidance_embeds": true,
            "axes_dims_rope": [0, 2, 2],
        });
        let manifests = Manifests::embedded().unwrap();
        let zero =
            |shape: &[usize]| candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu);
        let expected = manifests.expected("flux", &config).unwrap().into_iter();
        let source: InMemoryTensors = expected
            .filter_map(|tensor| {
                Some((tensor.name, zero(&tensor.shape.into_iter().collect::<Option<Vec<_>>>()?).unwrap()))
            })
            .collect();
        let beside = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
        detect_source(&source, beside, &manifests, &Hints::default()).unwrap()
    }

    fn lies(addresses: &ParameterMap, name: &str) -> Vec<(Range<usize>, String, usize)> {
        let parameter = addresses.find(name).unwrap_or_else(|| panic!("{name}"));
        parameter.segments.iter().map(|one| (one.from.clone(), one.canonical.clone(), one.to)).collect()
    }

    #[test]
    fn names_of_every_layout_with_dots_or_underscores_are_found() {
        let addresses = flux().parameter_map();
        let canonical = "transformer_blocks.1.ff.net.2.weight";
        for name in [
            canonical,
            "double_blocks.1.img_mlp.2.weight",
            "double_blocks_1_img_mlp_2.weight",
            "model.diffusion_model.double_blocks.1.img_mlp.2.weight",
            "diffusion_model.double_blocks.1.img_mlp.2.weight",
            "transformer_blocks_1_ff_net_2_weight",
        ] {
            assert_eq!(lies(&addresses, name), [(0..8, canonical.to_owned(), 0)], "{name}");
        }
        assert_eq!(addresses.find("double_blocks.2.img_mlp.2.weight"), None);
        let norm = "transformer_blocks.1.attn.norm_q.weight";
        for name in [
            norm,
            "double_blocks.1.img_attn.norm.query_norm.weight",
            "double_blocks_1_img_attn_norm_query_norm_scale_weight",
        ] {
            assert_eq!(lies(&addresses, name), [(0..4, norm.to_owned(), 0)], "{name}");
        }
        let names: Vec<&str> = addresses.names(canonical).collect();
        assert_eq!(names, ["double_blocks.1.img_mlp.2.weight", canonical]);
    }

    #[test]
    fn fused_rows_are_told_apart_and_swapped_halves_swap() {
        let addresses = flux().parameter_map();
        let single = "single_transformer_blocks.0";
        let expected = [
            (0..8, format!("{single}.attn.to_q.weight"), 0),
            (8..16, format!("{single}.attn.to_k.weight"), 0),
            (16..24, format!("{single}.attn.to_v.weight"), 0),
            (24..56, format!("{single}.proj_mlp.weight"), 0),
        ];
        assert_eq!(lies(&addresses, "single_blocks.0.linear1.weight"), expected);
        assert_eq!(addresses.find("single_blocks.0.linear1.weight").unwrap().shape, [56, 8]);
        let swapped = "norm_out.linear.bias".to_owned();
        let expected = [(0..8, swapped.clone(), 8), (8..16, swapped, 0)];
        assert_eq!(lies(&addresses, "final_layer.adaLN_modulation.1.bias"), expected);
    }

    #[test]
    fn no_two_parameters_share_a_name_with_underscores() {
        let identified = flux();
        let addresses = identified.parameter_map();
        let count = addresses
            .parameters
            .values()
            .map(|parameter| parameter.name.clone())
            .collect::<std::collections::BTreeSet<_>>();
        assert_eq!(count.len(), addresses.parameters.len());
        for expected in identified.expected().into_iter().filter(|expected| !expected.optional) {
            assert_eq!(addresses.find(&expected.name).unwrap().name, expected.name);
        }
    }
}
