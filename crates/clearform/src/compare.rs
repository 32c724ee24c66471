//! [`compare`]: generates images with teacher and student from the same seeds, and compares them.

use crate::comparison_report::{ComparedImages, ComparedModel, ComparisonReport};
use crate::evaluation::{EvaluationOptions, EvaluationRun, attention_errors};
use crate::observer::{Observer, Progress, Stage};
use crate::sources::{ExtraComponents, open_original_pipeline, open_pipeline};
use crate::{ClearformError, ComputeDevice, Result, prepare_folder};
use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_models::Denoiser;
use clearform_runtime::{EncodedPrompts, Pipeline};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Images on which attention is compared layer by layer: the error averages over all their tokens, so a few suffice.
const LAYER_IMAGES: usize = 4;

/// What [`compare`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompareOptions {
    /// The original model.
    pub teacher: PathBuf,
    /// The linear model.
    pub student: PathBuf,
    /// Folder of the report: `report.html`, `report.json` and `sheet.png`.
    pub output: PathBuf,
    /// What both generate.
    #[serde(default)]
    pub evaluation: EvaluationOptions,
    /// Where both run.
    #[serde(default)]
    pub device: ComputeDevice,
}

impl CompareOptions {
    /// Compares `student` with `teacher` on a few built-in prompts, and writes the report to `output`.
    pub fn new(teacher: impl Into<PathBuf>, student: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            teacher: teacher.into(),
            student: student.into(),
            output: output.into(),
            evaluation: EvaluationOptions::default(),
            device: ComputeDevice::default(),
        }
    }

    /// The components that were given, or those of the folder `other`.
    fn or_of<'a>(&'a self, other: &'a Path) -> ExtraComponents<'a> {
        let given = self.evaluation.extra_components();
        ExtraComponents { folder: given.folder.or_else(|| other.is_dir().then_some(other)), ..given }
    }

    /// Teacher and student. What one lacks beside its transformer is the other's.
    fn open(&self) -> Result<[Pipeline; 2]> {
        let teacher = open_original_pipeline(&self.teacher, &self.student, self.or_of(&self.student), self.device)?;
        let student = open_pipeline(&self.student, self.or_of(&self.teacher), self.device)?;
        if *teacher.plan() != AttentionPlan::full() && *student.plan() == AttentionPlan::full() {
            return Err(ClearformError::bad_option(format!(
                "{}: has attention {}, and {} has full attention: expected the original first, then the linear model",
                self.teacher.display(),
                teacher.plan(),
                self.student.display()
            )));
        }
        Ok([teacher, student])
    }
}

/// Generates the same images with both models, and with the teacher under the student's attention, and writes a report
/// on how similar they are.
///
/// # Errors
/// A model cannot be opened or run, or the report cannot be written;
/// [`ClearformError::Cancelled`](crate::ClearformError::Cancelled).
///
/// # Example
/// ```no_run
/// use clearform::{CompareOptions, compare};
///
/// let report = compare(&CompareOptions::new("FLUX.1-dev", "FLUX.1-dev-clear", "comparison"), &mut ())?;
/// println!("PSNR {:.1} dB, SSIM {:.3}", report.psnr, report.ssim);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn compare(options: &CompareOptions, observer: &mut dyn Observer) -> Result<ComparisonReport> {
    prepare_folder(&options.output)?;
    let [teacher, student] = options.open()?;
    let evaluation = EvaluationRun::new(&options.evaluation, &teacher)?;
    evaluation.check_control_images(teacher.takes_control())?;
    let has_undistilled = teacher.plan() != student.plan();
    let total = evaluation.prompts.len() * if has_undistilled { 3 } else { 2 };
    let prompts = [evaluation.encode(&teacher, observer)?, evaluation.encode(&student, &mut ())?];
    let mut comparison = Comparison { evaluation: &evaluation, observer, done: 0, total };

    let original = teacher.load_transformer(teacher.plan(), None)?;
    let (wanted, teacher_seconds) = comparison.generate(&teacher, &prompts[0], original.as_ref())?;
    let undistilled = match has_undistilled {
        true => {
            let windowed = teacher.load_transformer(student.plan(), None)?;
            let (latents, _) = comparison.generate(&teacher, &prompts[0], windowed.as_ref())?;
            Some(evaluation.decode(&teacher, &latents)?)
        }
        false => None,
    };
    let linear = student.load_transformer(student.plan(), None)?;
    let (got, student_seconds) = comparison.generate(&student, &prompts[1], linear.as_ref())?;

    let input = evaluation.halfway_input(&teacher, &wanted, evaluation.prompts.len().min(LAYER_IMAGES))?;
    let attention_error = attention_errors(original.as_ref(), linear.as_ref(), &input)?;
    let images = ComparedImages {
        teacher: evaluation.decode(&teacher, &wanted)?,
        undistilled,
        student: evaluation.decode(&student, &got)?,
    };
    let models = [
        ComparedModel::new(&options.teacher, teacher.plan(), teacher_seconds),
        ComparedModel::new(&options.student, student.plan(), student_seconds),
    ];
    let report = ComparisonReport::new(&evaluation, models, &images, attention_error)?;
    report.write(&options.output, &images)?;
    Ok(report)
}

/// A comparison under way.
struct Comparison<'a> {
    evaluation: &'a EvaluationRun,
    observer: &'a mut dyn Observer,
    done: usize,
    total: usize,
}

impl Comparison<'_> {
    /// The latents of all images, and the seconds that each took.
    fn generate(
        &mut self,
        pipeline: &Pipeline,
        prompts: &EncodedPrompts,
        denoiser: &dyn Denoiser,
    ) -> Result<(Tensor, f64)> {
        let begun = Instant::now();
        let mut advance = |count: usize| {
            self.done += count;
            self.observer.progress(&Progress::new(Stage::Comparing, self.done, self.total))
        };
        let latents = self.evaluation.generate_latents(pipeline, prompts, denoiser, &mut advance)?;
        Ok((latents, begun.elapsed().as_secs_f64() / self.evaluation.prompts.len() as f64))
    }
}
