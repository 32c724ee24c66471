//! `clearform forward`: runs the transformer once on given tensors, for example to compare it with diffusers.

use crate::args::ForwardArgs;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{ForwardOptions, forward, parse_plan};

/// Writes the prediction for `--inputs`.
pub fn run(args: &ForwardArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let options = ForwardOptions {
        reading: (&args.reading).into(),
        attention: args.attention.as_deref().map(parse_plan).transpose()?,
        adapters: args.adapters.options()?,
        device: args.running.device,
        dtype: args.dtype.map(Into::into),
        replace: args.overwrite,
        ..ForwardOptions::new(&args.model, &args.inputs, &args.output)
    };
    output.result(&forward(&options, &mut ProgressBars::default())?)?;
    Ok(CommandOutcome::Complete)
}
