//! `clearform bench`: timings on this machine. BENCHMARKS.md compares them with those of other implementations.

mod attention;
mod step;
mod tiles;

use crate::args::{BenchArgs, BenchCommand};
use crate::output::{CommandOutcome, Output};
use anyhow::Context as _;
use candle_core::Device;
use clearform_attention::TokenGrid;
use std::time::Instant;

/// Runs one of the benchmarks.
pub fn run(args: &BenchArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.command {
        BenchCommand::Attention(args) => attention::run(args, output)?,
        BenchCommand::Step(args) => step::run(args, output)?,
        BenchCommand::Model(args) => step::run_model(args, output)?,
        BenchCommand::Tiles(args) => tiles::run(args, output)?,
    }
    Ok(CommandOutcome::Complete)
}

/// Parses HEIGHTxWIDTH, the value of `option`.
fn parse_grid(option: &str, text: &str) -> anyhow::Result<TokenGrid> {
    let sides = text.split_once('x').and_then(|(height, width)| Some((height.parse().ok()?, width.parse().ok()?)));
    let (height, width) = sides.with_context(|| format!("{option} {text:?}: expected HEIGHTxWIDTH in tokens"))?;
    Ok(TokenGrid::new(height, width)?)
}

/// Median milliseconds of `repeat` calls of `work`, after one warm-up call. A call ends when `device` is idle again.
fn median_ms(repeat: usize, device: &Device, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    work()?;
    device.synchronize()?;
    let mut timed = || {
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        anyhow::Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let mut times = (0..repeat.max(1)).map(|_| timed()).collect::<anyhow::Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
