//! `clearform compare`: generates images with teacher and student from the same seeds, and compares them.

use crate::args::CompareArgs;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{CompareOptions, compare};

/// Writes the report, and prints its figures.
pub fn run(args: &CompareArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    output.note_seed(args.sampling.seed);
    let options = CompareOptions {
        evaluation: args.sampling.options(&args.memory),
        device: args.running.device,
        replace: args.overwrite,
        ..CompareOptions::new(&args.teacher, &args.student, &args.output)
    };
    output.result(&compare(&options, &mut ProgressBars::default())?)?;
    Ok(CommandOutcome::Complete)
}
