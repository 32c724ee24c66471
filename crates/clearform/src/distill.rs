//! [`distill`]: trains a converted model further against the original it was made from.

use crate::forecast::{Forecast, announce};
use crate::observer::{NumberedStages, Observer, Progress, Stage, note};
use crate::patch::check_base;
use crate::recipe::{ResolvedTraining, check_training};
use crate::sources::{
    ExtraComponents, Opening, linear_plan, open_original_pipeline, open_original_transformer, open_transformer,
};
use crate::training::{self, StudentSpec};
use crate::training_samples::{TrainingSamples, check_samples_folder};
use crate::{ClearformError, ComputeDevice, Result, TrainingOptions, WrittenModel, run_record};
use candle_core::DType;
use clearform_convert::{AttentionOverlay, ConversionPlan, SourceHashes};
use clearform_portable_model::{CopyMode, ModelRecord, Overwrite, PortableModel, SourceRecord, StagingDir};
use clearform_runtime::{ComponentFiles, Pipeline, ReadOptions, TransformerCheckpoint};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What [`distill`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillOptions {
    /// The portable model to train further.
    pub model: PathBuf,
    /// The original model that it was converted from.
    pub teacher: PathBuf,
    /// Folder of the distilled model; `None` replaces `model`.
    #[serde(default)]
    pub output: Option<PathBuf>,
    /// How the student is trained.
    #[serde(default)]
    pub training: TrainingOptions,
    /// A diffusers folder with the components that the teacher lacks; `None` is `model`.
    #[serde(default)]
    pub components: Option<PathBuf>,
    /// Components in files of their own, which take precedence.
    #[serde(default)]
    pub component_files: ComponentFiles,
    /// Where the student is trained.
    #[serde(default)]
    pub device: ComputeDevice,
}

/// The command, in the record of a run.
const COMMAND: &str = "distill";

impl DistillOptions {
    /// Trains `model` further against `teacher` and replaces it.
    pub fn new(model: impl Into<PathBuf>, teacher: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            teacher: teacher.into(),
            output: None,
            training: TrainingOptions::default(),
            components: None,
            component_files: ComponentFiles::default(),
            device: ComputeDevice::default(),
        }
    }

    /// The folder that is written, and whether it may exist.
    fn target(&self) -> (&Path, Overwrite) {
        match self.output.as_deref() {
            Some(output) => (output, Overwrite::Never),
            None => (&self.model, Overwrite::PortableModel),
        }
    }

    /// The options of the run that is resumed, if one is.
    fn resumed(&self, observer: &mut dyn Observer) -> Result<Option<Self>> {
        if !self.training.resume {
            return Ok(None);
        }
        let usual = Self::new(&self.model, &self.teacher);
        let work = StagingDir::work_of(self.target().0);
        let resumed = run_record::resumed(COMMAND, self, &usual, &work)?;
        run_record::say(resumed.as_ref(), self, &work, observer);
        Ok(resumed)
    }
}

/// Trains a portable model and writes it.
///
/// # Errors
/// A model cannot be read, components for samples are missing, the output exists, or training or writing fails;
/// [`ClearformError::Cancelled`](crate::ClearformError::Cancelled).
///
/// # Example
/// ```no_run
/// use clearform::{DistillOptions, distill};
///
/// let written = distill(&DistillOptions::new("FLUX.1-dev-clear", "FLUX.1-dev"), &mut ())?;
/// println!("{written}");
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn distill(options: &DistillOptions, observer: &mut dyn Observer) -> Result<WrittenModel> {
    let resumed = options.resumed(observer)?;
    let options = resumed.as_ref().unwrap_or(options);
    let observer = &mut NumberedStages::of_conversion(observer, Some(&options.training));
    check_training(&options.training)?;
    check_samples_folder(&options.training, options.target().0)?;
    let model = PortableModel::open(&options.model)?;
    let plan = model.record().plan()?;
    check_teacher(&options.teacher)?;
    let teacher = open_original_transformer(&options.teacher, &options.model)?;
    let student = open_transformer(&options.model)?;
    check_base([&options.model, &options.teacher], [&student, &teacher], model.record(), observer)?;
    let teacher_files = check_original(&teacher, model.record(), observer)?;
    let (target, overwrite) = options.target();
    if options.output.is_some() && target.exists() {
        let reason = format!("{}: already exists; choose another name or remove it", target.display());
        return Err(ClearformError::bad_option(reason));
    }
    let mut staging = match options.training.resume {
        true => StagingDir::resume(target, overwrite)?,
        false => StagingDir::begin(target, overwrite)?,
    };
    let _kept = run_record::keep(COMMAND, options, staging.work())?;
    let pipeline = teacher_pipeline(options, &teacher)?;
    let training = ResolvedTraining::new(&options.training, &teacher, pipeline.as_ref())?;
    announce(&Forecast::new(&teacher, &plan, &training, options.device)?, &training, options.device, observer)?;
    let samples = TrainingSamples::gather(pipeline, &training, staging.work(), observer)?;
    let start = student.source();
    let folder = staging.work().join("training");
    let spec = StudentSpec { plan: &plan, earlier: Some(&start), folder: &folder, device: options.device };
    let mut trained = training::train(&teacher, spec, &samples, &training, observer)?;
    let earlier = model.record().distillation.as_ref();
    trained.record.earlier_steps = earlier.map_or(0, |earlier| earlier.steps + earlier.earlier_steps);
    let distilled = AttentionOverlay::new(&start, &trained.distilled.tensors);
    let conversion = ConversionPlan::new(student.identified(), plan.clone())
        .made_from(options.teacher.clone())
        // What was trained is not in the blocks of a quantised student.
        .with_dtype(student.is_quantized().then_some(DType::BF16))
        .with_components(vec![options.model.clone()], CopyMode::Copy);
    let mut watch = |done, total| observer.progress(&Progress::new(Stage::Writing, done as usize, total as usize));
    let report = conversion.apply(&distilled, student.load_report(), &mut staging, &mut watch)?;
    let mut record = conversion.record([model.record().source.clone(), teacher_files].concat())?;
    record.component = model.record().component.clone();
    record.adapter = model.record().adapter.clone();
    record.patch = model.record().patch.clone();
    record.distillation = Some(trained.record.clone());
    conversion.write_card(&record, &staging)?;
    trained.write_report(&staging)?;
    staging.finish(record)?;
    Ok(WrittenModel::new(target, &plan, report, Some(&trained.record)))
}

/// The files of a teacher that the model was not made from, which is said of; none of the original.
fn check_original(
    teacher: &TransformerCheckpoint,
    record: &ModelRecord,
    observer: &mut dyn Observer,
) -> Result<Vec<SourceRecord>> {
    let files = SourceHashes::start(teacher.checkpoint()).wait()?;
    let is_known = |file: &SourceRecord| record.source.iter().any(|source| source.sha256 == file.sha256);
    let others: Vec<SourceRecord> = files.into_iter().filter(|file| !is_known(file)).collect();
    if let Some(first) = others.first() {
        note(
            observer,
            format_args!(
                "the teacher's {} is none of the files that the model was made from (clearform.toml); unless its weights \
                 are the same, the student gets another teacher",
                first.name
            ),
        );
    }
    Ok(others)
}

/// Refuses a linear model as the teacher.
fn check_teacher(teacher: &Path) -> Result<()> {
    match linear_plan(teacher)? {
        None => Ok(()),
        Some(plan) => Err(ClearformError::bad_option(format!(
            "{}: is a linear model (attention {plan}), and no teacher; expected the original model",
            teacher.display()
        ))),
    }
}

/// The teacher's pipeline; `None` if a component of it is missing and samples need not be generated.
fn teacher_pipeline(options: &DistillOptions, teacher: &TransformerCheckpoint) -> Result<Option<Pipeline>> {
    let folder = options.components.as_deref().unwrap_or(&options.model);
    let extra = ExtraComponents { folder: Some(folder), files: &options.component_files };
    let components = extra.of(&options.teacher).with_embedded(teacher, &ReadOptions::default_options()?)?;
    let missing = components.missing(teacher.identified().components());
    if options.training.generates_samples() {
        training::require_components(&missing)?;
    }
    if !missing.is_empty() {
        return Ok(None);
    }
    let opening = Opening { components: extra, device: options.device, memory: options.training.memory };
    open_original_pipeline(&options.teacher, &options.model, opening).map(Some)
}
