//! `clearform export`: writes the transformer to one file, with the tensor names of another layout.

use crate::args::ExportArgs;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{ExportOptions, export};

/// Writes the file, and states the attention plan, which the file cannot hold.
pub fn run(args: &ExportArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let options = ExportOptions {
        reading: (&args.reading).into(),
        replace: args.overwrite,
        quantize: args.quantize.clone(),
        ..ExportOptions::new(&args.model, &args.to, &args.output)
    };
    output.result(&export(&options, &mut ProgressBars::default())?)?;
    Ok(CommandOutcome::Complete)
}
