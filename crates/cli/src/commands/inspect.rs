//! `clearform inspect`: identifies a checkpoint from its headers alone.

use crate::args::InspectArgs;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::inspect;

/// Problems printed on stderr; a wrong config can cause hundreds. The result lists them all.
const PRINTED_PROBLEMS: usize = 8;

/// Prints what was found, and the problems as errors.
pub fn run(args: &InspectArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let inspection = inspect(&args.source, &(&args.reading).into(), &mut ProgressBars::default())?;
    output.result(&inspection)?;
    let problems = inspection.problems();
    let more = problems.len().saturating_sub(PRINTED_PROBLEMS);
    let rest = (more > 0).then(|| format!("and {more} more"));
    for problem in problems.into_iter().take(PRINTED_PROBLEMS).chain(rest) {
        output.note(format_args!("error: {}: {problem}", args.source.display()));
    }
    Ok(CommandOutcome::complete_if(inspection.is_complete()))
}
