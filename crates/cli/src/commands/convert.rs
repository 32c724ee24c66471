//! `clearform convert`: reads a checkpoint, replaces its attention, distils it and writes a portable model.

use super::written_model::WrittenModel;
use crate::args::ConvertArgs;
use crate::conversion::convert;
use crate::output::{CommandOutcome, Output};
use crate::sources::{identify, parse_plan, print_notes};
use clearform_attention::{AttentionPlan, Radius};
use clearform_layout::Inspection;

/// Converts, or with `--dry-run` shows what would be done.
pub fn run(args: &ConvertArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let plan = attention_plan(args)?;
    if args.dry_run {
        return dry_run(args, &plan, output);
    }
    let converted = convert(args, &plan, output)?;
    output.result(&WrittenModel::new(&args.output, &plan, converted.report))?;
    Ok(CommandOutcome::Complete)
}

fn attention_plan(args: &ConvertArgs) -> anyhow::Result<AttentionPlan> {
    match &args.attention {
        Some(text) => parse_plan(text),
        None => Ok(AttentionPlan::clear(Radius::new(args.radius)?, args.pool)),
    }
}

fn dry_run(args: &ConvertArgs, plan: &AttentionPlan, output: &Output) -> anyhow::Result<CommandOutcome> {
    let (checkpoint, identified) = identify(&args.source, &args.reading)?;
    print_notes(checkpoint.source(), output);
    let inspection = Inspection::of(&identified, &checkpoint);
    output.note(format_args!("would write {} with attention {plan}", args.output.display()));
    output.result(&inspection)?;
    Ok(CommandOutcome::complete_if(inspection.is_complete()))
}
