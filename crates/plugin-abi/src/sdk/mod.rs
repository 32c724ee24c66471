//! The SDK for plugin authors: implement [`AdapterPlugin`] or [`ControlNetPlugin`] for a type, and export it with
//! [`export_adapter!`](crate::export_adapter) or [`export_controlnet!`](crate::export_controlnet).
//!
//! The SDK does what the function tables require: it checks pointers and sizes, passes errors to the host as texts, and
//! turns panics into errors. `plugins/README.md` is the guide, and `plugins/example` a plugin to copy.
//!
//! The exports define C symbols, of which a program can contain only one set. A plugin that is also linked into a
//! program therefore consists of two crates: a library crate, which has a constant made by
//! [`adapter_entry!`](crate::adapter_entry) or [`controlnet_entry!`](crate::controlnet_entry), and a `cdylib`, which
//! exports that constant with [`export_entry!`](crate::export_entry).

mod adapter;
mod controlnet;
mod file;
mod instance;

pub use adapter::{AdapterPlugin, EditOperation, EditTensors, ParameterEdit};
pub use controlnet::{BlockResidual, ControlNetPlugin, ControlSpec, StepInput, TargetModel};
pub use file::{AdapterFile, FileTensor};

use crate::{DESCRIPTION_BEGIN, DESCRIPTION_END};

/// Result of a plugin's function. The host shows the error to the user.
pub type Result<T> = std::result::Result<T, String>;

/// Length of a description with its markers.
#[doc(hidden)]
pub const fn marked_length(description: &str) -> usize {
    DESCRIPTION_BEGIN.len() + description.len() + DESCRIPTION_END.len()
}

/// The bytes of a description between its markers, for the static that a library exports. `LENGTH` is its
/// [`marked_length`].
#[doc(hidden)]
pub const fn marked<const LENGTH: usize>(description: &str) -> [u8; LENGTH] {
    let mut marked = [0; LENGTH];
    let (begin, rest) = marked.split_at_mut(DESCRIPTION_BEGIN.len());
    begin.copy_from_slice(DESCRIPTION_BEGIN.as_bytes());
    let (text, end) = rest.split_at_mut(description.len());
    text.copy_from_slice(description.as_bytes());
    end.copy_from_slice(DESCRIPTION_END.as_bytes());
    marked
}

/// Exports the type `$type`, an [`AdapterPlugin`], from a `cdylib`. `$path` is the TOML file of its description,
/// relative to the source file.
#[macro_export]
macro_rules! export_adapter {
    ($type:ty, $path:literal) => {
        $crate::export_entry!($crate::adapter_entry!($type, $path));
    };
}

/// Exports the type `$type`, a [`ControlNetPlugin`], from a `cdylib`. `$path` is the TOML file of its description,
/// relative to the source file.
#[macro_export]
macro_rules! export_controlnet {
    ($type:ty, $path:literal) => {
        $crate::export_entry!($crate::controlnet_entry!($type, $path));
    };
}

/// The [`PluginEntry`](crate::PluginEntry) of the type `$type`, an [`AdapterPlugin`]. `$path` is the TOML file of its
/// description, relative to the source file.
#[macro_export]
macro_rules! adapter_entry {
    ($type:ty, $path:literal) => {
        $crate::plugin_entry!($crate::ADAPTER_INTERFACE, $crate::ClearformAdapterTable, $type, $path)
    };
}

/// The [`PluginEntry`](crate::PluginEntry) of the type `$type`, a [`ControlNetPlugin`]. `$path` is the TOML file of its
/// description, relative to the source file.
#[macro_export]
macro_rules! controlnet_entry {
    ($type:ty, $path:literal) => {
        $crate::plugin_entry!($crate::CONTROLNET_INTERFACE, $crate::ClearformBranchTable, $type, $path)
    };
}

/// The common part of both entries.
#[doc(hidden)]
#[macro_export]
macro_rules! plugin_entry {
    ($interface:expr, $table:ty, $type:ty, $path:literal) => {{
        static TABLE: $table = <$table>::of::<$type>();
        static PLUGIN: $crate::ClearformPlugin = $crate::ClearformPlugin {
            abi_major: $crate::ABI_MAJOR,
            struct_size: ::std::mem::size_of::<$crate::ClearformPlugin>() as u32,
            interface: $crate::ClearformText::new($interface),
            table: (&raw const TABLE).cast(),
        };

        extern "C" fn entry(_: *const $crate::ClearformHost) -> *const $crate::ClearformPlugin {
            &raw const PLUGIN
        }

        $crate::PluginEntry {
            package: ::std::env!("CARGO_PKG_NAME"),
            description: ::std::include_str!($path),
            function: entry,
        }
    }};
}

/// Exports a [`PluginEntry`](crate::PluginEntry), a constant, as the C symbols of a plugin. Only a `cdylib` can do so,
/// and only once.
#[macro_export]
macro_rules! export_entry {
    ($entry:expr) => {
        const _: () = {
            const ENTRY: $crate::PluginEntry = $entry;

            // Exported, so that the linker keeps it.
            #[unsafe(no_mangle)]
            static clearform_plugin_description: [u8; $crate::sdk::marked_length(ENTRY.description)] =
                $crate::sdk::marked(ENTRY.description);

            #[unsafe(no_mangle)]
            unsafe extern "C" fn clearform_plugin_v1(
                host: *const $crate::ClearformHost,
            ) -> *const $crate::ClearformPlugin {
                // SAFETY: the caller follows the comment of the entry function.
                unsafe { (ENTRY.function)(host) }
            }
        };
    };
}

#[cfg(test)]
mod tests {
    use super::{marked, marked_length};
    use crate::{DESCRIPTION_BEGIN, DESCRIPTION_END};

    #[test]
    fn a_description_stands_between_its_markers() {
        const TEXT: &str = "id = \"é\"";
        const MARKED: [u8; marked_length(TEXT)] = marked(TEXT);
        assert_eq!(MARKED.as_slice(), format!("{DESCRIPTION_BEGIN}{TEXT}{DESCRIPTION_END}").as_bytes());
    }
}
