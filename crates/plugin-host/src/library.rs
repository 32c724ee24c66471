//! [`entry_function`]: loads a plugin's shared library.

use crate::{PluginError, PluginOrigin, Result};
use clearform_plugin_abi::{ENTRY_SYMBOL, EntryFunction};
use std::mem::ManuallyDrop;
use std::path::Path;

/// Loads the library at `path`, which is never unloaded, and returns the function that it exports.
///
/// # Errors
/// The library cannot be loaded, or exports no entry function.
pub(crate) fn entry_function(path: &Path) -> Result<EntryFunction> {
    let bad_plugin = |reason| PluginError::BadPlugin { plugin: PluginOrigin::Library(path.to_owned()), reason };
    // The system would search its own folders for a path without a folder.
    let real_path = path.canonicalize().map_err(|source| PluginError::Io { path: path.to_owned(), source })?;
    // SAFETY: loading runs the library's constructors. The user put the library where plugins are found, and passed an
    // adapter that it opens.
    let loaded = unsafe { load(&real_path) }.map_err(|error| bad_plugin(error.to_string()))?;
    let loaded = ManuallyDrop::new(loaded);
    // SAFETY: the symbol is a function of this type in every plugin of this major version.
    let entry = unsafe { loaded.get::<EntryFunction>(ENTRY_SYMBOL) }.map(|symbol| *symbol);
    entry.map_err(|_| bad_plugin(format!("it is not a plugin: it does not export {ENTRY_SYMBOL}")))
}

/// Loads a library and resolves all its symbols at once: a missing one is an error now, and not a crash later.
///
/// # Safety
/// The library's constructors run.
#[cfg(unix)]
unsafe fn load(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    // SAFETY: guaranteed by the caller.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map(Into::into)
}

/// # Safety
/// The library's constructors run.
#[cfg(not(unix))]
unsafe fn load(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    // SAFETY: guaranteed by the caller.
    unsafe { libloading::Library::new(path) }
}
