//! [`LoadedPlugin`]: a plugin that is ready to be called, with the functions that the host provides to it. Independent
//! of the interfaces.

use crate::library::entry_function;
use crate::{Plugin, PluginError, PluginOrigin, Result};
use clearform_plugin_abi::{
    ABI_MAJOR, ClearformHost, ClearformPlugin, ClearformText, ENTRY_SYMBOL, LOG_ERROR, LOG_WARNING, OK,
};
use std::alloc::Layout;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A plugin that was loaded from its library or is linked into the program. It is never unloaded, because its threads
/// and the tensors that it returned may outlive every instance.
#[derive(Debug)]
pub(crate) struct LoadedPlugin {
    origin: PluginOrigin,
    exported: &'static ClearformPlugin,
    host: Box<HostContext>,
}

/// The C struct of the host's functions, with the messages that the plugin sends through them.
struct HostContext {
    table: ClearformHost,
    messages: Mutex<PluginMessages>,
}

#[derive(Debug, Default)]
struct PluginMessages {
    notes: Vec<String>,
    failure: Option<String>,
}

impl LoadedPlugin {
    /// Loads `plugin`, and checks what it exports against its description and this version of the interface.
    ///
    /// # Errors
    /// Its library cannot be loaded, or it was built for another version, has another interface, or contradicts its
    /// description.
    pub fn load(plugin: &Plugin, interface: &str) -> Result<Self> {
        let bad_plugin = |reason: String| plugin.error(reason);
        check_major(plugin.description.abi).map_err(bad_plugin)?;
        if plugin.description.interface != interface {
            let found = &plugin.description.interface;
            return Err(bad_plugin(format!("expected the interface {interface:?}, found {found:?}")));
        }
        let entry = match &plugin.origin {
            PluginOrigin::Library(path) => entry_function(path)?,
            PluginOrigin::Linked(entry) => entry.function,
        };
        let host = HostContext::new();
        // SAFETY: the host lives as long as `Self`; the entry function returns null, or a struct that is never freed.
        let exported = unsafe { check(entry(&raw const host.table), interface) }.map_err(bad_plugin)?;
        Ok(Self { origin: plugin.origin.clone(), exported, host })
    }

    /// The function table of its interface, as far as `T` extends.
    ///
    /// # Safety
    /// `T` is the `repr(C)` table of the plugin's interface, which begins with its size.
    ///
    /// # Errors
    /// The table is null or too short.
    pub unsafe fn table<T>(&self) -> Result<T> {
        let table = self.exported.table;
        if table.is_null() {
            return Err(self.error("its table is null"));
        }
        // SAFETY: every table begins with its size.
        let size = unsafe { *table.cast::<u32>() } as usize;
        if size < size_of::<T>() {
            return Err(self.error(format!("its table has {size} bytes, expected at least {}", size_of::<T>())));
        }
        // SAFETY: the caller guarantees the type, and the table is long enough.
        Ok(unsafe { table.cast::<T>().read() })
    }

    /// A function of its table.
    ///
    /// # Errors
    /// The function is null.
    pub fn function<F>(&self, name: &str, function: Option<F>) -> Result<F> {
        function.ok_or_else(|| self.error(format!("its function {name:?} is null")))
    }

    /// The host's functions, as the plugin receives them.
    pub fn host(&self) -> *const ClearformHost {
        &raw const self.host.table
    }

    /// An error about the plugin itself.
    pub fn error(&self, reason: impl Into<String>) -> PluginError {
        PluginError::BadPlugin { plugin: self.origin.clone(), reason: reason.into() }
    }

    /// Turns the status of a call into a result, with the message that the plugin passed to `fail`. After a call
    /// without a status, pass [`OK`]: a message alone also is an error.
    pub fn check_status(&self, status: i32) -> std::result::Result<(), String> {
        let failure = self.host.messages().failure.take();
        match (status, failure) {
            (OK, None) => Ok(()),
            (_, Some(reason)) => Err(reason),
            (_, None) => Err(format!("the plugin failed with status {status} and gave no reason")),
        }
    }

    /// The plugin's messages to the user since the last call.
    pub fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.host.messages().notes)
    }
}

impl std::fmt::Debug for HostContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostContext").field("messages", &self.messages).finish_non_exhaustive()
    }
}

// SAFETY: the table is written once, before a plugin receives it. Its context points to this struct, where only the
// mutex is ever written.
unsafe impl Sync for HostContext {}
// SAFETY: as above.
unsafe impl Send for HostContext {}

impl HostContext {
    /// A host whose context pointer points to itself.
    fn new() -> Box<Self> {
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
        let host = Box::into_raw(Box::new(Self { table, messages: Mutex::default() }));
        // SAFETY: it was just made, and moving the box does not move it.
        unsafe {
            (*host).table.context = host.cast();
            Box::from_raw(host)
        }
    }

    /// # Safety
    /// `context` is the context of a host that lives at least as long as the result.
    unsafe fn from_context<'a>(context: *mut c_void) -> &'a Self {
        // SAFETY: guaranteed by the caller.
        unsafe { &*context.cast::<Self>() }
    }

    fn messages(&self) -> MutexGuard<'_, PluginMessages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_major(found: u32) -> std::result::Result<(), String> {
    match found {
        ABI_MAJOR => Ok(()),
        _ => Err(format!(
            "it was built for version {found} of the plugin interface, expected {ABI_MAJOR}: get the plugin's release \
             for this version of clearform, or rebuild it"
        )),
    }
}

/// # Safety
/// `exported` is null, or begins with two u32 and is valid for as many bytes as the second states, as long as the
/// process lives.
unsafe fn check(
    exported: *const ClearformPlugin,
    interface: &str,
) -> std::result::Result<&'static ClearformPlugin, String> {
    const EXPECTED_SIZE: usize = size_of::<ClearformPlugin>();
    if exported.is_null() {
        return Err(format!("{ENTRY_SYMBOL} returned null: it does not support this version of clearform"));
    }
    // SAFETY: guaranteed by the caller.
    let (major, size) = unsafe { ((*exported).abi_major, (*exported).struct_size as usize) };
    check_major(major)?;
    if size < EXPECTED_SIZE {
        return Err(format!("its struct has {size} bytes, expected at least {EXPECTED_SIZE}"));
    }
    // SAFETY: it is long enough.
    let exported = unsafe { &*exported };
    // SAFETY: the text is valid as long as the plugin.
    match unsafe { exported.interface.as_str() } {
        Some(found) if found == interface => Ok(exported),
        found => Err(format!("it exports the interface {found:?}, but its description states {interface:?}")),
    }
}

// Plugins call the functions below, and follow the comments of `ClearformHost`. None of them can panic.

unsafe extern "C" fn allocate(_: *mut c_void, size: usize, alignment: usize) -> *mut c_void {
    match Layout::from_size_align(size, alignment) {
        // SAFETY: the size is not zero.
        Ok(layout) if size > 0 => unsafe { std::alloc::alloc(layout) }.cast(),
        _ => std::ptr::null_mut(),
    }
}

unsafe extern "C" fn release(_: *mut c_void, memory: *mut c_void, size: usize, alignment: usize) {
    if let (false, Ok(layout)) = (memory.is_null(), Layout::from_size_align(size, alignment)) {
        // SAFETY: the plugin guarantees that it came from `allocate` with this size and alignment.
        unsafe { std::alloc::dealloc(memory.cast(), layout) }
    }
}

unsafe extern "C" fn log(context: *mut c_void, level: u32, message: ClearformText) {
    let prefix = match level {
        LOG_ERROR => "error: ",
        LOG_WARNING => "warning: ",
        _ => "",
    };
    // SAFETY: the context is ours, and the text is valid during the call.
    let (host, message) = unsafe { (HostContext::from_context(context), escaped(message)) };
    host.messages().notes.push(format!("{prefix}{message}"));
}

unsafe extern "C" fn progress(_: *mut c_void, _done: f64) {}

unsafe extern "C" fn fail(context: *mut c_void, message: ClearformText) {
    // SAFETY: as in `log`.
    let (host, message) = unsafe { (HostContext::from_context(context), escaped(message)) };
    host.messages().failure = Some(message);
}

/// A plugin's text with its control characters escaped, so that it cannot steer the terminal.
///
/// # Safety
/// The text is valid.
unsafe fn escaped(text: ClearformText) -> String {
    // SAFETY: guaranteed by the caller.
    let text = unsafe { text.as_str() }.unwrap_or("(text that is not UTF-8)");
    let escape = |letter: char| match letter.is_control() {
        true => letter.escape_default().to_string(),
        false => letter.to_string(),
    };
    text.chars().map(escape).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Description;
    use clearform_plugin_abi::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE, EntryFunction, PluginEntry};

    static OTHER_MAJOR: ClearformPlugin = exported(99, ADAPTER_INTERFACE);
    static OTHER_INTERFACE: ClearformPlugin = exported(ABI_MAJOR, CONTROLNET_INTERFACE);
    static NO_TABLE: ClearformPlugin = exported(ABI_MAJOR, ADAPTER_INTERFACE);

    const fn exported(abi_major: u32, interface: &str) -> ClearformPlugin {
        let struct_size = size_of::<ClearformPlugin>() as u32;
        ClearformPlugin { abi_major, struct_size, interface: ClearformText::new(interface), table: std::ptr::null() }
    }

    extern "C" fn null(_: *const ClearformHost) -> *const ClearformPlugin {
        std::ptr::null()
    }

    extern "C" fn other_major(_: *const ClearformHost) -> *const ClearformPlugin {
        &raw const OTHER_MAJOR
    }

    extern "C" fn other_interface(_: *const ClearformHost) -> *const ClearformPlugin {
        &raw const OTHER_INTERFACE
    }

    extern "C" fn no_table(_: *const ClearformHost) -> *const ClearformPlugin {
        &raw const NO_TABLE
    }

    fn linked(function: EntryFunction) -> Plugin {
        let description = r#"
            id = "x"
            version = "1"
            interface = "clearform.adapter/1"
            abi = 1
            summary = ""
            claims = []
        "#;
        let entry = PluginEntry { package: "clearform-x", description, function };
        Plugin { description: Description::parse(description).unwrap(), origin: PluginOrigin::Linked(entry) }
    }

    /// The checks are those of libraries, which tests/abi.rs covers; the messages name the package.
    #[test]
    fn a_linked_plugin_that_violates_the_interface_is_an_error() {
        let error = |function| LoadedPlugin::load(&linked(function), ADAPTER_INTERFACE).unwrap_err().to_string();
        let name = "plugin clearform-x (linked into the program): ";
        assert_eq!(
            error(null),
            format!("{name}clearform_plugin_v1 returned null: it does not support this version of clearform")
        );
        let other = error(other_major);
        assert!(other.starts_with(&format!("{name}it was built for version 99")), "{other}");
        let other = error(other_interface);
        assert!(other.starts_with(&format!("{name}it exports the interface Some(\"clearform.branch/1\")")), "{other}");
        let loaded = LoadedPlugin::load(&linked(no_table), ADAPTER_INTERFACE).unwrap();
        // SAFETY: the table is null.
        let error = unsafe { loaded.table::<u32>() }.unwrap_err().to_string();
        assert_eq!(error, format!("{name}its table is null"));
    }
}
