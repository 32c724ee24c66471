//! `clearform transfer`: measures what carries over from a model to its linear model.

use crate::args::TransferArgs;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{TransferOptions, transfer};

/// Runs the study and writes its report.
pub fn run(args: &TransferArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    output.note_seed(args.sampling.seed);
    let options = TransferOptions {
        fine_tune: args.fine_tune.clone(),
        evaluation: args.sampling.options(&args.memory),
        adapters: args.adapters.options()?,
        device: args.running.device,
        replace: args.overwrite,
        ..TransferOptions::new(&args.teacher, &args.student, &args.output)
    };
    output.result(&transfer(&options, &mut ProgressBars::default())?)?;
    Ok(CommandOutcome::Complete)
}
