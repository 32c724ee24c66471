//! [`LayoutError`]: why a checkpoint or manifest is refused, and how to fix it.

use crate::mapping::load_report::LoadReport;
use clearform_weights::WeightsError;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A manifest is invalid.
    #[error("manifest {origin}: {reason}")]
    BadManifest {
        /// Its file.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint is recognised, but it is not a model of a supported family.
    #[error("this is {name}: not a supported model ({evidence}); {remedy}")]
    Unsupported {
        /// What it is.
        name: String,
        /// The tensor it was recognised by.
        evidence: String,
        /// What to do.
        remedy: String,
    },
    /// No family fits.
    #[error("no supported model fits these tensors; nearest: {}", if nearest.is_empty() { "none".to_owned() } else { nearest.join("; ") })]
    Unknown {
        /// The families and layouts that fit best, best first, and what each lacks.
        nearest: Vec<String>,
    },
    /// Several families fit, or a setting that changes the result cannot be determined.
    #[error("{what} cannot be determined from the tensors: {reason}")]
    Ambiguous {
        /// What cannot be determined.
        what: String,
        /// The choices, and how to choose.
        reason: String,
    },
    /// No manifest has the requested name.
    #[error("unknown {kind} {name:?}; {}", if choices.is_empty() { "there is none".to_owned() } else { format!("choose one of {choices:?}") })]
    NoSuch {
        /// Family, variant or layout.
        kind: &'static str,
        /// The requested name.
        name: String,
        /// The names that exist.
        choices: Vec<String>,
    },
    /// Tensors are missing, have the wrong shape or are not understood.
    #[error("the model is not complete: {0}")]
    Incomplete(Box<LoadReport>),
    /// Reading the checkpoint failed.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, LayoutError>;
