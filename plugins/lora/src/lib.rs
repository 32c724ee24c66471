//! The plugin `lora`: LoRA and related weight edits, in the file formats of all common trainers.
//!
//! Reading order: `names` splits a tensor's name into component, module and role; `modules` groups the tensors of each
//! module and turns them into edits; `recipes` computes the tensors of an edit; `products` multiplies out LoHa and
//! LoKr; `settings` finds peft's configurations, `peft_config` is one of them, and `patterns` the names in it. The
//! plugin does not know which parameters a model has: the host maps the names.
//!
//! This crate is linked into programs; `library/` exports it as a shared library.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod modules;
mod names;
mod patterns;
mod peft_config;
mod products;
mod recipes;
mod settings;

use clearform_plugin_abi::sdk::{AdapterFile, AdapterPlugin, EditTensors, ParameterEdit, Result};
use clearform_plugin_abi::{LOG_WARNING, PluginEntry, adapter_entry};
use modules::FileEdits;
use recipes::EditRecipe;
use std::collections::BTreeMap;

/// An open LoRA file.
pub struct LoraFile {
    file: AdapterFile,
    edits: Vec<ParameterEdit>,
    /// How to compute the tensors of each edit.
    recipes: Vec<EditRecipe>,
    skipped: BTreeMap<usize, &'static str>,
}

/// The plugin.
pub const PLUGIN: PluginEntry = adapter_entry!(LoraFile, "../plugin.toml");

impl AdapterPlugin for LoraFile {
    fn open(file: AdapterFile) -> Result<Self> {
        let FileEdits { edits, recipes, skipped, notes } = FileEdits::read(&file)?;
        notes.iter().for_each(|note| file.log(LOG_WARNING, note));
        Ok(Self { file, edits, recipes, skipped })
    }

    fn edits(&self) -> &[ParameterEdit] {
        &self.edits
    }

    fn tensors(&self, index: usize) -> Result<EditTensors> {
        self.recipes[index].tensors(&self.file)
    }

    fn skipped(&self, index: usize) -> &str {
        self.skipped.get(&index).copied().unwrap_or_default()
    }
}
