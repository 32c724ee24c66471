//! [`Library`]: a plugin that is loaded, and the functions that the host lends it. It knows no interface's content.

use crate::{Plugin, PluginError, Result};
use clearform_plugin_abi::{ABI_MAJOR, ClearformHost, ClearformText, ENTRY_SYMBOL, LOG_ERROR, LOG_WARNING, OK};
use std::alloc::Layout;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

type EntryPoint = unsafe extern "C" fn(*const ClearformHost) -> *const clearform_plugin_abi::ClearformPlugin;

/// A loaded plugin. It is never unloaded: threads of its own, or tensors that it gave, may outlive every user.
#[derive(Debug)]
pub(crate) struct Library {
    path: PathBuf,
    exported: &'static clearform_plugin_abi::ClearformPlugin,
    host: Box<LentHost>,
}

/// The host as a plugin sees it, with what the plugin says to it.
struct LentHost {
    table: ClearformHost,
    said: Mutex<PluginMessages>,
}

#[derive(Debug, Default)]
struct PluginMessages {
    notes: Vec<String>,
    failure: Option<String>,
}

impl Library {
    /// Loads `plugin`, and holds what it exports against its description and this version of the boundary.
    ///
    /// # Errors
    /// It cannot be loaded, was built for another version, is of another interface, or is not what it says.
    pub fn load(plugin: &Plugin, interface: &str) -> Result<Self> {
        let bad = |reason: String| PluginError::BadPlugin { path: plugin.path.clone(), reason };
        check_major(plugin.description.abi).map_err(bad)?;
        if plugin.description.interface != interface {
            let found = &plugin.description.interface;
            return Err(bad(format!("it offers the interface {found:?}, expected {interface:?}")));
        }
        // A path without a folder would be looked for where the system keeps its libraries.
        let path =
            plugin.path.canonicalize().map_err(|source| PluginError::Io { path: plugin.path.clone(), source })?;
        // SAFETY: the person asked for an adapter that this plugin opens, and put it where plugins are looked for. Its
        // constructors run now.
        let loaded = unsafe { load(&path) }.map_err(|error| bad(error.to_string()))?;
        let loaded = std::mem::ManuallyDrop::new(loaded);
        // SAFETY: the symbol is a function of this type in every plugin of this major version.
        let entry = unsafe { loaded.get::<EntryPoint>(ENTRY_SYMBOL) }.map(|symbol| *symbol);
        let entry = entry.map_err(|_| bad(format!("it exports no {ENTRY_SYMBOL}, so it is no plugin")))?;
        let host = lend();
        // SAFETY: the host stands until this is dropped; what the entry returns is null, or stands as long as the process.
        let exported = unsafe { check(entry(&raw const host.table), interface) }.map_err(bad)?;
        Ok(Self { path: plugin.path.clone(), exported, host })
    }

    /// The table of its interface, as far as `T` goes.
    ///
    /// # Safety
    /// `T` is the `repr(C)` table of the plugin's interface, which begins with its size.
    ///
    /// # Errors
    /// There is none, or it is shorter.
    pub unsafe fn table<T>(&self) -> Result<T> {
        let table = self.exported.table;
        if table.is_null() {
            return Err(self.bad("its table is null"));
        }
        // SAFETY: every table begins with its size.
        let size = unsafe { *table.cast::<u32>() } as usize;
        if size < size_of::<T>() {
            return Err(self.bad(format!("its table has {size} bytes, expected at least {}", size_of::<T>())));
        }
        // SAFETY: the caller says that it is a T, and it is long enough.
        Ok(unsafe { table.cast::<T>().read() })
    }

    /// A function of its table, which must be there.
    ///
    /// # Errors
    /// It is null.
    pub fn function<F>(&self, name: &str, function: Option<F>) -> Result<F> {
        function.ok_or_else(|| self.bad(format!("its function {name:?} is null")))
    }

    /// The host, as the plugin sees it.
    pub fn host(&self) -> *const ClearformHost {
        &raw const self.host.table
    }

    /// An error about the library itself.
    pub fn bad(&self, reason: impl Into<String>) -> PluginError {
        PluginError::BadPlugin { path: self.path.clone(), reason: reason.into() }
    }

    /// What the plugin said of the call that returned `status`, if that is no success. A call without a status may have
    /// said something too.
    pub fn outcome(&self, status: i32) -> std::result::Result<(), String> {
        let said = self.host.said().failure.take();
        match (status, said) {
            (OK, None) => Ok(()),
            (_, said) => {
                Err(said.unwrap_or_else(|| format!("the plugin failed with status {status} and did not say why")))
            }
        }
    }

    /// Messages for the person since the last time.
    pub fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.host.said().notes)
    }
}

impl std::fmt::Debug for LentHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lent").field("said", &self.said).finish_non_exhaustive()
    }
}

// SAFETY: the table is written once, before a plugin sees it; its context leads to this struct, whose mutable part is
// behind a lock.
unsafe impl Sync for LentHost {}
// SAFETY: as above.
unsafe impl Send for LentHost {}

impl LentHost {
    fn said(&self) -> MutexGuard<'_, PluginMessages> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loads a library with every symbol that it needs, so that one which is missing is an error now and no crash later.
///
/// # Safety
/// The library's constructors may run.
#[cfg(unix)]
unsafe fn load(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    // SAFETY: the caller says so.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map(Into::into)
}

/// # Safety
/// The library's constructors may run.
#[cfg(not(unix))]
unsafe fn load(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    // SAFETY: the caller says so.
    unsafe { libloading::Library::new(path) }
}

fn check_major(found: u32) -> std::result::Result<(), String> {
    match found {
        ABI_MAJOR => Ok(()),
        _ => Err(format!(
            "it was built for version {found} of the boundary, expected {ABI_MAJOR}: get the plugin's release \
                          for this version of clearform, or build it again"
        )),
    }
}

/// # Safety
/// `exported` is null, or begins with two u32 and is as long as the second says, for as long as the process lives.
unsafe fn check(
    exported: *const clearform_plugin_abi::ClearformPlugin,
    interface: &str,
) -> std::result::Result<&'static clearform_plugin_abi::ClearformPlugin, String> {
    if exported.is_null() {
        return Err(format!("{ENTRY_SYMBOL} returned null: it does not run with this version of clearform"));
    }
    // SAFETY: the caller says so.
    let (major, size) = unsafe { ((*exported).abi_major, (*exported).struct_size as usize) };
    check_major(major)?;
    if size < size_of::<clearform_plugin_abi::ClearformPlugin>() {
        return Err(format!(
            "its struct has {size} bytes, expected at least {}",
            size_of::<clearform_plugin_abi::ClearformPlugin>()
        ));
    }
    // SAFETY: it is long enough.
    let exported = unsafe { &*exported };
    // SAFETY: the text is the plugin's, and stands.
    match unsafe { exported.interface.as_str() } {
        Some(found) if found == interface => Ok(exported),
        found => Err(format!("it offers the interface {found:?}, but its description says {interface:?}")),
    }
}

/// A host to lend, with a context that leads back to it.
fn lend() -> Box<LentHost> {
    let table = ClearformHost {
        abi_major: ABI_MAJOR,
        struct_size: size_of::<ClearformHost>() as u32,
        context: std::ptr::null_mut(),
        threads: rayon::current_num_threads() as u32,
        reserved: 0,
        allocate: Some(allocate),
        release: Some(release),
        log: Some(log),
        progress: Some(progress),
        fail: Some(fail),
    };
    let lent = Box::into_raw(Box::new(LentHost { table, said: Mutex::default() }));
    // SAFETY: it was made just now, and its address stays when the box is moved.
    unsafe {
        (*lent).table.context = lent.cast();
        Box::from_raw(lent)
    }
}

/// # Safety
/// `context` is that of a lent host, for as long as the guard is held.
unsafe fn said<'a>(context: *mut c_void) -> MutexGuard<'a, PluginMessages> {
    // SAFETY: the caller says so.
    unsafe { &*context.cast::<LentHost>() }.said()
}

// What follows is called by plugins, which keep to the comments of the table. Nothing in it can panic.

unsafe extern "C" fn allocate(_: *mut c_void, size: usize, alignment: usize) -> *mut c_void {
    match Layout::from_size_align(size, alignment) {
        // SAFETY: the size is not zero.
        Ok(layout) if size > 0 => unsafe { std::alloc::alloc(layout) }.cast(),
        _ => std::ptr::null_mut(),
    }
}

unsafe extern "C" fn release(_: *mut c_void, memory: *mut c_void, size: usize, alignment: usize) {
    if let (false, Ok(layout)) = (memory.is_null(), Layout::from_size_align(size, alignment)) {
        // SAFETY: the plugin says that it came from `allocate` with this size and alignment.
        unsafe { std::alloc::dealloc(memory.cast(), layout) }
    }
}

unsafe extern "C" fn log(context: *mut c_void, level: u32, message: ClearformText) {
    // SAFETY: the context is ours, and the text is lent for the call.
    unsafe {
        let kind = match level {
            LOG_ERROR => "error: ",
            LOG_WARNING => "warning: ",
            _ => "",
        };
        said(context).notes.push(format!("{kind}{}", printable(message)));
    }
}

unsafe extern "C" fn progress(_: *mut c_void, _done: f64) {}

unsafe extern "C" fn fail(context: *mut c_void, message: ClearformText) {
    // SAFETY: as in `log`.
    unsafe { said(context).failure = Some(printable(message)) }
}

/// A plugin's text, with control characters escaped.
///
/// # Safety
/// The text is valid.
unsafe fn printable(text: ClearformText) -> String {
    // SAFETY: the caller says so.
    let text = unsafe { text.as_str() }.unwrap_or("(a text that is no UTF-8)");
    text.chars().flat_map(|one| if one.is_control() { one.escape_default().collect() } else { vec![one] }).collect()
}
