//! The plugin `panicking`, for tests/abi.rs: it panics in `open`, `tensors` or `skipped` if a tensor of the file is
//! called `*.panic_open`, `*.panic_tensors` or `*.panic_skipped`.

use clearform_plugin_abi::export_adapter;
use clearform_plugin_abi::sdk::{AdapterFile, AdapterPlugin, EditOperation, GivenTensors, ParameterEdit, Result};

/// Panics where the names of a file's tensors say so.
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
        let edit = |(index, name): (usize, &String)| Some(scale(name.strip_suffix(".panic_tensors")?, index));
        let edits = names.iter().enumerate().filter_map(edit).collect();
        Ok(Self { names, edits })
    }

    fn edits(&self) -> &[ParameterEdit] {
        &self.edits
    }

    fn tensors(&self, _index: usize) -> Result<GivenTensors> {
        panic!("in tensors")
    }

    fn skipped(&self, index: usize) -> &str {
        if self.names[index].ends_with(".panic_skipped") {
            panic!("in skipped");
        }
        ""
    }
}

fn scale(parameter: &str, source: usize) -> ParameterEdit {
    ParameterEdit {
        kind: EditOperation::Scale,
        decomposed: false,
        component: "transformer".to_owned(),
        parameter: parameter.to_owned(),
        first_row: None,
        extents: [1, 1],
        sources: vec![source],
    }
}
