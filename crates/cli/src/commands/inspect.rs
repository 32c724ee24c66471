//! `clearform inspect`: what a checkpoint is, from its headers alone.

use crate::args::Inspect;
use crate::opening::{identify, tell};
use crate::output::{Outcome, Output};
use clearform_layout::Inspection;

pub fn run(args: &Inspect, output: &Output) -> anyhow::Result<Outcome> {
    let (checkpoint, identified) = identify(&args.source, &args.reading)?;
    tell(checkpoint.source(), output);
    let inspection = Inspection::new(&identified, &identified.canonical(&checkpoint));
    output.result(&inspection)?;
    for complaint in inspection.complaints() {
        output.note(format_args!("error: {}: {complaint}", args.source.display()));
    }
    Ok(Outcome::whole_if(inspection.complete()))
}
