//! [`verify`]: checks a portable model's files.

use crate::Result;
use clearform_portable_model::{PortableModel, VerifyReport};
use clearform_runtime::Components;
use std::path::Path;

/// Checks every recorded file of the portable model `model` against its size and hash, and, if all match, that the
/// weights of its transformer and its other components can be computed with.
///
/// # Errors
/// `model` is not a portable model, a file cannot be read, or weights are in a form that is not computed with.
///
/// # Example
/// ```no_run
/// let report = clearform::verify("FLUX.1-dev-clear".as_ref())?;
/// assert!(report.is_intact(), "{report}");
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn verify(model: &Path) -> Result<VerifyReport> {
    let report = PortableModel::verify(model)?;
    if report.is_intact() {
        Components::new(model, None).check_all_weights()?;
    }
    Ok(report)
}
