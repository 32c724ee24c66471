//! `clearform distill`: trains a converted model further against the original it was made from.

use super::convert::{check_required_error, within_required_error};
use crate::args::DistillArgs;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{DistillOptions, distill};

/// Trains the model and writes it to the output folder, or replaces it.
pub fn run(args: &DistillArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    check_required_error(&args.training)?;
    let options = DistillOptions {
        output: args.output.clone(),
        training: args.training.options(&args.memory),
        components: args.training.components.clone(),
        component_files: (&args.training.component_files).into(),
        device: args.running.device,
        ..DistillOptions::new(&args.model, &args.teacher)
    };
    let model = distill(&options, &mut ProgressBars::resumable())?;
    output.result(&model)?;
    Ok(within_required_error(&model, &args.training, output))
}
