//! `clearform distill`: trains a converted model further against the original it was made from.

use crate::args::DistillArgs;
use crate::commands::convert::WrittenModel;
use crate::distillation::{self, StudentSpec};
use crate::output::{CommandOutcome, Output};
use crate::sources::{open_original, original_transformer, transformer};
use clearform_convert::{ConversionPlan, PatchedAttention};
use clearform_distill::SampleSet;
use clearform_portable_model::{CopyMode, Overwrite, PortableModel, StagingDir};
use clearform_runtime::{Components, ReadOptions, Transformer};
use std::path::Path;

pub fn run(args: &DistillArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let model = PortableModel::open(&args.model)?;
    let plan = model.record().plan()?;
    let teacher = original_transformer(&args.teacher, &args.model)?;
    let student = transformer(&args.model)?;
    let target = args.output.as_deref().unwrap_or(&args.model);
    let replace = Overwrite::allowed_if(target == args.model);
    let mut stage = match args.training.resume {
        true => StagingDir::resume(target, replace)?,
        false => StagingDir::begin(target, replace)?,
    };
    let samples = samples(args, &teacher, &stage.work().join("samples"), output)?;
    let start = student.source();
    let spec = StudentSpec { plan: &plan, start: &start, folder: &stage.work().join("training") };
    let trained = distillation::train(&teacher, spec, &samples, &args.training, output)?;
    let distilled = PatchedAttention::new(&start, &trained.distilled.tensors);
    let conversion = ConversionPlan::new(student.identified(), plan.clone())
        .with_components(vec![args.model.clone()], CopyMode::Copy);
    let report = conversion.apply(&distilled, student.load_report(), &mut stage, &mut |_, _| ())?;
    let mut record = conversion.record(model.record().source.clone())?;
    record.distillation = Some(trained.record);
    stage.finish(record)?;
    output.result(&WrittenModel::new(target, &plan, report))?;
    Ok(CommandOutcome::Whole)
}

fn samples(args: &DistillArgs, teacher: &Transformer, folder: &Path, output: &Output) -> anyhow::Result<SampleSet> {
    if let Some(folder) = &args.training.samples {
        return distillation::existing_samples(folder);
    }
    let components = args.training.components.as_deref().unwrap_or(&args.model);
    let names = teacher.identified().components();
    let parts =
        Components::new(&args.teacher, Some(components)).with_embedded(teacher, &ReadOptions::default_options()?)?;
    distillation::require_components(Some(components), &parts.missing(names))?;
    distillation::samples(
        &open_original(&args.teacher, &args.model, Some(components), args.training.device)?,
        &args.training,
        folder,
        output,
    )
}
