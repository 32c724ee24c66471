//! [`Workspaces`]: working memory that jobs borrow, so that there is one for each thread and none is made twice.

use std::sync::{Mutex, PoisonError};

/// Those that nobody works in.
pub(super) struct Workspaces<T>(Mutex<Vec<T>>);

impl<T> Workspaces<T> {
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// A free one as it was left, or a new one of `make`.
    pub fn take(&self, make: impl FnOnce() -> T) -> T {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(make)
    }

    /// Gives one back.
    pub fn give(&self, workspace: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
    }
}
