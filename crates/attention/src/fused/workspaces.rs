//! [`Workspaces`]: a pool of working memory that jobs borrow, so that each thread allocates once.

use std::sync::{Mutex, PoisonError};

/// The workspaces that are not in use.
pub(super) struct Workspaces<T>(Mutex<Vec<T>>);

impl<T> Workspaces<T> {
    /// An empty pool.
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// Takes a free workspace, with the contents it was returned with, or a new one from `make`.
    pub fn take(&self, make: impl FnOnce() -> T) -> T {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(make)
    }

    /// Returns a workspace to the pool.
    pub fn give(&self, workspace: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
    }
}
