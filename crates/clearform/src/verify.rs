//! [`verify`]: checks a portable model's files.

use crate::Result;
use clearform_portable_model::{PortableModel, VerifyReport};
use std::path::Path;

/// Checks every recorded file of the portable model `model` against its size and hash.
///
/// # Errors
/// `model` is not a portable model, or a file cannot be read.
///
/// # Example
/// ```no_run
/// let report = clearform::verify("FLUX.1-dev-clear".as_ref())?;
/// assert!(report.is_intact(), "{report}");
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn verify(model: &Path) -> Result<VerifyReport> {
    Ok(PortableModel::verify(model)?)
}
