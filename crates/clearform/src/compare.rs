//! [`compare`]: generates images with teacher and student from the same seeds, and compares them.

use crate::compared_pair::{ComparedPair, PairMember};
use crate::comparison_report::{ComparedImages, ComparedModel, ComparisonReport, MeasuredPair};
use crate::evaluation::{EvaluationOptions, EvaluationRun, attention_errors};
use crate::observer::{Observer, Progress, Stage, note};
use crate::output_place::prepare_report;
use crate::sources::{ExtraComponents, Opening, open_original_pipeline, open_pipeline};
use crate::{ComputeDevice, Result};
use candle_core::{Device, Tensor};
use clearform_models::{Denoiser, DenoiserInput};
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
    /// Whether an earlier report in the folder is replaced.
    #[serde(default)]
    pub replace: bool,
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
            replace: false,
        }
    }

    /// The components that were given, or those of the folder `other`.
    fn or_of<'a>(&'a self, other: &'a Path) -> ExtraComponents<'a> {
        let given = self.evaluation.extra_components();
        ExtraComponents { folder: given.folder.or_else(|| other.is_dir().then_some(other)), ..given }
    }

    /// Teacher and student, and whether one was made from the other. What one lacks beside its transformer is the
    /// other's.
    fn open(&self, observer: &mut dyn Observer) -> Result<([Pipeline; 2], bool)> {
        let memory = self.evaluation.memory.halved();
        let opening = |other| Opening { components: self.or_of(other), device: self.device, memory };
        let teacher = open_original_pipeline(&self.teacher, &self.student, opening(&self.student))?;
        let student = open_pipeline(&self.student, opening(&self.teacher))?;
        // Without a given folder each has the other's, which may well be unused.
        let is_given = self.evaluation.extra_components().folder.is_some();
        let unused = teacher.unused_components_note().and(student.unused_components_note());
        unused.iter().filter(|_| is_given).for_each(|text| note(observer, text));
        let pair = ComparedPair {
            teacher: PairMember::new(&self.teacher, &teacher),
            student: PairMember::new(&self.student, &student),
        };
        let is_pair = pair.check(observer)?;
        Ok(([teacher, student], is_pair))
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
    let _folder = prepare_report(&options.output, options.replace)?;
    let ([teacher, student], is_pair) = options.open(observer)?;
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
    let measured = MeasuredPair {
        attention_error: attention_errors(original.as_ref(), linear.as_ref(), &input)?,
        speedup: speedup(original.as_ref(), linear.as_ref(), &input)?,
        is_pair,
    };
    let images = ComparedImages {
        teacher: evaluation.decode(&teacher, &wanted)?,
        undistilled,
        student: evaluation.decode(&student, &got)?,
    };
    let models = [
        ComparedModel::new(&options.teacher, teacher.plan(), teacher_seconds),
        ComparedModel::new(&options.student, student.plan(), student_seconds),
    ];
    let report = ComparisonReport::new(&evaluation, models, &images, measured)?;
    report.write(&options.output, &images)?;
    Ok(report)
}

/// The time of an evaluation by `teacher` divided by `student`'s. Both are timed in turn, so that what else the machine
/// does slows both alike.
fn speedup(teacher: &dyn Denoiser, student: &dyn Denoiser, input: &DenoiserInput) -> Result<f64> {
    /// Evaluations of each, of which the fastest counts.
    const TIMED: usize = 3;
    let mut fastest = [f64::INFINITY; 2];
    for _ in 0..TIMED {
        for (model, fastest) in [teacher, student].into_iter().zip(&mut fastest) {
            let begun = Instant::now();
            // A GPU has finished when its result arrives.
            model.forward(input)?.to_device(&Device::Cpu)?;
            *fastest = fastest.min(begun.elapsed().as_secs_f64());
        }
    }
    Ok(fastest[0] / fastest[1].max(f64::MIN_POSITIVE))
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
