//! `clearform bench`: timings on this machine.

use crate::args::{
    AttentionBenchArgs, BenchArgs, BenchCommand, ModelBenchArgs, StepBenchArgs, TilesBenchArgs, TimingArgs,
    VaeBenchArgs,
};
use crate::output::{CommandOutcome, Output};
use clearform::bench::{
    AttentionBench, BenchedModel, ModelBench, StepBench, StepTiming, TilesBench, VaeBench, bench_attention,
    bench_model, bench_step, bench_tiles, bench_vae,
};
use clearform::{AttentionPlan, Radius, parse_plan};

/// Runs one of the benchmarks.
pub fn run(args: &BenchArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.command {
        BenchCommand::Attention(args) => output.result(&bench_attention(&attention(args)?)?)?,
        BenchCommand::Step(args) => output.result(&bench_step(&step(args)?)?)?,
        BenchCommand::Model(args) => output.result(&bench_model(&model(args)?)?)?,
        BenchCommand::Vae(args) => output.result(&bench_vae(&vae(args))?)?,
        BenchCommand::Tiles(args) => output.result(&bench_tiles(&tiles(args))?)?,
    }
    Ok(CommandOutcome::Complete)
}

fn attention(args: &AttentionBenchArgs) -> anyhow::Result<AttentionBench> {
    let attention = match &args.attention {
        Some(text) => text.parse()?,
        None => AttentionPlan::clear(Radius::new(args.radius)?, None),
    };
    Ok(AttentionBench {
        grid: args.grid.clone(),
        text: args.text,
        heads: args.heads,
        head_dim: args.head_dim,
        attention,
        backward: args.backward,
        repeat: args.repeat,
        device: args.running.device,
        dtype: args.dtype.into(),
    })
}

fn step(args: &StepBenchArgs) -> anyhow::Result<StepBench> {
    Ok(StepBench {
        width: args.width,
        head_dim: args.head_dim,
        double: args.double,
        single: args.single,
        grid: args.grid.clone(),
        attention: parse_plan(&args.attention)?,
        format: args.format,
        timing: timing(&args.timing),
    })
}

fn model(args: &ModelBenchArgs) -> anyhow::Result<ModelBench> {
    Ok(ModelBench {
        model: benched_model(args)?,
        grids: args.grid.clone(),
        plans: args.attention.iter().map(|text| parse_plan(text)).collect::<Result<_, _>>()?,
        timing: timing(&args.timing),
    })
}

fn benched_model(args: &ModelBenchArgs) -> anyhow::Result<BenchedModel> {
    match (&args.model, &args.random) {
        (Some(path), _) => Ok(BenchedModel::Stored { path: path.clone(), reading: (&args.reading).into() }),
        (None, Some(name)) => Ok(BenchedModel::Random { name: name.clone(), format: args.format }),
        (None, None) => anyhow::bail!("what to time: pass a model, or --random NAME"),
    }
}

fn vae(args: &VaeBenchArgs) -> VaeBench {
    let VaeBenchArgs { model, size, repeat, running, vae } = args;
    VaeBench {
        model: model.clone(),
        sizes: size.clone(),
        tiling: vae.into(),
        precision: vae.vae_precision,
        repeat: *repeat,
        device: running.device,
    }
}

fn tiles(args: &TilesBenchArgs) -> TilesBench {
    TilesBench { grids: args.grid.clone(), radii: args.radius.clone(), tiles: args.tiles.clone() }
}

fn timing(args: &TimingArgs) -> StepTiming {
    let TimingArgs { text, repeat, running, dtype, memory } = args;
    StepTiming { text: *text, repeat: *repeat, device: running.device, dtype: (*dtype).into(), memory: memory.into() }
}
