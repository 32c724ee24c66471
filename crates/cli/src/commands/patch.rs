//! `clearform patch`: distilled attention out of one model and into another.

use crate::args::{Patch as PatchArgs, PatchAction, PatchMode, Reading};
use crate::commands::convert::Written;
use crate::opening::{open_as, original_transformer, transformer};
use crate::output::{Outcome, Output};
use clearform_attention::Radius;
use clearform_convert::{ConversionPlan, Mode, Origins, Patch, Report};
use clearform_portable_model::{Placing, PortableModel, Replace, Stage};
use clearform_runtime::{Components, Transformer};
use clearform_weights::TensorSource;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

pub fn run(args: &PatchArgs, output: &Output) -> anyhow::Result<Outcome> {
    match &args.action {
        PatchAction::Extract { model, base, output: path } => extract(model, base, path, output),
        PatchAction::Apply(apply) => self::apply(apply, output),
    }
}

fn extract(model: &Path, base: &Path, path: &Path, output: &Output) -> anyhow::Result<Outcome> {
    let tensors = extract_to(model, base, path)?;
    output.result(&Extracted { patch: path.to_owned(), tensors })?;
    Ok(Outcome::Whole)
}

/// Writes the distilled attention of `model`, made from `base`, to `path`, and counts its tensors.
pub fn extract_to(model: &Path, base: &Path, path: &Path) -> anyhow::Result<usize> {
    let record = PortableModel::open(model)?.record().clone();
    let (model, base) = (transformer(model)?, original_transformer(base, model)?);
    Ok(Patch::extract(&model.source(), &base.source(), &record.family, &record.plan()?, path)?)
}

/// Puts the patch at `path` into `to`, as the model `output` in the place of any that stands there.
pub fn apply_to(path: &Path, to: &Path, output: &Path, mode: Mode, base: Option<&Path>) -> anyhow::Result<()> {
    let patch = Patch::open(path, None)?;
    write(&Application { patch: &patch, to, output, mode, base, replace: Replace::PortableModel }).map(drop)
}

/// A patch that goes into a checkpoint.
struct Application<'a> {
    patch: &'a Patch,
    to: &'a Path,
    output: &'a Path,
    mode: Mode,
    base: Option<&'a Path>,
    replace: Replace,
}

fn apply(args: &crate::args::PatchApply, output: &Output) -> anyhow::Result<Outcome> {
    let patch = Patch::open(&args.patch, args.radius.map(Radius::new).transpose()?)?;
    let mode = match args.mode {
        PatchMode::Replace => Mode::Replace,
        PatchMode::Shift => Mode::Shift,
    };
    let (to, base, replace) = (&args.to, args.base.as_deref(), Replace::allowed_if(args.overwrite));
    let report = write(&Application { patch: &patch, to, output: &args.output, mode, base, replace })?;
    output.result(&Written::new(&args.output, patch.plan(), report))?;
    Ok(Outcome::Whole)
}

fn write(application: &Application) -> anyhow::Result<Report> {
    let Application { patch, to, output, mode, base, replace } = *application;
    let base = base.map(transformer).transpose()?;
    let base = base.as_ref().map(Transformer::source);
    let base = base.as_ref().map(|base| base as &dyn TensorSource);
    let reading = Reading { family: patch.family().map(str::to_owned), ..Reading::default() };
    let reading = crate::opening::reading(&reading)?;
    let transformer = open_as(to, &reading)?;
    let source = transformer.source();
    let patched = patch.onto(&source, mode, base)?;
    let components = Components::new(to, None).with_parts_of(&transformer, &reading)?;
    let plan = ConversionPlan::new(transformer.identified(), patch.plan().clone())
        .with_components(to.is_dir().then(|| to.to_owned()).into_iter().collect(), Placing::Copy)
        .with_parts(components.in_file()?);
    let origins = Origins::of(transformer.checkpoint());
    let mut stage = Stage::begin(output, replace)?;
    let report = plan.apply(&patched, transformer.account(), &mut stage, &mut |_, _| ())?;
    stage.finish(plan.record(origins.wait()?)?)?;
    Ok(report)
}

#[derive(Debug, Serialize)]
struct Extracted {
    patch: PathBuf,
    tensors: usize,
}

impl fmt::Display for Extracted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} attention tensors", self.patch.display(), self.tensors)
    }
}
