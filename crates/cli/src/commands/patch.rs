//! `clearform patch`: distilled attention out of one model and into another.

use crate::args::{Patch as PatchArgs, PatchAction, PatchMode, Reading};
use crate::commands::convert::Written;
use crate::opening::{identify, transformer};
use crate::output::{Outcome, Output};
use clearform_attention::Radius;
use clearform_convert::{ConversionPlan, Mode, Patch, Placing, PortableModel, Replace, Stage};
use clearform_runtime::Transformer;
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
    let record = PortableModel::open(model)?.record().clone();
    let (model, base) = (transformer(model)?, transformer(base)?);
    let tensors = Patch::extract(model.source(), base.source(), &record.family, &record.plan()?, path)?;
    output.result(&Extracted { patch: path.to_owned(), tensors })?;
    Ok(Outcome::Whole)
}

fn apply(args: &crate::args::PatchApply, output: &Output) -> anyhow::Result<Outcome> {
    let patch = Patch::open(&args.patch, args.radius.map(Radius::new).transpose()?)?;
    let base = args.base.as_deref().map(transformer).transpose()?;
    let (checkpoint, identified) = identify(&args.to, &Reading::default())?;
    let canonical = identified.canonical(&checkpoint).complete()?;
    let mode = match args.mode {
        PatchMode::Replace => Mode::Replace,
        PatchMode::Shift => Mode::Shift,
    };
    let patched = patch.onto(&canonical, mode, base.as_ref().map(Transformer::source))?;
    let plan = ConversionPlan::new(&identified, patch.plan().clone())
        .with_components(args.to.is_dir().then(|| args.to.clone()).into_iter().collect(), Placing::Copy);
    let stage = Stage::begin(&args.output, Replace::allowed_if(args.overwrite))?;
    let report = plan.apply(&patched, canonical.account(), &stage, &mut |_, _| ())?;
    stage.finish(plan.record(&checkpoint)?)?;
    output.result(&Written::new(&args.output, patch.plan(), report))?;
    Ok(Outcome::Whole)
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
