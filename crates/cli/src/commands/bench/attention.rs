//! `clearform bench attention`: times one attention call on random queries, keys and values, already in tile order.

use super::{median_ms, parse_grid};
use crate::args::AttentionBenchArgs;
use crate::output::Output;
use crate::sources::open_device;
use candle_core::{Device, Tensor, Var};
use clearform_attention::{Attention, AttentionPlan, Execution, Geometry, Qkv, Radius, TileEfficiency, TokenGrid};
use serde::Serialize;
use std::fmt;

/// Prints the median times, and the rates that they amount to.
pub fn run(args: &AttentionBenchArgs, output: &Output) -> anyhow::Result<()> {
    anyhow::ensure!(args.heads > 0 && args.head_dim > 0, "--heads and --head-dim: expected at least 1 of each");
    let plan = match &args.attention {
        Some(text) => text.parse()?,
        None => AttentionPlan::clear(Radius::new(args.radius)?, None),
    };
    let case = AttentionCase::new(args, parse_grid("--grid", &args.grid)?, &plan)?;
    let median = median_ms(args.repeat, &case.device, || case.attend())?;
    let permutation = median_ms(args.repeat, &case.device, || case.permute())?;
    output.result(&AttentionTiming::new(&case, &plan, [median, permutation]))
}

/// One attention call.
struct AttentionCase {
    attention: Box<dyn Attention>,
    geometry: Geometry,
    image: Qkv,
    text: Option<Qkv>,
    backward: bool,
    heads: usize,
    head_dim: usize,
    text_tokens: usize,
    device: Device,
}

impl AttentionCase {
    fn new(args: &AttentionBenchArgs, grid: TokenGrid, plan: &AttentionPlan) -> anyhow::Result<Self> {
        let geometry = Geometry::new(vec![grid]);
        let device = open_device(args.running.device)?;
        let random = |tokens| random_qkv(tokens, args, &device);
        Ok(Self {
            attention: plan.build("bench", &|_| Ok(None))?,
            image: random(geometry.tokens())?,
            text: if args.text == 0 { None } else { Some(random(args.text)?) },
            geometry,
            backward: args.backward,
            heads: args.heads,
            head_dim: args.head_dim,
            text_tokens: args.text,
            device,
        })
    }

    /// One call, with its backward pass if `backward` is set.
    fn attend(&self) -> anyhow::Result<()> {
        let attended = self.attention.attend(&self.image, self.text.as_ref(), &self.geometry)?;
        if self.backward {
            let image = attended.image.sum_all()?;
            let loss = match &attended.text {
                Some(text) => (image + text.sum_all()?)?,
                None => image,
            };
            loss.backward()?;
        }
        Ok(())
    }

    /// Reorders the image tokens from raster order to tile order, as a model does once before its blocks.
    fn permute(&self) -> anyhow::Result<()> {
        self.geometry.to_tiles(&self.image.query.detach())?;
        Ok(())
    }

    /// Query-key pairs that the pattern contains, and those that are computed, per head.
    fn efficiency(&self, plan: &AttentionPlan) -> TileEfficiency {
        Execution::for_query(&self.image.query).efficiency(&self.geometry, plan.default_policy(), self.text_tokens)
    }
}

fn random_qkv(tokens: usize, args: &AttentionBenchArgs, device: &Device) -> anyhow::Result<Qkv> {
    let random = || -> anyhow::Result<Tensor> {
        let shape = (1, tokens, args.heads, args.head_dim);
        let values = Tensor::randn(0f32, 1f32, shape, device)?.to_dtype(args.dtype.as_dtype())?;
        Ok(if args.backward { Var::from_tensor(&values)?.as_tensor().clone() } else { values })
    };
    Ok(Qkv { query: random()?, key: random()?, value: random()? })
}

/// The result of the benchmark.
#[derive(Debug, Serialize)]
struct AttentionTiming {
    attention: String,
    median_ms: f64,
    permutation_ms: f64,
    useful_pairs: u64,
    visited_pairs: u64,
    useful_gflops: f64,
    visited_gflops: f64,
}

impl AttentionTiming {
    fn new(case: &AttentionCase, plan: &AttentionPlan, [median_ms, permutation_ms]: [f64; 2]) -> Self {
        let efficiency = case.efficiency(plan);
        // Per pair and head: two products of head_dim multiply-adds, and five more in the backward pass.
        let products = if case.backward { 7 } else { 2 };
        let per_pair = (2 * products * case.head_dim * case.heads) as f64;
        let gflops = |pairs: u64| pairs as f64 * per_pair / (median_ms * 1e6);
        Self {
            attention: plan.to_string(),
            median_ms,
            permutation_ms,
            useful_pairs: efficiency.inside,
            visited_pairs: efficiency.visited,
            useful_gflops: gflops(efficiency.inside),
            visited_gflops: gflops(efficiency.visited),
        }
    }
}

impl fmt::Display for AttentionTiming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: median {:.2} ms", self.attention, self.median_ms)?;
        writeln!(f, "tile permutation: {:.2} ms", self.permutation_ms)?;
        writeln!(f, "useful   {:>12} pairs  {:>8.1} GFLOP/s", self.useful_pairs, self.useful_gflops)?;
        write!(f, "visited  {:>12} pairs  {:>8.1} GFLOP/s", self.visited_pairs, self.visited_gflops)
    }
}
