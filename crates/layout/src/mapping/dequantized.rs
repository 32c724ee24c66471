//! [`Dequantized`]: a source whose fp8 weights are presented as bf16, with their scales applied.
//!
//! fp8 is a storage format; nothing is computed in it. bf16 holds every fp8 value exactly; with a scale, the exact
//! product is rounded once. Every scale is applied, or the file is refused: a scale that is not understood stays in the
//! list of tensors, and detection refuses files with one.

use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use crate::mapping::load_report::{LoadReport, UncomputableTensor};
use candle_core::{DType, Tensor};
use clearform_weights::{
    Checkpoint, Dtype, Fp8, QuantizedFormat, QuantizedMatrix, RawTensor, StoredTensor, TensorInfo, TensorSource,
    WeightsError, is_weight_dtype,
};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A source that presents fp8 weights as bf16 and hides their scales.
#[derive(Debug)]
pub struct Dequantized<S> {
    source: S,
    weights: BTreeMap<String, Fp8Weight>,
    /// The tensors that are hidden.
    scale_tensors: BTreeMap<String, ScaleTensor>,
}

/// A tensor that belongs to fp8 weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ScaleTensor {
    /// The scale of the weight of this name.
    ScaleOf(String),
    /// A tensor that is not needed, for this reason.
    Unused(&'static str),
}

/// An fp8 weight and its scales.
#[derive(Debug, Clone)]
struct Fp8Weight {
    format: Fp8,
    scales: Scales,
    /// Whether the file has a scale for it. An empty tensor counts as one, of 1.
    scaled: bool,
}

#[derive(Debug, Clone)]
enum Scales {
    PerTensor(f32),
    PerRow { scales: Vec<f32>, columns: usize },
}

/// What a tensor is according to its name.
enum ScaleRole {
    /// Marks the file as scaled fp8.
    Marker,
    /// The scale of a weight.
    Scale,
    /// The scale of a layer's input, for computing in fp8.
    InputScale,
    /// JSON that describes a weight's quantisation.
    Description,
}

/// Endings of names in files for ComfyUI, of older and newer versions.
const ENDINGS: [(&str, ScaleRole); 6] = [
    ("scaled_fp8", ScaleRole::Marker),
    ("scale_weight", ScaleRole::Scale),
    ("weight_scale", ScaleRole::Scale),
    ("scale_input", ScaleRole::InputScale),
    ("input_scale", ScaleRole::InputScale),
    ("comfy_quant", ScaleRole::Description),
];

/// Bytes of a description; real ones have a few dozen.
const MOST_DESCRIPTION: usize = 4096;
const REMEDY: &str = "use the bf16, fp16 or fp8 (one scale per tensor or row) file of the same model";
/// Keys of a description that do not change the values of a weight.
const HARMLESS: [&str; 2] = ["format", "full_precision_matrix_mult"];
/// The dtype in which fp8 weights are presented.
const PRESENTED: Dtype = Dtype::BF16;
/// Bytes of a presented value; a stored one has one.
const WIDTH: usize = 2;

impl Dequantized<Arc<Checkpoint>> {
    /// Opens the checkpoint at `path`, which components in the same file may share. Scales are read, weights are not.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Self::new`].
    pub fn open(path: impl AsRef<Path>, manifests: &Manifests) -> Result<Self> {
        Self::new(Arc::new(Checkpoint::open(path)?), manifests)
    }

    /// How the file stores a tensor that is not hidden, and whether it has scales.
    pub(crate) fn stored(&self, name: &str) -> Option<StoredTensor> {
        let mut stored = self.source.stored(name).filter(|_| !self.scale_tensors.contains_key(name))?;
        if self.weights.get(name).is_some_and(|weight| weight.scaled) {
            stored.format += " with scales";
        }
        Some(stored)
    }
}

impl<S: TensorSource> Dequantized<S> {
    /// `source` with its fp8 weights as bf16. Tensors of components in the same file are left unchanged.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`] if a description names a format other than fp8, [`LayoutError::Weights`] for scales
    /// that do not fit their weight.
    pub fn new(source: S, manifests: &Manifests) -> Result<Self> {
        let mut infos = source.tensors();
        infos.retain(|info| manifests.unsupported.component(&info.name).is_none());
        Self::of_tensors(source, &infos)
    }

    /// `source` with all its fp8 tensors as bf16: for files that hold no components of a pipeline, such as adapters.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn whole(source: S) -> Result<Self> {
        let infos = source.tensors();
        Self::of_tensors(source, &infos)
    }

    fn of_tensors(source: S, infos: &[TensorInfo]) -> Result<Self> {
        let weights = infos.iter().filter_map(|info| Some((info.name.clone(), Fp8Weight::unscaled(info)?))).collect();
        let mut dequantized = Self { source, weights, scale_tensors: BTreeMap::new() };
        for info in infos {
            if let Some((module, role)) = role_of(&info.name) {
                dequantized.add_scale_tensor(info, module, role)?;
            }
        }
        dequantized.check_descriptions()?;
        Ok(dequantized)
    }

    /// The source that it presents.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// Checks that it is not one of the models that are refused whatever family they are of, such as an adapter or a
    /// model in an unsupported quantisation, and that its weights and biases can be computed with.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`], which names what it is, or [`LayoutError::Incomplete`] with the weights.
    pub fn accept(&self, manifests: &Manifests) -> Result<()> {
        let tensors = self.tensors();
        manifests.unsupported.refuse(&tensors.iter().map(|info| info.name.as_str()).collect())?;
        let is_parameter = |info: &&TensorInfo| info.name.ends_with("weight") || info.name.ends_with("bias");
        let uncomputable = tensors.iter().filter(is_parameter).filter_map(UncomputableTensor::of).collect();
        let report = LoadReport { uncomputable, ..LoadReport::default() };
        if report.is_sufficient() { Ok(()) } else { Err(LayoutError::Incomplete(Box::new(report))) }
    }

    /// The tensors that are hidden.
    pub(crate) fn scale_tensors(&self) -> &BTreeMap<String, ScaleTensor> {
        &self.scale_tensors
    }

    /// A note for the user on how fp8 weights are read.
    pub(crate) fn note(&self) -> Option<String> {
        let scaled = self.weights.values().filter(|weight| weight.scaled).count();
        let fp8 = self.weights.len();
        (fp8 > 0).then(|| format!("{fp8} tensors are in fp8, {scaled} of them with scales"))
    }

    /// Hides a tensor that belongs to fp8 weights, and applies it if it is a scale. One that fits no weight stays in
    /// the list, so that detection refuses the file.
    fn add_scale_tensor(&mut self, info: &TensorInfo, module: &str, role: &ScaleRole) -> Result<()> {
        let weight = format!("{module}weight");
        let scale_tensor = match role {
            ScaleRole::Marker if !matches!(info.dtype, Dtype::F32 | Dtype::F8_E4M3 | Dtype::F8_E5M2) => return Ok(()),
            ScaleRole::Marker => ScaleTensor::Unused("a marker: the weights are scaled fp8"),
            ScaleRole::Description => return self.add_description(info, &weight),
            ScaleRole::Scale => match self.source.info(&weight) {
                Some(weight) => self.add_scale(info, &weight)?,
                None => return Ok(()),
            },
            ScaleRole::InputScale if !self.weights.contains_key(&weight) => return Ok(()),
            ScaleRole::InputScale => ScaleTensor::Unused("a scale of fp8 activations, which are not fp8 here"),
        };
        // A marker may itself be fp8.
        self.weights.remove(&info.name);
        self.scale_tensors.insert(info.name.clone(), scale_tensor);
        Ok(())
    }

    /// Applies the scale `info` to `weight`.
    fn add_scale(&mut self, info: &TensorInfo, weight: &TensorInfo) -> Result<ScaleTensor> {
        let TensorInfo { name, dtype, .. } = weight;
        let scales = self.read_scales(info, weight)?;
        match self.weights.get_mut(name) {
            Some(fp8) if fp8.scaled => Err(bad(&info.name, format!("{name:?} has another scale already"))),
            Some(fp8) => {
                fp8.scales = scales;
                fp8.scaled = true;
                Ok(ScaleTensor::ScaleOf(name.clone()))
            }
            None if is_weight_dtype(*dtype) && matches!(scales, Scales::PerTensor(1.0)) => {
                Ok(ScaleTensor::Unused("a scale of 1 of a weight that is not fp8"))
            }
            None => {
                let found = format!("it scales {name:?}, expected in fp8, found in {dtype:?}");
                Err(bad(&info.name, format!("{found}; {REMEDY}")))
            }
        }
    }

    /// Reads the scales `info` of `weight`: one, or one per row. An empty tensor stands for a scale of 1.
    fn read_scales(&self, info: &TensorInfo, weight: &TensorInfo) -> Result<Scales> {
        let rows = weight.shape.first().copied().unwrap_or(1);
        let columns = weight.shape.iter().skip(1).product();
        let is_per_row = matches!(info.shape[..], [first] | [first, 1] if first == rows);
        if !(matches!(element_count(info), Some(0 | 1)) || is_per_row) {
            let expected = format!("expected one scale or one for each of {rows} rows of {:?}", weight.name);
            return Err(bad(&info.name, format!("{expected}, found shape {:?}; {REMEDY}", info.shape)));
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let expected = "expected a scale in F32, F16 or BF16";
            return Err(bad(&info.name, format!("{expected}, found {:?}; {REMEDY}", info.dtype)));
        }
        let values = self.source.tensor(&info.name)?.flatten_all().and_then(|all| all.to_dtype(DType::F32));
        let scales: Vec<f32> = values.and_then(|all| all.to_vec1()).map_err(WeightsError::from)?;
        match scales[..] {
            _ if scales.iter().any(|scale| !scale.is_finite()) => Err(bad(&info.name, "a scale is not finite".into())),
            [] => Ok(Scales::PerTensor(1.0)),
            [scale] => Ok(Scales::PerTensor(scale)),
            _ => Ok(Scales::PerRow { scales, columns }),
        }
    }

    /// Hides a description that agrees with the dtype of its weight.
    fn add_description(&mut self, info: &TensorInfo, weight: &str) -> Result<()> {
        let description = self.read_description(info)?;
        let format = description.get("format").and_then(Value::as_str).unwrap_or_default();
        let described = match format {
            "float8_e4m3fn" | "float8_e4m3fn_rowwise" => Fp8::E4M3,
            "float8_e5m2" => Fp8::E5M2,
            _ => return Err(unsupported(&info.name, &format!("in the format {format:?}"))),
        };
        if let Some(key) = description.keys().find(|key| !HARMLESS.contains(&key.as_str())) {
            return Err(unsupported(&info.name, &format!("in the format {format:?} with {key:?}")));
        }
        if self.weights.get(weight).is_none_or(|weight| weight.format != described) {
            let found = self.source.info(weight).map(|info| info.dtype);
            return Err(bad(&info.name, format!("it describes {weight:?} as {format}, found {found:?}")));
        }
        let reason = "a description of an fp8 weight, which it agrees with";
        self.scale_tensors.insert(info.name.clone(), ScaleTensor::Unused(reason));
        Ok(())
    }

    fn read_description(&self, info: &TensorInfo) -> Result<Map<String, Value>> {
        if info.dtype != Dtype::U8 || element_count(info).is_none_or(|bytes| bytes > MOST_DESCRIPTION) {
            let found = format!("found {:?} {:?}", info.dtype, info.shape);
            return Err(bad(&info.name, format!("expected JSON in at most {MOST_DESCRIPTION} bytes, {found}")));
        }
        let text = self.source.read(&info.name)?.bytes;
        serde_json::from_slice(&text).map_err(|error| bad(&info.name, format!("expected a JSON object: {error}")))
    }

    /// A weight with a description must have a scale, even if an empty one.
    fn check_descriptions(&self) -> Result<()> {
        for name in self.scale_tensors.keys() {
            let Some((module, ScaleRole::Description)) = role_of(name) else { continue };
            let has_scale = |scale: &str| self.scale_tensors.contains_key(&format!("{module}{scale}"));
            if !has_scale("weight_scale") && !has_scale("scale_weight") {
                return Err(bad(name, format!("it describes a scaled weight, but {module}weight_scale is missing")));
            }
        }
        Ok(())
    }

    fn check_visible(&self, name: &str) -> clearform_weights::Result<()> {
        match self.scale_tensors.contains_key(name) {
            true => Err(WeightsError::Missing { name: name.to_owned() }),
            false => Ok(()),
        }
    }
}

impl<S: TensorSource> TensorSource for Dequantized<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors().into_iter().filter_map(|info| self.present(info)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.present(self.source.info(name)?)
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        self.check_visible(name)?;
        let stored = self.source.read(name)?;
        match self.weights.get(name) {
            None => Ok(stored),
            Some(weight) => Ok(RawTensor { dtype: PRESENTED, bytes: weight.to_bf16(&stored.bytes, 0), ..stored }),
        }
    }

    /// Reads only the fp8 bytes that the range needs.
    fn read_range(&self, name: &str, range: Range<usize>) -> clearform_weights::Result<Vec<u8>> {
        self.check_visible(name)?;
        let weight = match self.weights.get(name) {
            Some(weight) if range.start <= range.end => weight,
            // The source refuses a range that ends before it starts.
            _ => return self.source.read_range(name, range),
        };
        let first = range.start / WIDTH;
        let end = range.end.div_ceil(WIDTH);
        let mut bytes = weight.to_bf16(&self.source.read_range(name, first..end)?, first);
        bytes.truncate(range.end - first * WIDTH);
        bytes.drain(..range.start - first * WIDTH);
        Ok(bytes)
    }

    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> clearform_weights::Result<Option<QuantizedMatrix>> {
        self.check_visible(name)?;
        let Some(weight) = self.weights.get(name) else { return self.source.quantized_rows(name, rows) };
        match self.source.info(name).map(|info| info.shape).unwrap_or_default()[..] {
            [count, columns] if rows.end <= count => {
                let bytes = self.source.read_range(name, rows.start * columns..rows.end * columns)?;
                weight.rows(&rows, columns, bytes).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn tensor(&self, name: &str) -> clearform_weights::Result<Tensor> {
        self.check_visible(name)?;
        match self.weights.contains_key(name) {
            true => self.read(name)?.to_tensor(name),
            false => self.source.tensor(name),
        }
    }
}

impl<S> Dequantized<S> {
    /// A tensor of the source as it is presented; `None` if it is hidden.
    fn present(&self, info: TensorInfo) -> Option<TensorInfo> {
        if self.scale_tensors.contains_key(&info.name) {
            None
        } else if self.weights.contains_key(&info.name) {
            Some(TensorInfo { dtype: PRESENTED, ..info })
        } else {
            Some(info)
        }
    }
}

impl Fp8Weight {
    /// The tensor `info` as an fp8 weight without a scale, if it is fp8.
    fn unscaled(info: &TensorInfo) -> Option<Self> {
        Some(Self { format: Fp8::of(info.dtype)?, scales: Scales::PerTensor(1.0), scaled: false })
    }

    /// The rows `rows` of a matrix, whose values are `bytes`.
    fn rows(&self, rows: &Range<usize>, columns: usize, bytes: Vec<u8>) -> clearform_weights::Result<QuantizedMatrix> {
        let scales = match &self.scales {
            Scales::PerTensor(scale) => vec![*scale],
            Scales::PerRow { scales, .. } => scales[rows.clone()].to_vec(),
        };
        QuantizedMatrix::new(QuantizedFormat::Fp8(self.format), [rows.len(), columns], bytes, scales)
    }

    /// The values of `stored`, a range of the tensor that begins at its element `first`.
    fn to_bf16(&self, stored: &[u8], first: usize) -> Vec<u8> {
        match &self.scales {
            Scales::PerTensor(scale) => self.format.to_bf16(stored, *scale),
            Scales::PerRow { scales, columns } => {
                let mut values = Vec::with_capacity(stored.len() * WIDTH);
                let mut rest = stored;
                while !rest.is_empty() {
                    let at = first + stored.len() - rest.len();
                    let (row, after) = rest.split_at(rest.len().min(columns - at % columns));
                    values.extend(self.format.to_bf16(row, scales[at / columns]));
                    rest = after;
                }
                values
            }
        }
    }
}

/// The module that a tensor belongs to, with the dot after it, and its role there.
fn role_of(name: &str) -> Option<(&str, &'static ScaleRole)> {
    let role_by_ending = |(ending, role): &'static (&str, ScaleRole)| {
        let module = name.strip_suffix(ending)?;
        (module.is_empty() || module.ends_with('.')).then_some((module, role))
    };
    ENDINGS.iter().find_map(role_by_ending)
}

/// Elements of a tensor; `None` if their number overflows.
fn element_count(info: &TensorInfo) -> Option<usize> {
    info.shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size))
}

fn bad(name: &str, reason: String) -> LayoutError {
    WeightsError::BadTensor { name: name.to_owned(), reason }.into()
}

fn unsupported(name: &str, what: &str) -> LayoutError {
    LayoutError::Unsupported {
        name: format!("a model quantised {what}"),
        evidence: format!("tensor {name:?}"),
        remedy: REMEDY.to_owned(),
    }
}
