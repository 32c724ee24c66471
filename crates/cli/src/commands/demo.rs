//! `clearform demo`: converts, distils and compares the embedded model, and writes a report.

use crate::args::DemoArgs;
use crate::demo::{self, DemoSettings};
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{Radius, prepare_folder};

/// Window radii of the students, in tokens: a quarter and half of the embedded model's 16 x 16 tokens.
const RADII: [f64; 2] = [4.0, 8.0];

/// Runs the demo and writes its report.
pub fn run(args: &DemoArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let _folder = prepare_folder(&args.output)?;
    let radii = RADII.into_iter().map(Radius::new).collect::<Result<Vec<_>, _>>()?;
    let plain = radii.iter().map(|radius| (*radius, None));
    let pooled = radii.last().map(|radius| (*radius, Some(args.pool)));
    let settings = DemoSettings {
        folder: args.output.clone(),
        steps: args.steps,
        plans: plain.chain(pooled).collect(),
        plugins: (&args.plugins).into(),
    };
    let report = demo::run(&settings, &mut ProgressBars::default())?;
    report.write(&args.output)?;
    output.result(&report)?;
    output.note(format_args!("report: {}", args.output.join("report.html").display()));
    Ok(CommandOutcome::Complete)
}
