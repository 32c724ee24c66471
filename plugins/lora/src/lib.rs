//! The plugin `lora`: weight edits of low rank and their kin, in the formats that trainers write.
//!
//! Read in order: `names`, what each tensor's name says; `modules`, the tensors of one module together, and the edits
//! that they are; `settings`, what peft writes beside the tensors; `products`, the two forms that must be multiplied
//! out. Which parameters a model has it does not know: the host finds them.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod modules;
mod names;
mod products;
mod settings;

use clearform_plugin_abi::export_adapter;
use clearform_plugin_abi::sdk::{Adapter, EditOf, File, Result, Tensors};
use modules::{Modules, Recipe};
use std::collections::BTreeMap;

/// An open LoRA file.
pub struct Lora {
    file: File,
    edits: Vec<EditOf>,
    /// How to make the tensors of each edit.
    recipes: Vec<Recipe>,
    skipped: BTreeMap<usize, &'static str>,
}

export_adapter!(Lora, "../plugin.toml");

impl Adapter for Lora {
    fn open(file: File) -> Result<Self> {
        let Modules { edits, recipes, skipped } = Modules::read(&file)?;
        Ok(Self { file, edits, recipes, skipped })
    }

    fn edits(&self) -> &[EditOf] {
        &self.edits
    }

    fn tensors(&self, index: usize) -> Result<Tensors> {
        self.recipes[index].tensors(&self.file)
    }

    fn skipped(&self, index: usize) -> &str {
        self.skipped.get(&index).copied().unwrap_or_default()
    }
}
