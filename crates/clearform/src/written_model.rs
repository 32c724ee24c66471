//! [`WrittenModel`]: the result of the functions that write a portable model.

use clearform_attention::AttentionPlan;
use clearform_convert::ConversionReport;
use clearform_portable_model::{DistillationRecord, VerdictRecord};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// A portable model that was written.
#[derive(Debug, Clone, Serialize)]
pub struct WrittenModel {
    /// Its folder.
    pub model: PathBuf,
    /// Its attention plan.
    pub attention: String,
    /// What became of every tensor.
    #[serde(flatten)]
    pub report: ConversionReport,
    /// How near it is to its teacher; `None` without distillation or without samples that are held out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<VerdictRecord>,
}

impl WrittenModel {
    pub(crate) fn new(
        path: &Path,
        attention: &AttentionPlan,
        report: ConversionReport,
        distillation: Option<&DistillationRecord>,
    ) -> Self {
        let verdict = distillation.and_then(|record| record.verdict.clone());
        Self { model: path.to_owned(), attention: attention.to_string(), report, verdict }
    }
}

impl fmt::Display for WrittenModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, attention, report, verdict } = self;
        let used = report.load_report.used();
        let skipped = report.load_report.skipped().count();
        writeln!(f, "{}: attention {attention}, {} parameters", model.display(), report.parameters)?;
        write!(f, "{used} tensors used, {skipped} skipped, {} added", report.added.len())?;
        if !report.components.is_empty() {
            write!(f, "; with {}", report.components.join(", "))?;
        }
        if !report.missing_components.is_empty() {
            write!(f, "\nwithout {}: ", report.missing_components.join(", "))?;
            f.write_str("generate takes them from a pipeline of the same family with --components DIR")?;
        }
        for (component, load_report) in &report.component_reports {
            write!(f, "\n{component}, from a file: {} tensors used", load_report.used())?;
            write!(f, ", {} skipped", load_report.skipped().count())?;
        }
        if let Some(quantized) = &report.quantized {
            write!(f, "\n{quantized}")?;
        }
        if let Some(first) = report.not_finite.first() {
            let count = report.not_finite.len();
            write!(
                f,
                "\nwarning: {count} of its tensors have NaN or infinity, such as {first}: the source is damaged"
            )?;
        }
        verdict.iter().try_for_each(|verdict| write!(f, "\n{verdict}"))
    }
}
