//! `clearform patch`: extracts the distilled attention of a model, and applies it to another.

use super::written_model::WrittenModel;
use crate::args::{PatchAction, PatchApplyArgs, PatchArgs, PatchExtractArgs, PatchModeArg};
use crate::output::{CommandOutcome, Output};
use crate::patching::{self, PatchApplication};
use clearform_attention::Radius;
use clearform_convert::{AttentionPatch, PatchMode};
use clearform_portable_model::Overwrite;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// Extracts or applies a patch.
pub fn run(args: &PatchArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PatchAction::Extract(args) => extract(args, output),
        PatchAction::Apply(args) => apply(args, output),
    }
}

fn extract(args: &PatchExtractArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let tensors = patching::extract(&args.model, &args.base, &args.output)?;
    output.result(&ExtractedPatch { patch: args.output.clone(), tensors })?;
    Ok(CommandOutcome::Complete)
}

fn apply(args: &PatchApplyArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let patch = AttentionPatch::open(&args.patch, args.radius.map(Radius::new).transpose()?)?;
    let mode = match args.mode {
        PatchModeArg::Replace => PatchMode::Replace,
        PatchModeArg::Shift => PatchMode::Shift,
    };
    let application = PatchApplication {
        patch: &patch,
        checkpoint: &args.to,
        output: &args.output,
        mode,
        base: args.base.as_deref(),
        overwrite: Overwrite::allowed_if(args.overwrite),
    };
    let report = application.write()?;
    output.result(&WrittenModel::new(&args.output, patch.plan(), report))?;
    Ok(CommandOutcome::Complete)
}

#[derive(Debug, Serialize)]
struct ExtractedPatch {
    patch: PathBuf,
    tensors: usize,
}

impl fmt::Display for ExtractedPatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} attention tensors", self.patch.display(), self.tensors)
    }
}
