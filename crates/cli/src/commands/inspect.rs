//! `clearform inspect`: what a checkpoint is, from its headers alone.

use crate::args::InspectArgs;
use crate::output::{CommandOutcome, Output};
use crate::sources::{identify, tell};
use clearform_layout::Inspection;

/// Faults that stderr names; the result has all.
const MOST_LINES: usize = 8;

pub fn run(args: &InspectArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let (checkpoint, identified) = identify(&args.source, &args.reading)?;
    tell(checkpoint.source(), output);
    let inspection = Inspection::of(&identified, &checkpoint);
    output.result(&inspection)?;
    let complaints = inspection.problems();
    let more = complaints.len().saturating_sub(MOST_LINES);
    let rest = (more > 0).then(|| format!("and {more} more"));
    for complaint in complaints.into_iter().take(MOST_LINES).chain(rest) {
        output.note(format_args!("error: {}: {complaint}", args.source.display()));
    }
    Ok(CommandOutcome::whole_if(inspection.complete()))
}
