//! `clearform verify`: checks every recorded file against its size and hash.

use crate::args::VerifyArgs;
use crate::output::{CommandOutcome, Output};

/// Prints which files are missing or changed.
pub fn run(args: &VerifyArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let report = clearform::verify(&args.model)?;
    output.result(&report)?;
    Ok(CommandOutcome::complete_if(report.is_intact()))
}
