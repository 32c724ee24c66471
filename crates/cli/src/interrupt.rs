//! Ctrl-C: the first asks the command to stop after its step, the second stops it at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Exit code of an interrupted command, as shells expect it.
pub const EXIT_CODE: u8 = 130;

/// From now on an interrupt only sets a flag. Called by work that looks at it.
pub fn watch() {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(signals::handle);
}

/// Whether the user has asked to stop.
pub fn is_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

#[cfg(unix)]
mod signals {
    use super::{Ordering, REQUESTED};

    const TEXT: &[u8] = b"\nstopping after this step; interrupt again to stop at once\n";
    const SIGNALS: [libc::c_int; 2] = [libc::SIGINT, libc::SIGTERM];

    /// Lets an interrupt request a stop.
    pub fn handle() {
        let handler = on_signal as extern "C" fn(libc::c_int);
        for signal in SIGNALS {
            // SAFETY: the handler calls only functions that may be called from one.
            unsafe { libc::signal(signal, handler as libc::sighandler_t) };
        }
    }

    extern "C" fn on_signal(_: libc::c_int) {
        REQUESTED.store(true, Ordering::Relaxed);
        // SAFETY: write and signal may be called from a signal handler, and TEXT outlives the call.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, TEXT.as_ptr().cast(), TEXT.len()) };
        for signal in SIGNALS {
            // SAFETY: as above.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

#[cfg(not(unix))]
mod signals {
    /// There are no signals to handle here.
    pub fn handle() {}
}
