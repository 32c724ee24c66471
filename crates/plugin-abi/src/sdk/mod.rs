//! The SDK for plugin authors: implement [`AdapterPlugin`] or [`ControlNetPlugin`] for a type, and export it with
//! [`export_adapter!`](crate::export_adapter) or [`export_controlnet!`](crate::export_controlnet).
//!
//! The SDK does what the function tables require: it checks pointers and sizes, passes errors to the host as texts, and
//! turns panics into errors. `plugins/README.md` is the guide, and `plugins/example` a plugin to copy.

mod adapter;
mod controlnet;
mod file;
mod instance;

pub use adapter::{AdapterPlugin, EditOperation, EditTensors, ParameterEdit};
pub use controlnet::{BlockResidual, ControlNetPlugin, ControlSpec, StepInput, TargetModel};
pub use file::{AdapterFile, FileTensor};

/// Result of a plugin's function. The host shows the error to the user.
pub type Result<T> = std::result::Result<T, String>;

/// The bytes of a description, for the static that a plugin exports.
#[doc(hidden)]
pub const fn description<const N: usize>(text: &str) -> [u8; N] {
    let bytes = text.as_bytes();
    let mut copied = [0; N];
    let mut index = 0;
    while index < N {
        copied[index] = bytes[index];
        index += 1;
    }
    copied
}

/// Exports the type `$type`, an [`AdapterPlugin`]. `$path` is the TOML file of its
/// description, relative to the source file.
#[macro_export]
macro_rules! export_adapter {
    ($type:ty, $path:literal) => {
        $crate::export_plugin!($crate::ADAPTER_INTERFACE, $crate::ClearformAdapterTable, $type, $path);
    };
}

/// Exports the type `$type`, a [`ControlNetPlugin`]. `$path` is the TOML file of its
/// description, relative to the source file.
#[macro_export]
macro_rules! export_controlnet {
    ($type:ty, $path:literal) => {
        $crate::export_plugin!($crate::CONTROLNET_INTERFACE, $crate::ClearformBranchTable, $type, $path);
    };
}

/// The common part of both exports.
#[doc(hidden)]
#[macro_export]
macro_rules! export_plugin {
    ($interface:expr, $table:ty, $type:ty, $path:literal) => {
        const _: () = {
            const DESCRIPTION: &str = concat!(
                "<<clearform-plugin-description/1>>",
                include_str!($path),
                "<<end-of-clearform-plugin-description>>"
            );
            static TABLE: $table = <$table>::of::<$type>();
            static PLUGIN: $crate::ClearformPlugin = $crate::ClearformPlugin {
                abi_major: $crate::ABI_MAJOR,
                struct_size: ::std::mem::size_of::<$crate::ClearformPlugin>() as u32,
                interface: $crate::ClearformText::new($interface),
                table: (&raw const TABLE).cast(),
            };

            // Exported, so that the linker keeps it.
            #[unsafe(no_mangle)]
            static clearform_plugin_description: [u8; DESCRIPTION.len()] = $crate::sdk::description(DESCRIPTION);

            #[unsafe(no_mangle)]
            extern "C" fn clearform_plugin_v1(_: *const $crate::ClearformHost) -> *const $crate::ClearformPlugin {
                &raw const PLUGIN
            }
        };
    };
}

#[cfg(test)]
mod tests {
    use crate::{DESCRIPTION_BEGIN, DESCRIPTION_END};

    /// `concat!` takes literals only, so the macro repeats the two constants.
    #[test]
    fn the_macro_repeats_the_description_markers() {
        let source = include_str!("mod.rs");
        assert!(source.contains(&format!("                {DESCRIPTION_BEGIN:?},\n")));
        assert!(source.contains(&format!("                {DESCRIPTION_END:?}\n")));
    }
}
