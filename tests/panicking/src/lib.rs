//! The plugin `panicking`, for tests/abi.rs: it panics in `open`, `tensors` or `skipped` if a tensor of the file is
//! called `*.panic_open`, `*.panic_tensors` or `*.panic_skipped`.

use clearform_plugin_abi::export_adapter;
use clearform_plugin_abi::sdk::{AdapterFile, AdapterPlugin, EditOperation, EditTensors, ParameterEdit, Result};

/// Panics in the functions that the names of the file's tensors select.
pub struct Panicking {
    names: Vec<String>,
    edits: Vec<ParameterEdit>,
}

export_adapter!(Panicking, "../plugin.toml");

impl AdapterPlugin for Panicking {
    fn open(file: AdapterFile) -> Result<Self> {
        let names: Vec<String> = file.tensors().into_iter().map(|tensor| tensor.name).collect();
        if names.iter().any(|name| name.ends_with(".panic_open")) {
            panic!("in open");
        }
        let mut edits = Vec::new();
        for (index, name) in names.iter().enumerate() {
            edits.extend(name.strip_suffix(".panic_tensors").map(|parameter| scaling_edit(parameter, index)));
        }
        Ok(Self { names, edits })
    }

    fn edits(&self) -> &[ParameterEdit] {
        &self.edits
    }

    fn tensors(&self, _index: usize) -> Result<EditTensors> {
        panic!("in tensors")
    }

    fn skipped(&self, index: usize) -> &str {
        if self.names[index].ends_with(".panic_skipped") {
            panic!("in skipped");
        }
        ""
    }
}

fn scaling_edit(parameter: &str, source: usize) -> ParameterEdit {
    ParameterEdit {
        operation: EditOperation::Scale,
        decomposed: false,
        component: "transformer".to_owned(),
        parameter: parameter.to_owned(),
        first_row: None,
        shape: [1, 1],
        sources: vec![source],
    }
}
