//! Problems of attention: random inputs, the fused kernel and the plain reference on them, and how far apart they are.

use candle_core::{DType, Device, Result, Tensor, Var};
use clearform_attention::{Attended, AttentionPlan, Geometry, Qkv, Radius, TokenGrid, Window, reference};

/// One problem: what is attended to, and under which plan.
#[derive(Debug, Clone)]
pub struct Case {
    pub grids: Vec<(usize, usize)>,
    pub text: usize,
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub plan: String,
    /// Text tokens that count in batch entry `i`: this less 3 i. Above the text, no mask is given.
    pub counting: usize,
}

pub const ALL: usize = usize::MAX;

pub fn case(grids: &[(usize, usize)], text: usize, plan: &str) -> Case {
    let (grids, plan) = (grids.to_vec(), plan.to_owned());
    Case { grids, text, batch: 1, heads: 2, head_dim: 8, plan, counting: ALL }
}

/// The tensors of a problem in the order text q k v, image q k v, weight of the pooled cells.
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

impl Inputs {
    pub fn new(case: Case, dtype: DType) -> Self {
        let grids = case.grids.iter().map(|(height, width)| TokenGrid::new(*height, *width).unwrap()).collect();
        let mut geometry = Geometry::new(grids);
        if case.counting != ALL {
            let counts = |i: usize| u8::from(i % case.text + 3 * (i / case.text) < case.counting);
            let mask = (0..case.batch * case.text).map(counts).collect();
            geometry = geometry.with_text_mask(Tensor::from_vec(mask, (case.batch, case.text), &Device::Cpu).unwrap());
        }
        let shape = |tokens| vec![case.batch, tokens, case.heads, case.head_dim];
        let mut tensors: Vec<Tensor> = (0..3).map(|seed| noise(&shape(case.text), seed)).collect();
        tensors.extend((3..6).map(|seed| noise(&shape(geometry.tokens()), seed)));
        if let Some(weight) = initial_weight(&case) {
            let learned = weight.to_dtype(DType::F64).unwrap() + (noise(weight.dims(), 7) * 0.02).unwrap();
            tensors.push(learned.unwrap());
        }
        let tensors = tensors.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        Self { case, geometry, tensors }
    }

    pub fn has_text(&self) -> bool {
        self.case.text > 0
    }
}

pub fn plan(case: &Case) -> AttentionPlan {
    case.plan.parse().unwrap()
}

pub fn initial_weight(case: &Case) -> Option<Tensor> {
    plan(case).learned("layer").unwrap().map(|(_, weight)| weight)
}

pub fn radius(case: &Case) -> Option<Radius> {
    match plan(case).default_policy() {
        clearform_attention::Policy::Clear { radius, .. } => Some(radius),
        _ => None,
    }
}

pub fn qkv(tensors: &[Tensor]) -> Qkv {
    Qkv { query: tensors[0].clone(), key: tensors[1].clone(), value: tensors[2].clone() }
}

pub fn fused(inputs: &Inputs, tensors: &[Tensor]) -> Result<Attended> {
    let learned = |_: &str| Ok(tensors.get(6).cloned());
    let attention = plan(&inputs.case).build("layer", &learned)?;
    let text = inputs.has_text().then(|| qkv(&tensors[..3]));
    attention.attend(&qkv(&tensors[3..]), text.as_ref(), &inputs.geometry)
}

pub fn plain(inputs: &Inputs, tensors: &[Tensor]) -> Result<Attended> {
    let window = Window { radius: radius(&inputs.case), pool: tensors.get(6).cloned() };
    let text = inputs.has_text().then(|| qkv(&tensors[..3]));
    reference::attend(&qkv(&tensors[3..]), text.as_ref(), &inputs.geometry, &window)
}

pub fn numbers(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |sum: f64, x: f64| sum + x * x;
    let difference = got.iter().zip(want).map(|(a, b)| a - b).fold(0.0, square);
    (difference / want.iter().copied().fold(f64::MIN_POSITIVE, square)).sqrt()
}

/// Text and image, one after the other.
pub fn output(attended: &Attended) -> Vec<f64> {
    let mut values = attended.text.as_ref().map(numbers).unwrap_or_default();
    values.extend(numbers(&attended.image));
    values
}

/// Σ out · probe over both streams.
pub fn loss(inputs: &Inputs, tensors: &[Tensor], attend: Attend) -> Tensor {
    let attended = attend(inputs, tensors).unwrap();
    let total = |out: &Tensor, seed: usize| {
        let probe = noise(out.dims(), seed).to_dtype(out.dtype()).unwrap();
        (out * probe).unwrap().sum_all().unwrap()
    };
    let image = total(&attended.image, 98);
    attended.text.as_ref().map_or(image.clone(), |text| (image + total(text, 99)).unwrap())
}

pub fn gradients(inputs: &Inputs, attend: Attend) -> Vec<Vec<f64>> {
    let vars: Vec<Var> = inputs.tensors.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let store = loss(inputs, &tensors, attend).backward().unwrap();
    let first = if inputs.has_text() { 0 } else { 3 };
    vars[first..].iter().map(|var| numbers(store.get(var).unwrap())).collect()
}
