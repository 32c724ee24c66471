//! [`bench_attention`]: times one attention call on random queries, keys and values, already in tile order.

use super::{median_ms, parse_grid};
use crate::{ClearformError, ComputeDevice, FloatDtype, Result};
use candle_core::{Device, Tensor, Var};
use clearform_attention::{Attention, AttentionPlan, Execution, Geometry, Qkv, TileEfficiency};
use clearform_runtime::check_dtype;
use clearform_weights::ProductPrecision;
use serde::Serialize;
use std::fmt;

/// An attention call to time.
#[derive(Debug, Clone)]
pub struct AttentionBench {
    /// Image tokens, HEIGHTxWIDTH.
    pub grid: String,
    /// Text tokens.
    pub text: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Attention plan.
    pub attention: AttentionPlan,
    /// Times the backward pass too.
    pub backward: bool,
    /// Timed runs, after one warm-up run.
    pub repeat: usize,
    /// Where it runs.
    pub device: ComputeDevice,
    /// Dtype to compute in.
    pub dtype: FloatDtype,
}

/// Measures median times, and the rates that they amount to.
///
/// # Errors
/// A size of 0, or a device that does not exist or does not compute in the dtype.
pub fn bench_attention(bench: &AttentionBench) -> Result<AttentionTiming> {
    if bench.heads == 0 || bench.head_dim == 0 {
        return Err(ClearformError::bad_option("--heads and --head-dim: expected at least 1 of each"));
    }
    let case = AttentionCase::new(bench)?;
    let median = median_ms(bench.repeat, &case.device, || case.attend())?;
    let permutation = median_ms(bench.repeat, &case.device, || case.permute())?;
    Ok(AttentionTiming::new(&case, &bench.attention, [median, permutation]))
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
    fn new(args: &AttentionBench) -> Result<Self> {
        let geometry = Geometry::new(vec![parse_grid("--grid", &args.grid)?]);
        let device = args.device.open()?;
        check_dtype(&device, args.dtype.into())?;
        let random = |tokens| random_qkv(tokens, args, &device);
        Ok(Self {
            attention: args.attention.build("bench", &|_| Ok(None), ProductPrecision::Full)?,
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
    fn attend(&self) -> Result<()> {
        let attended = self.attention.attend(self.image.clone(), self.text.clone(), &self.geometry)?;
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
    fn permute(&self) -> Result<()> {
        self.geometry.to_tiles(&self.image.query.detach())?;
        Ok(())
    }

    /// Query-key pairs that the pattern contains, and those that are computed, per head.
    fn efficiency(&self, plan: &AttentionPlan) -> TileEfficiency {
        Execution::for_query(&self.image.query).efficiency(&self.geometry, plan.default_policy(), self.text_tokens)
    }
}

fn random_qkv(tokens: usize, args: &AttentionBench, device: &Device) -> Result<Qkv> {
    let random = || -> Result<Tensor> {
        let shape = (1, tokens, args.heads, args.head_dim);
        let values = Tensor::randn(0f32, 1f32, shape, device)?.to_dtype(args.dtype.into())?;
        Ok(if args.backward { Var::from_tensor(&values)?.as_tensor().clone() } else { values })
    };
    Ok(Qkv { query: random()?, key: random()?, value: random()? })
}

/// The result of [`bench_attention`].
#[derive(Debug, Serialize)]
pub struct AttentionTiming {
    /// The attention plan.
    pub attention: String,
    /// Median of one call, in milliseconds.
    pub median_ms: f64,
    /// Median of reordering the image tokens, in milliseconds.
    pub permutation_ms: f64,
    /// Query-key pairs of a head that the pattern contains.
    pub useful_pairs: u64,
    /// Those that are computed.
    pub visited_pairs: u64,
    /// Rate over the useful pairs.
    pub useful_gflops: f64,
    /// Rate over the computed pairs.
    pub visited_gflops: f64,
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
