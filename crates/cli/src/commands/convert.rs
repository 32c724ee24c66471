//! `clearform convert`: reads a checkpoint, replaces its attention, distils it and writes a portable model.

use crate::args::{ConvertArgs, TrainingArgs};
use crate::options::overwrite_if;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{
    AttentionPlan, ConvertOptions, CopyMode, Radius, VerdictRecord, WrittenModel, convert, inspect, linear_plan,
    parse_plan, preview_conversion,
};

/// Converts, or with `--dry-run` shows what would be done.
pub fn run(args: &ConvertArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    check_required_error(&args.training)?;
    let options = options(args)?;
    if args.dry_run {
        return dry_run(&options, output);
    }
    let model = convert(&options, &mut ProgressBars::resumable())?.model;
    output.result(&model)?;
    Ok(within_required_error(&model, &args.training, output))
}

/// Refuses to require an error that will not be measured.
pub fn check_required_error(training: &TrainingArgs) -> anyhow::Result<()> {
    if training.require_error.is_some() && training.held_out == 0 {
        anyhow::bail!("--require-error: is measured on held-out samples, but --held-out is 0; leave one of them out");
    }
    Ok(())
}

/// Whether the student is as near to its teacher as `--require-error` asks; says so if it is not.
pub fn within_required_error(model: &WrittenModel, training: &TrainingArgs, output: &Output) -> CommandOutcome {
    let Some(required) = training.require_error else { return CommandOutcome::Complete };
    let left = model.verdict.as_ref().map(VerdictRecord::left);
    if left.is_none_or(|left| left > required) {
        let found = left.map_or("it was not measured".to_owned(), |left| format!("{left:.3} is left"));
        output.note(format_args!("--require-error {required}: {found}; the model is written all the same"));
    }
    CommandOutcome::complete_if(left.is_some_and(|left| left <= required))
}

fn options(args: &ConvertArgs) -> anyhow::Result<ConvertOptions> {
    let is_open = args.no_distill && args.radius.is_none() && args.pool.is_none();
    let attention = match &args.attention {
        Some(text) => parse_plan(text)?,
        None => match is_open.then(|| linear_plan(&args.source)).transpose()?.flatten() {
            Some(plan) => plan,
            None => plan_of(Radius::new(args.radius.unwrap_or(USUAL_RADIUS))?, args.pool)?,
        },
    };
    Ok(ConvertOptions {
        reading: (&args.reading).into(),
        attention,
        training: (!args.no_distill).then(|| args.training.options(&args.memory)),
        components: args.training.components.clone(),
        component_files: (&args.training.component_files).into(),
        adapters: args.adapters.options()?,
        dtype: args.dtype.map(Into::into),
        quantize: args.quantize.clone(),
        copy_mode: if args.link { CopyMode::Link } else { CopyMode::Copy },
        overwrite: overwrite_if(args.overwrite),
        device: args.running.device,
        ..ConvertOptions::new(&args.source, &args.output)
    })
}

/// The radius of the models that CLEAR's authors published.
const USUAL_RADIUS: f64 = 16.0;

/// The plan as its text is read, which checks it.
fn plan_of(radius: Radius, pool: Option<usize>) -> anyhow::Result<AttentionPlan> {
    Ok(AttentionPlan::clear(radius, pool).to_string().parse()?)
}

fn dry_run(options: &ConvertOptions, output: &Output) -> anyhow::Result<CommandOutcome> {
    let inspection = inspect(&options.source, &options.reading, &mut ProgressBars::default())?;
    // What cannot be converted is not called complete.
    let options = match inspection.is_complete() {
        true => preview_conversion(options, &mut ProgressBars::default())?,
        false => options.clone(),
    };
    let ConvertOptions { attention, output: target, .. } = &options;
    output.note(format_args!("would write {} with attention {attention}", target.display()));
    output.result(&inspection)?;
    Ok(CommandOutcome::complete_if(inspection.is_complete()))
}
