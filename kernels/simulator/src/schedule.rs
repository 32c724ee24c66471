//! [`Schedule`]: what the CUDA programming model leaves open, so that a correct kernel gives the same bits either way.

use std::cell::Cell;

/// How a launch orders warps and asynchronous copies, and whether it refuses code that only happens to work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// `SIMULATOR_ORDER=reverse`. Even blocks run their first warp first and odd blocks their last one; reversed, it is the
    /// other way round. Running both finds a missing barrier: some block reads what has not been written yet.
    pub reversed: bool,
    /// `SIMULATOR_COPIES=early`. Asynchronous copies land when they are issued instead of when they are waited for. Early
    /// ones expose a buffer that is refilled while still in use, late ones a missing wait.
    pub early_copies: bool,
    /// `SIMULATOR_PEDANTIC=1`. Bank conflicts of `ldmatrix`, lanes that share memory without a barrier between them, and
    /// barriers or shuffles that lanes which have exited should have reached are errors.
    pub pedantic: bool,
}

thread_local! {
    static OVERRIDE: Cell<Option<Schedule>> = const { Cell::new(None) };
}

impl Schedule {
    /// What launches of this thread use: set by [`Schedule::set`], or by the environment as it is now.
    pub fn current() -> Self {
        let variable_is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
        OVERRIDE.get().unwrap_or_else(|| Self {
            reversed: variable_is("SIMULATOR_ORDER", "reverse"),
            early_copies: variable_is("SIMULATOR_COPIES", "early"),
            pedantic: variable_is("SIMULATOR_PEDANTIC", "1"),
        })
    }

    /// Sets the schedule of this thread's launches, whatever the environment says.
    pub fn set(self) {
        OVERRIDE.set(Some(self));
    }
}
