//! [`Dequantized`]: a source whose fp8 weights are shown as the numbers that they stand for.
//!
//! fp8 is a format of files: nothing here computes in it. Each fp8 tensor is shown in bf16, which holds every fp8 number;
//! where a scale stands beside it, as the exact product rounded once. Scales are applied or the file is refused: one
//! that is not understood stays in sight, and detection refuses what has it.

use crate::error::{LayoutError, Result};
use crate::manifest::Manifests;
use candle_core::{DType, Tensor};
use clearform_weights::{Checkpoint, Dtype, Fp8, RawTensor, StoredTensor, TensorInfo, TensorSource, WeightsError};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// A source without fp8 and without scales.
#[derive(Debug)]
pub struct Dequantized<S> {
    source: S,
    weights: BTreeMap<String, Fp8Weight>,
    companions: BTreeMap<String, ScaleTensor>,
}

/// What a tensor beside weights is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ScaleTensor {
    /// The weight of this name is multiplied by it.
    ScaleOf(String),
    /// Nothing here has a use for it.
    Spare(&'static str),
}

/// An fp8 tensor and what its numbers are multiplied by.
#[derive(Debug, Clone)]
struct Fp8Weight {
    format: Fp8,
    scales: Scales,
    /// Whether a scale of the file is applied, be it an empty one.
    scaled: bool,
}

#[derive(Debug, Clone)]
enum Scales {
    One(f32),
    PerRow { scales: Vec<f32>, columns: usize },
}

/// What the name of a tensor says that it is.
enum ScaleRole {
    Marker,
    Scale,
    InputScale,
    Description,
}

/// Endings of names, as ComfyUI and those after it have them.
const ENDINGS: [(&str, ScaleRole); 6] = [
    ("scaled_fp8", ScaleRole::Marker),
    ("scale_weight", ScaleRole::Scale),
    ("weight_scale", ScaleRole::Scale),
    ("scale_input", ScaleRole::InputScale),
    ("input_scale", ScaleRole::InputScale),
    ("comfy_quant", ScaleRole::Description),
];

/// Descriptions are a few dozen bytes.
const MOST_DESCRIPTION: usize = 4096;
const REMEDY: &str = "give the bf16, fp16 or plainly scaled fp8 file of the same model";
/// Keys of a description that change nothing in what a weight is.
const HARMLESS: [&str; 2] = ["format", "full_precision_matrix_mult"];

impl Dequantized<Checkpoint> {
    /// Opens the checkpoint at `path`. Scales are read, weights are not.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Self::new`].
    pub fn open(path: impl AsRef<Path>, manifests: &Manifests) -> Result<Self> {
        Self::new(Checkpoint::open(path)?, manifests)
    }

    /// How the file keeps a tensor that is shown; whether scales go with it is said.
    pub(crate) fn stored(&self, name: &str) -> Option<StoredTensor> {
        let mut stored = self.source.stored(name).filter(|_| !self.companions.contains_key(name))?;
        if self.weights.get(name).is_some_and(|weight| weight.scaled) {
            stored.format += " with scales";
        }
        Some(stored)
    }
}

impl<S: TensorSource> Dequantized<S> {
    /// `source` with its scales applied. Components beside the model are left as they are.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`] for a format that is described and is not fp8, [`LayoutError::Weights`] for scales
    /// that do not fit their weight.
    pub fn new(source: S, manifests: &Manifests) -> Result<Self> {
        let mut infos = source.tensors();
        infos.retain(|info| manifests.known.component(&info.name).is_none());
        let weights = infos.iter().filter_map(|info| Some((info.name.clone(), Fp8Weight::plain(info)?))).collect();
        let mut dequantized = Self { source, weights, companions: BTreeMap::new() };
        for info in &infos {
            if let Some((module, role)) = role_of(&info.name) {
                dequantized.place(info, module, role)?;
            }
        }
        dequantized.hold_descriptions()?;
        Ok(dequantized)
    }

    /// What it was made from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The tensors that are not shown.
    pub(crate) fn companions(&self) -> &BTreeMap<String, ScaleTensor> {
        &self.companions
    }

    /// What a person should know of how the weights are read.
    pub(crate) fn note(&self) -> Option<String> {
        let scaled = self.weights.values().filter(|weight| weight.scaled).count();
        let fp8 = self.weights.len();
        (fp8 > 0).then(|| format!("{fp8} tensors are fp8 and read as bf16, {scaled} of them times their scales"))
    }

    fn place(&mut self, info: &TensorInfo, module: &str, role: &ScaleRole) -> Result<()> {
        let weight = format!("{module}weight");
        let companion = match role {
            ScaleRole::Marker if !matches!(info.dtype, Dtype::F32 | Dtype::F8_E4M3 | Dtype::F8_E5M2) => return Ok(()),
            ScaleRole::Marker => ScaleTensor::Spare("a marker: the weights are scaled fp8"),
            ScaleRole::Description => return self.describe(info, &weight),
            ScaleRole::Scale => match self.source.info(&weight) {
                Some(of) => self.scale(info, &of)?,
                None => return Ok(()),
            },
            ScaleRole::InputScale if !self.weights.contains_key(&weight) => return Ok(()),
            ScaleRole::InputScale => ScaleTensor::Spare("a scale of activations in fp8, and none are in fp8 here"),
        };
        self.weights.remove(&info.name);
        self.companions.insert(info.name.clone(), companion);
        Ok(())
    }

    fn scale(&mut self, info: &TensorInfo, of: &TensorInfo) -> Result<ScaleTensor> {
        let companion = ScaleTensor::ScaleOf(of.name.clone());
        let scales = self.read_scales(info, of)?;
        match self.weights.get_mut(&of.name) {
            Some(weight) if weight.scaled => Err(bad(&info.name, format!("{:?} has another scale already", of.name))),
            Some(weight) => {
                (weight.scales, weight.scaled) = (scales, true);
                Ok(companion)
            }
            None if is_whole(of.dtype) && matches!(scales, Scales::One(1.0)) => {
                Ok(ScaleTensor::Spare("a scale of 1 of a weight that is not fp8"))
            }
            None => {
                let found = format!("it scales {:?}, expected in fp8, found in {:?}", of.name, of.dtype);
                Err(bad(&info.name, format!("{found}; {REMEDY}")))
            }
        }
    }

    fn read_scales(&self, info: &TensorInfo, of: &TensorInfo) -> Result<Scales> {
        let rows = of.shape.first().copied().unwrap_or(1);
        let columns = of.shape.iter().skip(1).product();
        let count: Option<usize> = info.shape.iter().try_fold(1usize, |all, extent| all.checked_mul(*extent));
        let per_row = matches!(info.shape[..], [first] | [first, 1] if first == rows);
        if !(matches!(count, Some(0 | 1)) || per_row) {
            let expected = format!("expected one scale or one for each of {rows} rows of {:?}", of.name);
            return Err(bad(&info.name, format!("{expected}, found shape {:?}; {REMEDY}", info.shape)));
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let expected = "expected a scale in F32, F16 or BF16";
            return Err(bad(&info.name, format!("{expected}, found {:?}; {REMEDY}", info.dtype)));
        }
        let numbers = self.source.tensor(&info.name)?.flatten_all().and_then(|all| all.to_dtype(DType::F32));
        let scales: Vec<f32> = numbers.and_then(|all| all.to_vec1()).map_err(WeightsError::from)?;
        match scales[..] {
            _ if scales.iter().any(|scale| !scale.is_finite()) => Err(bad(&info.name, "a scale is not finite".into())),
            [] => Ok(Scales::One(1.0)),
            [scale] => Ok(Scales::One(scale)),
            _ => Ok(Scales::PerRow { scales, columns }),
        }
    }

    /// Takes a description in, if it says what the weight's own format says.
    fn describe(&mut self, info: &TensorInfo, weight: &str) -> Result<()> {
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
            return Err(bad(&info.name, format!("it says that {weight:?} is {format}, found {found:?}")));
        }
        let reason = "a description of fp8 weights, which they agree with";
        self.companions.insert(info.name.clone(), ScaleTensor::Spare(reason));
        Ok(())
    }

    fn read_description(&self, info: &TensorInfo) -> Result<Map<String, Value>> {
        let bytes: usize =
            info.shape.iter().try_fold(1usize, |all, extent| all.checked_mul(*extent)).unwrap_or(usize::MAX);
        if info.dtype != Dtype::U8 || bytes > MOST_DESCRIPTION {
            let found = format!("found {:?} {:?}", info.dtype, info.shape);
            return Err(bad(&info.name, format!("expected JSON in at most {MOST_DESCRIPTION} bytes, {found}")));
        }
        let text = self.source.read(&info.name)?.bytes;
        serde_json::from_slice(&text).map_err(|error| bad(&info.name, format!("expected a JSON object: {error}")))
    }

    /// What is described as scaled must have its scale, be it an empty one.
    fn hold_descriptions(&self) -> Result<()> {
        for name in self.companions.keys() {
            let Some((module, ScaleRole::Description)) = role_of(name) else { continue };
            let has = |scale: &str| self.companions.contains_key(&format!("{module}{scale}"));
            if !has("weight_scale") && !has("scale_weight") {
                return Err(bad(name, format!("it describes a scaled weight, but {module}weight_scale is missing")));
            }
        }
        Ok(())
    }

    fn check_shown(&self, name: &str) -> clearform_weights::Result<()> {
        match self.companions.contains_key(name) {
            true => Err(WeightsError::Missing { name: name.to_owned() }),
            false => Ok(()),
        }
    }
}

impl<S: TensorSource> TensorSource for Dequantized<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors().into_iter().filter_map(|info| self.show(info)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.show(self.source.info(name)?)
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        self.check_shown(name)?;
        let stored = self.source.read(name)?;
        match self.weights.get(name) {
            None => Ok(stored),
            Some(weight) => Ok(RawTensor { dtype: SHOWN, bytes: weight.numbers(&stored.bytes, 0), ..stored }),
        }
    }

    /// Reads no more than the bytes that the range is made of.
    fn read_range(&self, name: &str, range: Range<usize>) -> clearform_weights::Result<Vec<u8>> {
        self.check_shown(name)?;
        let weight = match self.weights.get(name) {
            Some(weight) if range.start <= range.end => weight,
            // The source refuses a range that ends before it starts.
            _ => return self.source.read_range(name, range),
        };
        let (first, end) = (range.start / WIDTH, range.end.div_ceil(WIDTH));
        let mut bytes = weight.numbers(&self.source.read_range(name, first..end)?, first);
        bytes.truncate(range.end - first * WIDTH);
        bytes.drain(..range.start - first * WIDTH);
        Ok(bytes)
    }

    fn tensor(&self, name: &str) -> clearform_weights::Result<Tensor> {
        self.check_shown(name)?;
        match self.weights.contains_key(name) {
            true => self.read(name)?.to_tensor(name),
            false => self.source.tensor(name),
        }
    }
}

const SHOWN: Dtype = Dtype::BF16;
/// Bytes of a number that is shown; a stored one has one.
const WIDTH: usize = 2;

impl<S> Dequantized<S> {
    fn show(&self, info: TensorInfo) -> Option<TensorInfo> {
        match (self.companions.contains_key(&info.name), self.weights.contains_key(&info.name)) {
            (true, _) => None,
            (false, true) => Some(TensorInfo { dtype: SHOWN, ..info }),
            (false, false) => Some(info),
        }
    }
}

impl Fp8Weight {
    fn plain(info: &TensorInfo) -> Option<Self> {
        Some(Self { format: Fp8::of(info.dtype)?, scales: Scales::One(1.0), scaled: false })
    }

    /// The numbers of `stored`, the first of which is the `first` of its tensor.
    fn numbers(&self, stored: &[u8], first: usize) -> Vec<u8> {
        match &self.scales {
            Scales::One(scale) => self.format.to_bf16(stored, *scale),
            Scales::PerRow { scales, columns } => {
                let mut numbers = Vec::with_capacity(stored.len() * WIDTH);
                let mut rest = stored;
                while !rest.is_empty() {
                    let at = first + stored.len() - rest.len();
                    let (row, after) = rest.split_at(rest.len().min(columns - at % columns));
                    numbers.extend(self.format.to_bf16(row, scales[at / columns]));
                    rest = after;
                }
                numbers
            }
        }
    }
}

/// The module that a tensor belongs to, with the dot after it, and what the tensor is to it.
fn role_of(name: &str) -> Option<(&str, &'static ScaleRole)> {
    let fits = |(ending, role): &'static (&str, ScaleRole)| {
        let module = name.strip_suffix(ending)?;
        (module.is_empty() || module.ends_with('.')).then_some((module, role))
    };
    ENDINGS.iter().find_map(fits)
}

fn is_whole(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
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
