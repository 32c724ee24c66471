//! `clearform inspect`: what a checkpoint is, from its headers alone.

use crate::args::Inspect;
use crate::opening::{identify, tell};
use crate::output::{Outcome, Output};
use clearform_layout::Inspection;

pub fn run(args: &Inspect, output: &Output) -> anyhow::Result<Outcome> {
    let (checkpoint, identified) = identify(&args.source, &args.reading)?;
    tell(checkpoint.source(), output);
    let inspection = Inspection::of(&identified, &checkpoint);
    output.result(&inspection)?;
    if !inspection.complete() {
        output.note(format_args!("error: {}: {}", args.source.display(), inspection.account()));
    }
    Ok(Outcome::whole_if(inspection.complete()))
}
