//! Timings on this machine. BENCHMARKS.md compares them with those of other implementations.

mod attention;
mod random_weights;
mod step;
mod tiles;
mod vae;

pub use attention::{AttentionBench, AttentionTiming, bench_attention};
pub(crate) use random_weights::RandomWeights;
pub use random_weights::WeightFormat;
pub use step::{BenchedModel, ModelBench, StepBench, StepRow, StepTable, StepTiming, bench_model, bench_step};
pub use tiles::{TileRow, TileTable, TilesBench, bench_tiles};
pub use vae::{VaeBench, VaeRow, VaeTable, bench_vae};

use crate::{ClearformError, Result};
use candle_core::Device;
use clearform_attention::TokenGrid;
use std::time::Instant;

/// Parses HEIGHTxWIDTH, the value of `option`.
fn parse_grid(option: &str, text: &str) -> Result<TokenGrid> {
    let sides = text.split_once('x').and_then(|(height, width)| Some((height.parse().ok()?, width.parse().ok()?)));
    let wrong = || ClearformError::BadOption(format!("{option} {text:?}: expected HEIGHTxWIDTH in tokens"));
    let (height, width) = sides.ok_or_else(wrong)?;
    Ok(TokenGrid::new(height, width)?)
}

/// Median milliseconds of `repeat` calls of `work`, after one warm-up call; of the first call alone if `repeat` is 0. A call
/// ends when `device` is idle again.
fn median_ms(repeat: usize, device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    if repeat > 0 {
        work()?;
        device.synchronize()?;
    }
    let mut timed = || {
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        Ok::<_, ClearformError>(start.elapsed().as_secs_f64() * 1e3)
    };
    let mut times = (0..repeat.max(1)).map(|_| timed()).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
