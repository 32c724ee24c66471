//! The author's side of the boundary in Rust: write a type with [`AdapterPlugin`] or [`ControlNetPlugin`], and one line of
//! [`export_adapter!`](crate::export_adapter) or [`export_controlnet!`](crate::export_controlnet).
//!
//! What the tables ask for is done here once: null and size checks, errors as texts, panics as errors.

mod adapter;
mod controlnet;
mod file;
mod instance;

pub use crate::tensor::give;
pub use adapter::{AdapterPlugin, EditOperation, GivenTensors, ParameterEdit};
pub use controlnet::{BlockResidual, ControlNetPlugin, ControlSpec, StepInput, TargetModel};
pub use file::{AdapterFile, FileTensor};

/// Result of an author's function; the error is told to the person.
pub type Result<T> = std::result::Result<T, String>;

/// The bytes of a description, as the static that a plugin exports.
#[doc(hidden)]
pub const fn description<const N: usize>(text: &str) -> [u8; N] {
    let (bytes, mut copied, mut at) = (text.as_bytes(), [0; N], 0);
    while at < N {
        copied[at] = bytes[at];
        at += 1;
    }
    copied
}

/// Exports the [`AdapterPlugin`](crate::sdk::Adapter) `$type`, described by the TOML file `$path` beside the source file.
#[macro_export]
macro_rules! export_adapter {
    ($type:ty, $path:literal) => {
        $crate::export_plugin!($crate::ADAPTER_INTERFACE, $crate::ClearformAdapterTable, $type, $path);
    };
}

/// Exports the [`ControlNetPlugin`](crate::sdk::Branch) `$type`, described by the TOML file `$path` beside the source file.
#[macro_export]
macro_rules! export_controlnet {
    ($type:ty, $path:literal) => {
        $crate::export_plugin!($crate::CONTROLNET_INTERFACE, $crate::ClearformBranchTable, $type, $path);
    };
}

/// What both exports have in common.
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

            // An exported symbol, so that the linker keeps it.
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

    #[test]
    fn the_macro_writes_the_marks_that_hosts_look_for() {
        let source = include_str!("mod.rs");
        assert!(source.contains(&format!("                {DESCRIPTION_BEGIN:?},\n")));
        assert!(source.contains(&format!("                {DESCRIPTION_END:?}\n")));
    }
}
