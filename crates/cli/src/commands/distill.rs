//! `clearform distill`: trains a converted model further against the original it was made from.

use crate::args::Distill;
use crate::commands::convert::Written;
use crate::opening::{open_original, original_transformer, transformer};
use crate::output::{Outcome, Output};
use crate::school::{self, Student};
use clearform_convert::{ConversionPlan, Patched};
use clearform_distill::SampleSet;
use clearform_portable_model::{Placing, PortableModel, Replace, Stage};
use clearform_runtime::{Components, Reading, Transformer};
use std::path::Path;

pub fn run(args: &Distill, output: &Output) -> anyhow::Result<Outcome> {
    let model = PortableModel::open(&args.model)?;
    let plan = model.record().plan()?;
    let (teacher, student) = (original_transformer(&args.teacher, &args.model)?, transformer(&args.model)?);
    let target = args.output.as_deref().unwrap_or(&args.model);
    let replace = Replace::allowed_if(target == args.model);
    let mut stage = match args.training.resume {
        true => Stage::resume(target, replace)?,
        false => Stage::begin(target, replace)?,
    };
    let samples = samples(args, &teacher, &stage.work().join("samples"), output)?;
    let start = student.source();
    let pupil = Student { plan: &plan, start: &start, folder: &stage.work().join("training") };
    let lesson = school::train(&teacher, pupil, &samples, &args.training, output)?;
    let distilled = Patched::new(&start, &lesson.distilled.tensors);
    let conversion = ConversionPlan::new(student.identified(), plan.clone())
        .with_components(vec![args.model.clone()], Placing::Copy);
    let report = conversion.apply(&distilled, student.account(), &mut stage, &mut |_, _| ())?;
    let mut record = conversion.record(model.record().source.clone())?;
    record.distillation = Some(lesson.record);
    stage.finish(record)?;
    output.result(&Written::new(target, &plan, report))?;
    Ok(Outcome::Whole)
}

fn samples(args: &Distill, teacher: &Transformer, folder: &Path, output: &Output) -> anyhow::Result<SampleSet> {
    if let Some(folder) = &args.training.samples {
        return school::ready_samples(folder);
    }
    let components = args.training.components.as_deref().unwrap_or(&args.model);
    let names = teacher.identified().components();
    let parts = Components::new(&args.teacher, Some(components)).with_parts_of(teacher, &Reading::plain()?)?;
    school::needed(Some(components), &parts.missing(names))?;
    school::samples(
        &open_original(&args.teacher, &args.model, Some(components), args.training.device)?,
        &args.training,
        folder,
        output,
    )
}
