//! `clearform bench`: how long things take here. A ratio beside a peer is what counts; see BENCHMARKS.md.

use crate::args::{AttentionBench, Bench, BenchSubject, Dtype};
use crate::output::{Outcome, Output};
use anyhow::Context as _;
use candle_core::{DType, Device, Tensor, Var};
use clearform_attention::{Attention, AttentionPlan, Geometry, Qkv, Radius, Share, TokenGrid};
use serde::Serialize;
use std::fmt;
use std::time::Instant;

pub fn run(args: &Bench, output: &Output) -> anyhow::Result<Outcome> {
    let BenchSubject::Attention(subject) = &args.subject;
    let grid = parse_grid(&subject.grid)?;
    let plan = match &subject.attention {
        Some(text) => text.parse()?,
        None => AttentionPlan::clear(Radius::new(subject.radius)?, None),
    };
    let case = Case::new(subject, grid, &plan)?;
    case.once()?;
    let mut times = (0..subject.repeat.max(1)).map(|_| case.once()).collect::<anyhow::Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    output.result(&Timing::new(&case, &plan, times[times.len() / 2]))?;
    Ok(Outcome::Whole)
}

fn parse_grid(text: &str) -> anyhow::Result<TokenGrid> {
    let sides = text.split_once('x').and_then(|(height, width)| Some((height.parse().ok()?, width.parse().ok()?)));
    let (height, width) = sides.with_context(|| format!("--grid {text:?}: expected HEIGHTxWIDTH in tokens"))?;
    Ok(TokenGrid::new(height, width)?)
}

/// One attention call, ready to be timed.
struct Case {
    attention: Box<dyn Attention>,
    geometry: Geometry,
    image: Qkv,
    text: Option<Qkv>,
    backward: bool,
    heads: usize,
    head_dim: usize,
    text_tokens: usize,
}

impl Case {
    fn new(subject: &AttentionBench, grid: TokenGrid, plan: &AttentionPlan) -> anyhow::Result<Self> {
        let geometry = Geometry::new(vec![grid]);
        let random = |tokens| random_qkv(tokens, subject);
        Ok(Self {
            attention: plan.build("bench", &|_| Ok(None))?,
            image: random(geometry.tokens())?,
            text: if subject.text == 0 { None } else { Some(random(subject.text)?) },
            geometry,
            backward: subject.backward,
            heads: subject.heads,
            head_dim: subject.head_dim,
            text_tokens: subject.text,
        })
    }

    /// Milliseconds of one call, with its backward pass where that is asked for.
    fn once(&self) -> anyhow::Result<f64> {
        let start = Instant::now();
        let attended = self.attention.attend(&self.image, self.text.as_ref(), &self.geometry)?;
        if self.backward {
            attended.image.sum_all()?.backward()?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Pairs of query and key that the pattern holds, and those that are computed; text included, per head.
    fn share(&self, plan: &AttentionPlan) -> Share {
        let (image, text) = (self.geometry.tokens() as u64, self.text_tokens as u64);
        let with_text = text * (text + 2 * image);
        let window = match plan.default_policy() {
            clearform_attention::Policy::Clear { radius, .. } => self.geometry.share_inside(radius),
            _ => Share { inside: image * image, visited: image * image },
        };
        Share { inside: window.inside + with_text, visited: window.visited + with_text }
    }
}

fn random_qkv(tokens: usize, subject: &AttentionBench) -> anyhow::Result<Qkv> {
    let one = || -> anyhow::Result<Tensor> {
        let dtype = match subject.dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        };
        let shape = (1, tokens, subject.heads, subject.head_dim);
        let values = Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?.to_dtype(dtype)?;
        Ok(if subject.backward { Var::from_tensor(&values)?.as_tensor().clone() } else { values })
    };
    Ok(Qkv { query: one()?, key: one()?, value: one()? })
}

/// What one bench found.
#[derive(Debug, Serialize)]
struct Timing {
    attention: String,
    median_ms: f64,
    useful_pairs: u64,
    visited_pairs: u64,
    useful_gflops: f64,
    visited_gflops: f64,
}

impl Timing {
    fn new(case: &Case, plan: &AttentionPlan, median_ms: f64) -> Self {
        let share = case.share(plan);
        // Two products of head_dim multiply-adds for each pair and head; five more such products in the backward pass.
        let passes = if case.backward { 7 } else { 2 };
        let per_pair = (2 * passes * case.head_dim * case.heads) as f64;
        let gflops = |pairs: u64| pairs as f64 * per_pair / (median_ms * 1e6);
        Self {
            attention: plan.to_string(),
            median_ms,
            useful_pairs: share.inside,
            visited_pairs: share.visited,
            useful_gflops: gflops(share.inside),
            visited_gflops: gflops(share.visited),
        }
    }
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: median {:.2} ms", self.attention, self.median_ms)?;
        writeln!(f, "useful   {:>12} pairs  {:>8.1} GFLOP/s", self.useful_pairs, self.useful_gflops)?;
        write!(f, "visited  {:>12} pairs  {:>8.1} GFLOP/s", self.visited_pairs, self.visited_gflops)
    }
}
