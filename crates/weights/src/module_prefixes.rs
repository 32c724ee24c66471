//! [`unwrapped`]: tensor names without what PyTorch's module wrappers add to them (torch.compile, FSDP, activation
//! checkpointing, DataParallel).

use std::borrow::Cow;

/// Added by `torch.compile`, FSDP and activation checkpointing, which may wrap any module: anywhere in a name.
const ANYWHERE: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
/// Added by `DataParallel` and `DistributedDataParallel`, which wrap the whole model: only at the beginning, as
/// "module" further inside may be the model's own.
const AT_THE_BEGINNING: &str = "module.";

/// `name` as the unwrapped model has it.
pub(crate) fn unwrapped(name: &str) -> Cow<'_, str> {
    let name = name.strip_prefix(AT_THE_BEGINNING).unwrap_or(name);
    if !ANYWHERE.iter().any(|wrapper| name.contains(wrapper)) {
        return Cow::Borrowed(name);
    }
    let bare = name.split('.').filter(|segment| !ANYWHERE.contains(segment)).collect::<Vec<_>>().join(".");
    Cow::Owned(bare.strip_prefix(AT_THE_BEGINNING).map(str::to_owned).unwrap_or(bare))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_removed() {
        for (name, bare) in [
            ("img_in.weight", "img_in.weight"),
            ("_orig_mod.img_in.weight", "img_in.weight"),
            ("module._orig_mod.img_in.weight", "img_in.weight"),
            ("_orig_mod.module.img_in.weight", "img_in.weight"),
            (
                "double_blocks.0._fsdp_wrapped_module.img_mod._checkpoint_wrapped_module.lin.bias",
                "double_blocks.0.img_mod.lin.bias",
            ),
            ("a.module.b", "a.module.b"),
            ("not_orig_mod.weight", "not_orig_mod.weight"),
        ] {
            assert_eq!(unwrapped(name), bare);
        }
    }
}
