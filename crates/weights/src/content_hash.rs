//! [`content_hash`]: tells the values of tensors from others, whatever file they are in.

use crate::stream::RunningDigest;
use crate::{Result, TensorSource};

/// SHA-256 of the tensors `names` of `source`, in hexadecimal: of each its name and its bytes as they are stored.
///
/// # Errors
/// A tensor is missing or cannot be read.
pub fn content_hash<'a>(source: &dyn TensorSource, names: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let mut digest = RunningDigest::default();
    for name in names {
        digest.update(name.as_bytes());
        digest.update(&source.read(name)?.bytes);
    }
    Ok(digest.finish().sha256)
}
