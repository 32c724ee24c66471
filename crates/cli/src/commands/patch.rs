//! `clearform patch`: distilled attention out of one model and into another.

use crate::args::{PatchAction, PatchArgs, PatchModeArg, SourceArgs};
use crate::commands::convert::WrittenModel;
use crate::output::{CommandOutcome, Output};
use crate::sources::{open_as, original_transformer, transformer};
use clearform_attention::Radius;
use clearform_convert::{AttentionPatch, ConversionPlan, ConversionReport, PatchMode, SourceHashes};
use clearform_portable_model::{CopyMode, Overwrite, PortableModel, StagingDir};
use clearform_runtime::{Components, Transformer};
use clearform_weights::TensorSource;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

pub fn run(args: &PatchArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PatchAction::Extract { model, base, output: path } => extract(model, base, path, output),
        PatchAction::Apply(apply) => self::apply(apply, output),
    }
}

fn extract(model: &Path, base: &Path, path: &Path, output: &Output) -> anyhow::Result<CommandOutcome> {
    let tensors = extract_to(model, base, path)?;
    output.result(&ExtractedPatch { patch: path.to_owned(), tensors })?;
    Ok(CommandOutcome::Whole)
}

/// Writes the distilled attention of `model`, made from `base`, to `path`, and counts its tensors.
pub fn extract_to(model: &Path, base: &Path, path: &Path) -> anyhow::Result<usize> {
    let record = PortableModel::open(model)?.record().clone();
    let (model, base) = (transformer(model)?, original_transformer(base, model)?);
    Ok(AttentionPatch::extract(&model.source(), &base.source(), &record.family, &record.plan()?, path)?)
}

/// Puts the patch at `path` into `to`, as the model `output` in the place of any that stands there.
pub fn apply_to(path: &Path, to: &Path, output: &Path, mode: PatchMode, base: Option<&Path>) -> anyhow::Result<()> {
    let patch = AttentionPatch::open(path, None)?;
    write(&PatchApplication { patch: &patch, to, output, mode, base, replace: Overwrite::PortableModel }).map(drop)
}

/// A patch that goes into a checkpoint.
struct PatchApplication<'a> {
    patch: &'a AttentionPatch,
    to: &'a Path,
    output: &'a Path,
    mode: PatchMode,
    base: Option<&'a Path>,
    replace: Overwrite,
}

fn apply(args: &crate::args::PatchApplyArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let patch = AttentionPatch::open(&args.patch, args.radius.map(Radius::new).transpose()?)?;
    let mode = match args.mode {
        PatchModeArg::Replace => PatchMode::Replace,
        PatchModeArg::Shift => PatchMode::Shift,
    };
    let (to, base, replace) = (&args.to, args.base.as_deref(), Overwrite::allowed_if(args.overwrite));
    let report = write(&PatchApplication { patch: &patch, to, output: &args.output, mode, base, replace })?;
    output.result(&WrittenModel::new(&args.output, patch.plan(), report))?;
    Ok(CommandOutcome::Whole)
}

fn write(application: &PatchApplication) -> anyhow::Result<ConversionReport> {
    let PatchApplication { patch, to, output, mode, base, replace } = *application;
    let base = base.map(transformer).transpose()?;
    let base = base.as_ref().map(Transformer::source);
    let base = base.as_ref().map(|base| base as &dyn TensorSource);
    let reading = SourceArgs { family: patch.family().map(str::to_owned), ..SourceArgs::default() };
    let reading = crate::sources::reading(&reading)?;
    let transformer = open_as(to, &reading)?;
    let source = transformer.source();
    let patched = patch.apply_to(&source, mode, base)?;
    let components = Components::new(to, None).with_embedded(&transformer, &reading)?;
    let plan = ConversionPlan::new(transformer.identified(), patch.plan().clone())
        .with_components(to.is_dir().then(|| to.to_owned()).into_iter().collect(), CopyMode::Copy)
        .with_parts(components.embedded()?);
    let origins = SourceHashes::of(transformer.checkpoint());
    let mut stage = StagingDir::begin(output, replace)?;
    let report = plan.apply(&patched, transformer.load_report(), &mut stage, &mut |_, _| ())?;
    stage.finish(plan.record(origins.wait()?)?)?;
    Ok(report)
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
