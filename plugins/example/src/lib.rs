//! The plugin `example`: the smallest useful adapter. A tensor `PARAMETER.channel_scale` holds one factor for each row of
//! the transformer's PARAMETER, which is one for each output channel of its layer ((IA)³, arXiv 2205.05638).
//!
//! Copy this folder, change its three files, and you have a plugin of your own: `plugins/README.md` tells how.

use clearform_plugin_abi::export_adapter;
use clearform_plugin_abi::sdk::{AdapterFile, AdapterPlugin, EditOperation, GivenTensors, ParameterEdit, Result};

/// What the host holds while it uses a file: whatever the plugin needs for it.
pub struct ChannelScale {
    /// The file stays open as long as this lives, so tensors are read when they are asked for.
    file: AdapterFile,
    edits: Vec<ParameterEdit>,
}

// Exports the type with its description, and turns errors and panics into messages for the person.
export_adapter!(ChannelScale, "../plugin.toml");

impl AdapterPlugin for ChannelScale {
    /// Finds the edits by names and shapes alone. Whatever is returned as an error is told to the person.
    fn open(file: AdapterFile) -> Result<Self> {
        let mut edits = Vec::new();
        for (index, tensor) in file.tensors().into_iter().enumerate() {
            // Tensors of other names are in no edit, and the host will say that nobody understands them.
            let Some(parameter) = tensor.name.strip_suffix(".channel_scale") else { continue };
            let [rows] = tensor.shape[..] else {
                return Err(format!("{:?}: expected one factor a channel, found {:?}", tensor.name, tensor.shape));
            };
            edits.push(ParameterEdit {
                kind: EditOperation::Scale,
                decomposed: false,
                component: "transformer".to_owned(),
                // The name may be of any layout that the host knows: diffusers', BFL's, with dots or underscores.
                parameter: parameter.to_owned(),
                first_row: None,
                // A factor goes over its whole row, however long: the columns do not count.
                extents: [rows, 1],
                // What the file's tensor became, so that the host can account for it.
                sources: vec![index],
            });
        }
        Ok(Self { file, edits })
    }

    fn edits(&self) -> &[ParameterEdit] {
        &self.edits
    }

    /// The tensors of one edit; here the file's own, unread until now.
    fn tensors(&self, index: usize) -> Result<GivenTensors> {
        let factors = self.file.read(self.edits[index].sources[0])?;
        Ok(GivenTensors { value: Some(factors), ..GivenTensors::default() })
    }

    /// A reason for each tensor that is left out on purpose. There are none here.
    fn skipped(&self, _index: usize) -> &str {
        ""
    }
}
