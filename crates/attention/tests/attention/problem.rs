//! Test problems: random inputs, the fused kernel and the reference on them, and the distance between results.

use candle_core::{DType, Device, Result, Tensor, Var};
use clearform_attention::{
    Attended, Attention, AttentionPlan, Geometry, Policy, Qkv, TileShape, TiledAttention, TokenGrid, Window, reference,
};
use clearform_ops::ProductPrecision;
use clearform_ops::simd::CpuFeatures;

/// The size and plan of a problem.
#[derive(Debug, Clone)]
pub struct Case {
    pub grids: Vec<(usize, usize)>,
    pub text: usize,
    /// Whether there is a text stream even without text tokens.
    pub empty_stream: bool,
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub plan: String,
    pub mask: Mask,
    /// Shape of the cells that order the tokens.
    pub cell: (usize, usize),
    pub features: CpuFeatures,
}

/// Which text tokens are visible.
#[derive(Debug, Clone, Copy)]
pub enum Mask {
    /// No mask.
    None,
    /// In batch entry i the first tokens, 3 i fewer than this.
    First(usize),
    /// A pseudorandom choice by this seed, about three quarters.
    Some(usize),
}

pub fn case(grids: &[(usize, usize)], text: usize, plan: &str) -> Case {
    Case {
        grids: grids.to_vec(),
        text,
        empty_stream: false,
        batch: 1,
        heads: 2,
        head_dim: 8,
        plan: plan.to_owned(),
        mask: Mask::None,
        cell: (4, 4),
        features: CpuFeatures::detect(),
    }
}

/// The tensors of a problem in the order text q k v, image q k v, weight of the pooled cells.
#[derive(Clone)]
pub struct Inputs {
    pub case: Case,
    pub geometry: Geometry,
    pub tensors: Vec<Tensor>,
}

pub type Attend = fn(&Inputs, &[Tensor]) -> Result<Attended>;

pub fn noise(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product();
    let value = |i: usize| 1.5 * ((i * 7919 + seed * 104_729 + 13) as f64 * 0.618).sin();
    let values: Vec<f64> = (0..count).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

impl Case {
    pub fn geometry(&self) -> Geometry {
        let grids = self.grids.iter().map(|(height, width)| TokenGrid::new(*height, *width).unwrap()).collect();
        let cell = TileShape::new(self.cell.0, self.cell.1).unwrap();
        let geometry = Geometry::in_cells(grids, cell).unwrap();
        let is_visible = |i: usize| match self.mask {
            Mask::None => true,
            Mask::First(first) => i % self.text + 3 * (i / self.text) < first,
            Mask::Some(seed) => (((i + 1) * (2 * seed + 1) * 40_503) >> 8) & 3 != 0,
        };
        if matches!(self.mask, Mask::None) || self.text == 0 {
            return geometry;
        }
        let mask = (0..self.batch * self.text).map(|i| u8::from(is_visible(i))).collect();
        geometry.with_text_mask(Tensor::from_vec(mask, (self.batch, self.text), &Device::Cpu).unwrap())
    }
}

impl Inputs {
    /// Noise, rounded to `dtype`.
    pub fn new(case: Case, dtype: DType) -> Self {
        let geometry = case.geometry();
        let shape = |tokens| vec![case.batch, tokens, case.heads, case.head_dim];
        let mut tensors: Vec<Tensor> = (0..3).map(|seed| noise(&shape(case.text), seed)).collect();
        tensors.extend((3..6).map(|seed| noise(&shape(geometry.tokens()), seed)));
        if let Some(weight) = initial_weight(&case) {
            let learned = weight.to_dtype(DType::F64).unwrap() + (noise(weight.dims(), 7) * 0.02).unwrap();
            tensors.push(learned.unwrap());
        }
        Self { case, geometry, tensors }.converted(dtype)
    }

    /// The same values in f64, so that results over them do not contain the rounding of the inputs.
    pub fn exact(&self) -> Self {
        self.clone().converted(DType::F64)
    }

    pub fn with_features(&self, features: CpuFeatures) -> Self {
        Self { case: Case { features, ..self.case.clone() }, ..self.clone() }
    }

    fn converted(mut self, dtype: DType) -> Self {
        self.tensors.iter_mut().for_each(|tensor| *tensor = tensor.to_dtype(dtype).unwrap());
        self
    }

    pub fn has_text(&self) -> bool {
        self.case.text > 0 || self.case.empty_stream
    }

    fn window(&self, tensors: &[Tensor]) -> Window {
        let radius = match plan(&self.case).default_policy() {
            Policy::Clear { radius, .. } => Some(radius),
            _ => None,
        };
        Window { radius, pool: tensors.get(6).cloned() }
    }

    fn text(&self, tensors: &[Tensor]) -> Option<Qkv> {
        self.has_text().then(|| qkv(&tensors[..3]))
    }
}

fn plan(case: &Case) -> AttentionPlan {
    case.plan.parse().unwrap()
}

fn initial_weight(case: &Case) -> Option<Tensor> {
    plan(case).learned("layer").unwrap().map(|(_, weight)| weight)
}

fn qkv(tensors: &[Tensor]) -> Qkv {
    Qkv { query: tensors[0].clone(), key: tensors[1].clone(), value: tensors[2].clone() }
}

/// The fused kernel with the instruction set of the case.
pub fn fused(inputs: &Inputs, tensors: &[Tensor]) -> Result<Attended> {
    let attention = TiledAttention::new(inputs.window(tensors)).with_features(inputs.case.features);
    attention.attend(qkv(&tensors[3..]), inputs.text(tensors), &inputs.geometry)
}

/// The attention that the plan builds.
pub fn planned(inputs: &Inputs, tensors: &[Tensor]) -> Result<Attended> {
    let attention =
        plan(&inputs.case).build("layer", &|_: &str| Ok(tensors.get(6).cloned()), ProductPrecision::Full)?;
    attention.attend(qkv(&tensors[3..]), inputs.text(tensors), &inputs.geometry)
}

pub fn plain(inputs: &Inputs, tensors: &[Tensor]) -> Result<Attended> {
    reference::attend(qkv(&tensors[3..]), inputs.text(tensors), &inputs.geometry, &inputs.window(tensors))
}

pub fn elements(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn size(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

pub fn difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    size(&got.iter().zip(want).map(|(a, b)| a - b).collect::<Vec<_>>())
}

pub fn distance(got: &[f64], want: &[f64]) -> f64 {
    difference(got, want) / size(want).max(f64::MIN_POSITIVE)
}

/// Text and image, concatenated.
pub fn output(attended: &Attended) -> Vec<f64> {
    let mut values = attended.text.as_ref().map(elements).unwrap_or_default();
    values.extend(elements(&attended.image));
    values
}

/// The output of `attend` for the inputs.
pub fn result(inputs: &Inputs, attend: Attend) -> Vec<f64> {
    output(&attend(inputs, &inputs.tensors).unwrap())
}

/// Σ out · probe over both streams.
pub fn loss(inputs: &Inputs, tensors: &[Tensor], attend: Attend) -> Tensor {
    let attended = attend(inputs, tensors).unwrap();
    let total = |out: &Tensor, seed: usize| {
        let probe = noise(out.dims(), seed).to_dtype(out.dtype()).unwrap();
        (out * probe).unwrap().sum_all().unwrap()
    };
    let image = total(&attended.image, 98);
    let text = attended.text.filter(|text| text.elem_count() > 0);
    text.map_or(image.clone(), |text| (image + total(&text, 99)).unwrap())
}

pub fn gradients(inputs: &Inputs, attend: Attend) -> Vec<Vec<f64>> {
    let vars: Vec<Var> = inputs.tensors.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let store = loss(inputs, &tensors, attend).backward().unwrap();
    let first = if inputs.case.text > 0 { 0 } else { 3 };
    vars[first..].iter().map(|var| elements(store.get(var).unwrap())).collect()
}

/// Errors of gradients, relative to the gradient, or to the largest gradient where that is more than 20 times as large:
/// where terms cancel, as for a query with a single key, the gradient is too small to compare its error with.
pub fn gradient_errors(got: &[Vec<f64>], want: &[Vec<f64>]) -> Vec<f64> {
    let largest = want.iter().map(|want| size(want)).fold(0.0, f64::max);
    let scale = |want: &[f64]| if size(want) < largest / 20.0 { largest } else { size(want) };
    got.iter().zip(want).map(|(got, want)| difference(got, want) / scale(want)).collect()
}
