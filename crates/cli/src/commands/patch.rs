//! `clearform patch`: extracts the distilled attention of a model, and applies it to another.

use crate::args::{PatchAction, PatchApplyArgs, PatchArgs, PatchExtractArgs, PatchModeArg};
use crate::options::overwrite_if;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{Existing, PatchMode, PatchOptions, apply_patch, extract_patch};

/// Extracts or applies a patch.
pub fn run(args: &PatchArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PatchAction::Extract(PatchExtractArgs { model, base, output: path, overwrite }) => {
            let existing = Existing::replaced_if(*overwrite);
            output.result(&extract_patch(model, base, path, existing, &mut ProgressBars::default())?)?;
        }
        PatchAction::Apply(args) => output.result(&apply_patch(&options(args), &mut ProgressBars::default())?)?,
    }
    Ok(CommandOutcome::Complete)
}

fn options(args: &PatchApplyArgs) -> PatchOptions {
    let mode = match args.mode {
        PatchModeArg::Replace => PatchMode::Replace,
        PatchModeArg::Shift => PatchMode::Shift,
    };
    PatchOptions {
        mode,
        base: args.base.clone(),
        radius: args.radius,
        components: args.components.clone(),
        component_files: (&args.component_files).into(),
        overwrite: overwrite_if(args.overwrite),
        ..PatchOptions::new(&args.patch, &args.to, &args.output)
    }
}
