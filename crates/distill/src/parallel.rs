//! [`map_each`]: a function applied to each item, on all threads if that pays.

use crate::Result;
use rayon::prelude::*;

/// Applies `f` to each item, on all threads if `in_parallel`. A GPU gets its work from one thread.
pub(crate) fn map_each<T: Send, R: Send>(
    items: Vec<T>,
    in_parallel: bool,
    f: impl Fn(T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    if in_parallel { items.into_par_iter().map(f).collect() } else { items.into_iter().map(f).collect() }
}
