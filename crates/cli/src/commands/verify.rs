//! `clearform verify`: every recorded file against its size and hash.

use crate::args::VerifyArgs;
use crate::output::{CommandOutcome, Output};
use clearform_portable_model::PortableModel;

pub fn run(args: &VerifyArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let report = PortableModel::verify(&args.model)?;
    output.result(&report)?;
    Ok(CommandOutcome::whole_if(report.holds()))
}
