//! What was done and what went wrong, for whoever sets `SIMULATOR_REPORT` to a file; problems are printed too.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::{Mutex, Once};

/// How often, and how much in all.
static COUNTS: Mutex<BTreeMap<String, (u64, u64)>> = Mutex::new(BTreeMap::new());
static AT_EXIT: Once = Once::new();

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> c_int;
}

/// Counts one of `what`.
pub fn count(what: &str, amount: usize) {
    AT_EXIT.call_once(|| {
        // SAFETY: `write` is there until the process ends.
        unsafe { atexit(write) };
    });
    if let Ok(mut counts) = COUNTS.lock() {
        let (times, sum) = counts.entry(what.to_owned()).or_default();
        *times += 1;
        *sum += amount as u64;
    }
}

/// Says what a GPU would do wrong.
#[allow(clippy::print_stderr)]
pub fn problem(text: &str) {
    eprintln!("simulated device: {text}");
    LAST.replace(text.to_owned());
}

/// What this thread was told last.
pub fn last_problem() -> String {
    LAST.take()
}

extern "C" fn write() {
    let (Ok(counts), Some(file)) = (COUNTS.lock(), std::env::var_os("SIMULATOR_REPORT")) else { return };
    let lines = counts.iter().map(|(what, (times, sum))| format!("{what}\t{times}\t{sum}\n"));
    if let Err(error) = std::fs::write(&file, lines.collect::<String>()) {
        problem(&format!("{}: {error}", file.display()));
    }
}
