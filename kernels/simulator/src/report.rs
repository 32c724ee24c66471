//! Counts of launches and copied bytes, written to the file `SIMULATOR_REPORT` at exit; and error messages.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::{Mutex, Once};

/// Number of events and total amount, by name.
static COUNTS: Mutex<BTreeMap<String, (u64, u64)>> = Mutex::new(BTreeMap::new());
static AT_EXIT: Once = Once::new();

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> c_int;
}

/// Counts an event.
pub fn count(event: &str, amount: usize) {
    AT_EXIT.call_once(|| {
        // SAFETY: `write` may be called until the process ends.
        unsafe { atexit(write) };
    });
    if let Ok(mut counts) = COUNTS.lock() {
        let (times, sum) = counts.entry(event.to_owned()).or_default();
        *times += 1;
        *sum += amount as u64;
    }
}

/// Prints a problem and remembers it for [`last_problem`].
#[allow(clippy::print_stderr)]
pub fn problem(text: &str) {
    eprintln!("simulated device: {text}");
    LAST.replace(text.to_owned());
}

/// The last problem of this thread, which is then forgotten.
pub fn last_problem() -> String {
    LAST.take()
}

extern "C" fn write() {
    let (Ok(counts), Some(file)) = (COUNTS.lock(), std::env::var_os("SIMULATOR_REPORT")) else { return };
    let lines = counts.iter().map(|(event, (times, sum))| format!("{event}\t{times}\t{sum}\n"));
    if let Err(error) = std::fs::write(&file, lines.collect::<String>()) {
        problem(&format!("{}: {error}", file.display()));
    }
}
