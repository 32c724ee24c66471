//! [`map_each`]: a function applied to each item, on all threads if that pays.

use crate::Result;
use clearform_sampling::SamplingError;
use rayon::prelude::*;
use std::ops::ControlFlow;

/// Items that a thread gets before [`map_watched`] reports.
const AT_ONCE: usize = 4;

/// Applies `f` to each item, on all threads if `in_parallel`. A GPU gets its work from one thread.
pub(crate) fn map_each<T: Send, R: Send>(
    items: Vec<T>,
    in_parallel: bool,
    f: impl Fn(T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    if in_parallel { items.into_par_iter().map(f).collect() } else { items.into_iter().map(f).collect() }
}

/// As [`map_each`]; `watch` is called with the number of items done and may cancel.
pub(crate) fn map_watched<T: Send, R: Send>(
    items: Vec<T>,
    in_parallel: bool,
    watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    f: impl Fn(T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    let at_once = if in_parallel { AT_ONCE * rayon::current_num_threads() } else { 1 };
    let mut results = Vec::with_capacity(items.len());
    let mut items = items.into_iter();
    loop {
        let part: Vec<T> = items.by_ref().take(at_once).collect();
        if part.is_empty() {
            return Ok(results);
        }
        results.extend(map_each(part, in_parallel, &f)?);
        if watch(results.len()).is_break() {
            return Err(SamplingError::Cancelled.into());
        }
    }
}
