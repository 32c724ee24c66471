//! [`ParameterMap`]: which rows of which canonical tensors a parameter is, by its name in any layout. Adapters use it
//! to find the weights that they change.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::{FamilyManifest, Layout};
use crate::manifest::shape::ExpectedTensor;
use crate::mapping::{Mapping, MappingContext};
use clearform_weights::{Dtype, TensorInfo};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A range of a parameter's rows and the canonical rows that they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSegment {
    /// Rows of the parameter in its layout.
    pub from: Range<usize>,
    /// The canonical tensor.
    pub canonical: String,
    /// The first of the rows in the canonical tensor.
    pub to: usize,
}

/// A parameter in some layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutParameter {
    /// Its name in the layout.
    pub name: String,
    /// Its shape in the layout.
    pub shape: Vec<usize>,
    /// Its rows in canonical tensors. If several canonical tensors are copies of the parameter, each has its segments.
    pub segments: Vec<RowSegment>,
    /// Elements of a row in the plain model of the family, if this one takes further channels of a control image or a
    /// mask.
    pub plain_columns: Option<usize>,
    /// Elements of a row once the model takes a control image beside its latents, if this is where it takes them and this
    /// one does not.
    pub control_columns: Option<usize>,
}

/// Every parameter of a model by its names in all layouts.
#[derive(Debug, Clone, Default)]
pub struct ParameterMap {
    /// By name, with underscores in place of dots as in LoRA files of kohya.
    parameters: BTreeMap<String, LayoutParameter>,
    /// The parts of fused parameters by their numbers, as in LoRA files of OneTrainer ("qkv.0" is the query's), and
    /// other names that only adapters have.
    parts: BTreeMap<String, LayoutParameter>,
    /// With underscores too, longest first.
    prefixes: Vec<String>,
}

impl ParameterMap {
    /// The parameters of a model of `sizes` by their names in all layouts of its family.
    pub(crate) fn new(manifest: &FamilyManifest, sizes: &ConfigValues) -> Self {
        let mut map = Self::default();
        // With a dtype of one byte, the byte ranges of a mapping are ranges of elements.
        let canonical = manifest.expected(sizes).into_iter().filter_map(|expected| {
            let shape = expected.shape.into_iter().collect::<Option<Vec<_>>>()?;
            Some(TensorInfo { name: expected.name, dtype: Dtype::U8, shape })
        });
        let canonical: Vec<_> = canonical.map(|info| (info.name.clone(), info)).collect();
        let context = MappingContext { family: manifest, sizes: Some(sizes) };
        let plain_columns = plain_columns(manifest, sizes);
        let control_columns = control_columns(manifest, sizes);
        for layout in &manifest.layouts {
            map.prefixes.extend(layout.prefixes.iter().map(|prefix| underscored(prefix)));
            let foreign = Mapping::new(&layout.outward, &canonical, context).tensors.into_values();
            let foreign: Vec<_> = foreign.map(|tensor| (tensor.info.name.clone(), tensor.info)).collect();
            let inward = Mapping::new(&layout.inward, &foreign, context);
            for (name, info) in foreign {
                let segments = segments(&name, &inward);
                let of = |columns: &BTreeMap<String, usize>| columns.get(&segments.first()?.canonical).copied();
                let [plain_columns, control_columns] = [of(&plain_columns), of(&control_columns)];
                let parameter = LayoutParameter { name, shape: info.shape, segments, plain_columns, control_columns };
                map.add(parameter, layout);
            }
        }
        map.prefixes.sort_by_key(|prefix| std::cmp::Reverse(prefix.len()));
        map.prefixes.dedup();
        map
    }

    /// Adds a parameter of `layout` under its name, its further names in adapters, and its parts.
    fn add(&mut self, parameter: LayoutParameter, layout: &Layout) {
        for part in parts(&parameter) {
            self.parts.entry(underscored(&part.name)).or_insert(part);
        }
        for (alias, name) in &layout.adapter_names {
            if let Some(captures) = name.captures(&parameter.name) {
                self.parts.entry(underscored(&alias.fill(captures))).or_insert_with(|| parameter.clone());
            }
        }
        self.parameters.entry(underscored(&parameter.name)).or_insert(parameter);
    }

    /// The parameter `name` of any layout, with dots or underscores and with any prefix of the layouts.
    /// `<module>.weight` also finds a module's only parameter if it is called "scale" or has the module's name.
    pub fn find(&self, name: &str) -> Option<&LayoutParameter> {
        let name = underscored(name);
        let module = name.strip_suffix("_weight");
        let others = module.map(|module| [module.to_owned(), format!("{module}_scale")]);
        self.find_underscored(&name).or_else(|| others?.iter().find_map(|name| self.find_underscored(name)))
    }

    fn find_underscored(&self, name: &str) -> Option<&LayoutParameter> {
        let stripped = self.prefixes.iter().filter_map(|prefix| name.strip_prefix(prefix.as_str()));
        stripped.filter_map(|name| self.parameters.get(name).or_else(|| self.parts.get(name))).next()
    }

    /// The names in all layouts of the parameters that have rows of `canonical`.
    pub fn names<'a>(&'a self, canonical: &'a str) -> impl Iterator<Item = &'a str> {
        let has_rows =
            move |parameter: &&LayoutParameter| parameter.segments.iter().any(|segment| segment.canonical == canonical);
        self.parameters.values().filter(has_rows).map(|parameter| parameter.name.as_str())
    }

    /// The parameters of a model with a single layout, such as a text encoder, whose names may have `prefix` or not.
    pub fn of_tensors(tensors: &[TensorInfo], prefix: &str) -> Self {
        let keyed_parameter = |info: &TensorInfo| {
            let rows = info.shape.first().copied().unwrap_or(1);
            let segments = vec![RowSegment { from: 0..rows, canonical: info.name.clone(), to: 0 }];
            let key = underscored(info.name.strip_prefix(prefix).unwrap_or(&info.name));
            let shape = info.shape.clone();
            let name = info.name.clone();
            (key, LayoutParameter { name, shape, segments, plain_columns: None, control_columns: None })
        };
        Self {
            parameters: tensors.iter().map(keyed_parameter).collect(),
            parts: BTreeMap::new(),
            prefixes: vec![underscored(prefix), String::new()],
        }
    }
}

/// The canonical rows of the foreign tensor `name`. Elements have one byte here.
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

/// The parts of a parameter that the canonical model has as tensors of their own, called `<module>.<number>.weight`;
/// none if it is a whole tensor.
fn parts(parameter: &LayoutParameter) -> Vec<LayoutParameter> {
    let LayoutParameter { name, shape, segments, .. } = parameter;
    let names: BTreeSet<&String> = segments.iter().map(|segment| &segment.canonical).collect();
    let follow_each_other = segments.windows(2).all(|pair| pair[0].from.end == pair[1].from.start);
    let (Some((module, kind)), true) = (name.rsplit_once('.'), follow_each_other) else { return Vec::new() };
    if segments.len() < 2 || names.len() < segments.len() {
        return Vec::new();
    }
    let part = |(number, segment): (usize, &RowSegment)| {
        let rows = segment.from.len();
        let shape = std::iter::once(rows).chain(shape.iter().skip(1).copied()).collect();
        let segments = vec![RowSegment { from: 0..rows, ..segment.clone() }];
        let name = format!("{module}.{number}.{kind}");
        LayoutParameter { name, shape, segments, plain_columns: None, control_columns: None }
    };
    segments.iter().enumerate().map(part).collect()
}

/// Elements of a row of the tensors that have fewer in the plain model of the family, which takes as many channels as
/// it predicts.
fn plain_columns(manifest: &FamilyManifest, sizes: &ConfigValues) -> BTreeMap<String, usize> {
    let [inputs, outputs] = ["in_channels", "out_channels"].map(|key| sizes.integer(key));
    let Some(outputs) = outputs.filter(|outputs| inputs.is_some_and(|inputs| inputs > *outputs)) else {
        return BTreeMap::new();
    };
    columns_with(manifest, sizes, outputs)
}

/// Elements of a row of the tensors that have more in a model which takes a control image beside its latents: twice the
/// channels. Empty if this one takes more than its latents already.
fn control_columns(manifest: &FamilyManifest, sizes: &ConfigValues) -> BTreeMap<String, usize> {
    let [inputs, outputs] = ["in_channels", "out_channels"].map(|key| sizes.integer(key));
    let plain = inputs.filter(|_| inputs == outputs);
    plain.map(|channels| columns_with(manifest, sizes, 2 * channels)).unwrap_or_default()
}

/// Elements of a row, in a model of `sizes` but for `channels` at its input, of the tensors whose shapes that changes.
fn columns_with(manifest: &FamilyManifest, sizes: &ConfigValues, channels: usize) -> BTreeMap<String, usize> {
    let mut other = sizes.clone();
    other.set("in_channels".to_owned(), channels.into());
    let pairs = manifest.expected(sizes).into_iter().zip(manifest.expected(&other));
    let changed = pairs.filter(|(actual, other)| actual.shape != other.shape).map(|(_, other)| other);
    let columns =
        |tensor: ExpectedTensor| Some((tensor.name, tensor.shape.into_iter().skip(1).product::<Option<usize>>()?));
    changed.filter_map(columns).collect()
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

    /// A FLUX with 2 double and 1 single blocks and a width of 8.
    fn flux() -> Identified {
        let config = json!({
            "width": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 4,
            "num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5, "guidance_embeds": true,
            "axes_dims_rope": [0, 2, 2],
        });
        let manifests = Manifests::embedded().unwrap();
        let zeros =
            |shape: &[usize]| candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu);
        let expected = manifests.expected("flux", &config).unwrap().into_iter();
        let source: InMemoryTensors = expected
            .filter_map(|tensor| {
                Some((tensor.name, zeros(&tensor.shape.into_iter().collect::<Option<Vec<_>>>()?).unwrap()))
            })
            .collect();
        let sidecar = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
        detect_source(&source, sidecar, &manifests, &Hints::default()).unwrap()
    }

    fn segments_of(map: &ParameterMap, name: &str) -> Vec<(Range<usize>, String, usize)> {
        let parameter = map.find(name).unwrap_or_else(|| panic!("{name}"));
        let segments = parameter.segments.iter();
        segments.map(|segment| (segment.from.clone(), segment.canonical.clone(), segment.to)).collect()
    }

    #[test]
    fn names_of_every_layout_with_dots_or_underscores_are_found() {
        let map = flux().parameter_map();
        let canonical = "transformer_blocks.1.ff.net.2.weight";
        for name in [
            canonical,
            "double_blocks.1.img_mlp.2.weight",
            "double_blocks_1_img_mlp_2.weight",
            "model.diffusion_model.double_blocks.1.img_mlp.2.weight",
            "diffusion_model.double_blocks.1.img_mlp.2.weight",
            "transformer_blocks_1_ff_net_2_weight",
        ] {
            assert_eq!(segments_of(&map, name), [(0..8, canonical.to_owned(), 0)], "{name}");
        }
        assert_eq!(map.find("double_blocks.2.img_mlp.2.weight"), None);
        let norm = "transformer_blocks.1.attn.norm_q.weight";
        for name in [
            norm,
            "double_blocks.1.img_attn.norm.query_norm.weight",
            "double_blocks_1_img_attn_norm_query_norm_scale_weight",
        ] {
            assert_eq!(segments_of(&map, name), [(0..4, norm.to_owned(), 0)], "{name}");
        }
        let names: Vec<&str> = map.names(canonical).collect();
        assert_eq!(names, ["double_blocks.1.img_mlp.2.weight", canonical]);
    }

    #[test]
    fn rows_of_fused_and_swapped_tensors_are_found() {
        let map = flux().parameter_map();
        let single = "single_transformer_blocks.0";
        let expected = [
            (0..8, format!("{single}.attn.to_q.weight"), 0),
            (8..16, format!("{single}.attn.to_k.weight"), 0),
            (16..24, format!("{single}.attn.to_v.weight"), 0),
            (24..56, format!("{single}.proj_mlp.weight"), 0),
        ];
        assert_eq!(segments_of(&map, "single_blocks.0.linear1.weight"), expected);
        assert_eq!(map.find("single_blocks.0.linear1.weight").unwrap().shape, [56, 8]);
        let swapped = "norm_out.linear.bias".to_owned();
        let expected = [(0..8, swapped.clone(), 8), (8..16, swapped, 0)];
        assert_eq!(segments_of(&map, "final_layer.adaLN_modulation.1.bias"), expected);
    }

    #[test]
    fn no_two_parameters_share_a_name_with_underscores() {
        let identified = flux();
        let map = identified.parameter_map();
        let names: std::collections::BTreeSet<&String> = map.parameters.values().map(|one| &one.name).collect();
        assert_eq!(names.len(), map.parameters.len());
        for expected in identified.expected().into_iter().filter(|expected| !expected.optional) {
            assert_eq!(map.find(&expected.name).unwrap().name, expected.name);
        }
    }
}
