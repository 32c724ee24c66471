//! [`unwrapped`]: names without what PyTorch's wrappers of modules put into them, which say how a model was run and not
//! what it is.

use std::borrow::Cow;

/// Of `torch.compile`, of fully sharded training, of activation checkpointing; they stand anywhere in a name.
const ANYWHERE: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
/// Of `DataParallel` and its kin, which wrap a model as a whole.
const AHEAD: &str = "module.";

/// `name` as the model itself has it.
pub(crate) fn unwrapped(name: &str) -> Cow<'_, str> {
    let name = name.strip_prefix(AHEAD).unwrap_or(name);
    if !ANYWHERE.iter().any(|wrapper| name.contains(wrapper)) {
        return Cow::Borrowed(name);
    }
    let bare = name.split('.').filter(|part| !ANYWHERE.contains(part)).collect::<Vec<_>>().join(".");
    Cow::Owned(bare.strip_prefix(AHEAD).map(str::to_owned).unwrap_or(bare))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_taken_off() {
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
