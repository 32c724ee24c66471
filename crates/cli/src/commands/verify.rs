//! `clearform verify`: every recorded file against its size and hash.

use crate::args::Verify;
use crate::output::{Outcome, Output};
use clearform_portable_model::PortableModel;

pub fn run(args: &Verify, output: &Output) -> anyhow::Result<Outcome> {
    let report = PortableModel::verify(&args.model)?;
    output.result(&report)?;
    Ok(Outcome::whole_if(report.holds()))
}
