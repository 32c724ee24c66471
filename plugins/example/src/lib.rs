//! The plugin `example`: the smallest useful adapter. A tensor `PARAMETER.channel_scale` contains one factor for each
//! row of the transformer's PARAMETER, and so for each output channel of its layer ((IA)³, arXiv 2205.05638).
//!
//! To write a plugin of your own, copy this folder and change its three files: see `plugins/README.md`.

use clearform_plugin_abi::export_adapter;
use clearform_plugin_abi::sdk::{AdapterFile, AdapterPlugin, EditOperation, EditTensors, ParameterEdit, Result};

/// An open file: everything the plugin needs as long as the host uses the file.
pub struct ChannelScale {
    /// The file stays open as long as this value lives, so tensors can be read on request.
    file: AdapterFile,
    edits: Vec<ParameterEdit>,
}

// Exports the type with its description. The SDK passes errors and panics to the host.
export_adapter!(ChannelScale, "../plugin.toml");

impl AdapterPlugin for ChannelScale {
    /// Lists the edits from names and shapes alone. The host shows an error to the user.
    fn open(file: AdapterFile) -> Result<Self> {
        let mut edits = Vec::new();
        for (index, tensor) in file.tensors().into_iter().enumerate() {
            // Other tensors are in no edit, and the host reports them as not understood.
            let Some(parameter) = tensor.name.strip_suffix(".channel_scale") else { continue };
            let [rows] = tensor.shape[..] else {
                return Err(format!(
                    "{:?}: expected one factor per channel, found the shape {:?}",
                    tensor.name, tensor.shape
                ));
            };
            edits.push(ParameterEdit {
                operation: EditOperation::Scale,
                decomposed: false,
                component: "transformer".to_owned(),
                // The name may be in any layout that the host knows: that of diffusers or BFL, with dots or
                // underscores.
                parameter: parameter.to_owned(),
                first_row: None,
                // A factor applies to its whole row, so the number of columns does not matter.
                shape: [rows, 1],
                // The tensor that this edit is made from, for the host's report.
                sources: vec![index],
            });
        }
        Ok(Self { file, edits })
    }

    fn edits(&self) -> &[ParameterEdit] {
        &self.edits
    }

    /// The tensors of one edit. Here it is the file's own tensor, which is read only now.
    fn tensors(&self, index: usize) -> Result<EditTensors> {
        let factors = self.file.read(self.edits[index].sources[0])?;
        Ok(EditTensors { value: Some(factors), ..EditTensors::default() })
    }

    /// Why a tensor is deliberately left out. This plugin leaves out none.
    fn skipped(&self, _index: usize) -> &str {
        ""
    }
}
