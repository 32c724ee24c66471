//! `clearform distill`: trains a converted model further against the original it was made from.

use super::written_model::WrittenModel;
use crate::args::DistillArgs;
use crate::distillation::{self, StudentSpec};
use crate::output::{CommandOutcome, Output};
use crate::sources::{open_original_pipeline, open_original_transformer, open_transformer};
use clearform_convert::{ConversionPlan, PatchedAttention};
use clearform_distill::SampleSet;
use clearform_portable_model::{CopyMode, Overwrite, PortableModel, StagingDir};
use clearform_runtime::{Components, ReadOptions, TransformerCheckpoint};
use std::path::Path;

/// Trains the model and writes it to the output folder, or replaces it.
pub fn run(args: &DistillArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let model = PortableModel::open(&args.model)?;
    let plan = model.record().plan()?;
    let teacher = open_original_transformer(&args.teacher, &args.model)?;
    let student = open_transformer(&args.model)?;
    let target = args.output.as_deref().unwrap_or(&args.model);
    let overwrite = Overwrite::allowed_if(target == args.model);
    let mut staging = match args.training.resume {
        true => StagingDir::resume(target, overwrite)?,
        false => StagingDir::begin(target, overwrite)?,
    };
    let samples = samples(args, &teacher, &staging.work().join("samples"), output)?;
    let start = student.source();
    let folder = staging.work().join("training");
    let spec = StudentSpec { plan: &plan, start: &start, folder: &folder, device: args.running.device };
    let trained = distillation::train(&teacher, spec, &samples, &args.training, output)?;
    let distilled = PatchedAttention::new(&start, &trained.distilled.tensors);
    let conversion = ConversionPlan::new(student.identified(), plan.clone())
        .with_components(vec![args.model.clone()], CopyMode::Copy);
    let report = conversion.apply(&distilled, student.load_report(), &mut staging, &mut |_, _| ())?;
    let mut record = conversion.record(model.record().source.clone())?;
    record.distillation = Some(trained.record);
    staging.finish(record)?;
    output.result(&WrittenModel::new(target, &plan, report))?;
    Ok(CommandOutcome::Complete)
}

fn samples(
    args: &DistillArgs,
    teacher: &TransformerCheckpoint,
    folder: &Path,
    output: &Output,
) -> anyhow::Result<SampleSet> {
    if let Some(folder) = &args.training.samples {
        return distillation::open_samples(folder);
    }
    let extra = args.training.components.as_deref().unwrap_or(&args.model);
    let components = Components::new(&args.teacher, Some(extra));
    let components = components.with_embedded(teacher, &ReadOptions::default_options()?)?;
    distillation::require_components(&components.missing(teacher.identified().components()))?;
    let pipeline = open_original_pipeline(&args.teacher, &args.model, Some(extra), args.running.device)?;
    distillation::prepare_samples(&pipeline, &args.training, folder, output)
}
