//! [`ComparedPair`]: whether two models are an original and its linear model.

use crate::observer::{Observer, note};
use crate::{ClearformError, Result};
use clearform_attention::AttentionPlan;
use clearform_convert::BaseDifference;
use clearform_runtime::{Pipeline, TransformerCheckpoint};
use std::path::Path;

/// One of two models that are compared.
#[derive(Clone, Copy)]
pub(crate) struct PairMember<'a> {
    pub path: &'a Path,
    pub plan: &'a AttentionPlan,
    pub transformer: &'a TransformerCheckpoint,
}

impl<'a> PairMember<'a> {
    /// The model at `path`, opened as `pipeline`.
    pub fn new(path: &'a Path, pipeline: &'a Pipeline) -> Self {
        Self { path, plan: pipeline.plan(), transformer: pipeline.transformer() }
    }
}

/// An original and its linear model.
pub(crate) struct ComparedPair<'a> {
    pub teacher: PairMember<'a>,
    pub student: PairMember<'a>,
}

impl ComparedPair<'_> {
    /// Refuses models in the wrong order. Whether the student was made from the teacher; notes it if it was not, or if
    /// both are one model.
    pub fn check(&self, observer: &mut dyn Observer) -> Result<bool> {
        let Self { teacher, student } = self;
        if *teacher.plan != AttentionPlan::full() && *student.plan == AttentionPlan::full() {
            return Err(ClearformError::bad_option(format!(
                "{}: has attention {}, and {} has full attention: expected the original first, then the linear model",
                teacher.path.display(),
                teacher.plan,
                student.path.display()
            )));
        }
        let [expected, found] = [teacher, student].map(|member| &member.transformer.identified().family);
        if found != expected {
            return Err(ClearformError::bad_option(format!(
                "{}: is a model of the family {found}, and {} is one of {expected}: expected its linear model",
                student.path.display(),
                teacher.path.display()
            )));
        }
        let canonical = |path: &Path| path.canonicalize().ok();
        if canonical(teacher.path) == canonical(student.path) {
            note(observer, format_args!("warning: {} is compared with itself", teacher.path.display()));
        }
        let difference = BaseDifference::largest(&student.transformer.source(), &teacher.transformer.source())?;
        if let Some(difference) = &difference {
            note(
                observer,
                format_args!(
                    "warning: {} was not made from {}, or from another number format of it: {difference}, which \
                     distillation does not change; the figures are not those of the distillation alone",
                    student.path.display(),
                    teacher.path.display()
                ),
            );
        }
        Ok(difference.is_none())
    }
}
