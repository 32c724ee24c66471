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
use clearform_plugin_abi::sdk::{AdapterFile, AdapterPlugin, GivenTensors, ParameterEdit, Result};
use modules::{EditRecipe, LoraModules};
use std::collections::BTreeMap;

/// An open LoRA file.
pub struct LoraFile {
    file: AdapterFile,
    edits: Vec<ParameterEdit>,
    /// How to make the tensors of each edit.
    recipes: Vec<EditRecipe>,
    skipped: BTreeMap<usize, &'static str>,
}

export_adapter!(LoraFile, "../plugin.toml");

impl AdapterPlugin for LoraFile {
    fn open(file: AdapterFile) -> Result<Self> {
        let LoraModules { edits, recipes, skipped } = LoraModules::read(&file)?;
        Ok(Self { file, edits, recipes, skipped })
    }

    fn edits(&self) -> &[ParameterEdit] {
        &self.edits
    }

    fn tensors(&self, index: usize) -> Result<GivenTensors> {
        self.recipes[index].tensors(&self.file)
    }

    fn skipped(&self, index: usize) -> &str {
        self.skipped.get(&index).copied().unwrap_or_default()
    }
}
