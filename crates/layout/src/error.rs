//! Why a checkpoint cannot be taken, said so that a person can mend it.

use crate::mapping::load_report::LoadReport;
use clearform_weights::WeightsError;

/// Errors of this crate. Names that come from files are printed escaped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A manifest is not what it should be.
    #[error("manifest {origin}: {reason}")]
    BadManifest {
        /// Its file.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint is recognised, and is not one of the families supported.
    #[error("this is {name}: not a supported model ({evidence}); {remedy}")]
    Unsupported {
        /// What it is.
        name: String,
        /// By what it was recognised.
        evidence: String,
        /// What to do.
        remedy: String,
    },
    /// No family fits.
    #[error("no supported model fits these tensors; nearest: {}", if near.is_empty() { "none".to_owned() } else { near.join("; ") })]
    Unknown {
        /// What came near, the nearest first.
        near: Vec<String>,
    },
    /// Several families fit, or a setting that changes arithmetic cannot be told.
    #[error("{what} cannot be told from the tensors: {reason}")]
    Ambiguous {
        /// What is open.
        what: String,
        /// The choices, and how to choose.
        reason: String,
    },
    /// A name that was asked for is not in the manifests.
    #[error("{kind} {name:?} is not known; choose one of {choices:?}")]
    NoSuch {
        /// Family, variant or layout.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// The names there are.
        choices: Vec<String>,
    },
    /// Tensors are missing, misshapen or not understood.
    #[error("the model is not complete: {0}")]
    Incomplete(Box<LoadReport>),
    /// Reading the checkpoint failed.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, LayoutError>;
