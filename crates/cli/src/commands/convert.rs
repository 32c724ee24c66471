//! `clearform convert`: reads a checkpoint, replaces its attention, distils it and writes a portable model.

use crate::args::ConvertArgs;
use crate::options::overwrite_if;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{AttentionPlan, ConvertOptions, CopyMode, Radius, convert, inspect, parse_plan};

/// Converts, or with `--dry-run` shows what would be done.
pub fn run(args: &ConvertArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let options = options(args)?;
    if args.dry_run {
        return dry_run(&options, output);
    }
    output.result(&convert(&options, &mut ProgressBars::default())?.model)?;
    Ok(CommandOutcome::Complete)
}

fn options(args: &ConvertArgs) -> anyhow::Result<ConvertOptions> {
    let attention = match &args.attention {
        Some(text) => parse_plan(text)?,
        None => AttentionPlan::clear(Radius::new(args.radius)?, args.pool),
    };
    Ok(ConvertOptions {
        reading: (&args.reading).into(),
        attention,
        training: (!args.no_distill).then(|| (&args.training).into()),
        components: args.training.components.clone(),
        adapters: args.adapters.options()?,
        dtype: args.dtype.map(Into::into),
        copy_mode: if args.link { CopyMode::Link } else { CopyMode::Copy },
        overwrite: overwrite_if(args.overwrite),
        device: args.running.device,
        ..ConvertOptions::new(&args.source, &args.output)
    })
}

fn dry_run(options: &ConvertOptions, output: &Output) -> anyhow::Result<CommandOutcome> {
    let inspection = inspect(&options.source, &options.reading, &mut ProgressBars::default())?;
    let ConvertOptions { attention, output: target, .. } = options;
    output.note(format_args!("would write {} with attention {attention}", target.display()));
    output.result(&inspection)?;
    Ok(CommandOutcome::complete_if(inspection.is_complete()))
}
