//! [`Pipeline::damage`]: which weights contain NaN, once a result does. Weights are not searched before.

use crate::{Components, Pipeline, Result, RuntimeError, TransformerCheckpoint};
use clearform_models::text::EncodedText;
use clearform_plugin_host::ControlNet;
use clearform_weights::{TensorSource, is_finite};
use std::path::Path;
use std::sync::Arc;

impl Pipeline {
    /// The first tensor of the transformer, of another component or of a ControlNet that contains NaN or infinity, if there is
    /// one. All weights are read.
    pub fn damage(&self) -> Option<RuntimeError> {
        let mut names = self.transformer().identified().all_components();
        let of_component = |name: &String| damage_of(self.components(), name);
        let mut controlnets = self.controlnets().iter().map(|active| &active.controlnet);
        let of_controlnet = |net: &Arc<ControlNet>| damaged(net.path(), net.tensors());
        let damage = self.transformer().damage().or_else(|| names.find_map(of_component));
        damage.or_else(|| controlnets.find_map(of_controlnet))
    }
}

impl TransformerCheckpoint {
    /// The first tensor of its files that contains NaN or infinity, if there is one. All weights are read.
    pub fn damage(&self) -> Option<RuntimeError> {
        damaged(self.checkpoint().path(), self.checkpoint().as_ref())
    }
}

/// Refuses prompts that the text encoder `component` encoded to NaN or infinity.
///
/// # Errors
/// [`RuntimeError::BadComponent`] names the tensor of the encoder that contains them, if one does.
pub(crate) fn check_encoding(encoded: &EncodedText, components: &Components, component: &str) -> Result<()> {
    let outputs = [Some(&encoded.hidden), encoded.pooled.as_ref(), encoded.projected.as_ref()];
    for output in outputs.into_iter().flatten() {
        if !is_finite(output)? {
            return Err(damage_of(components, component).unwrap_or_else(|| RuntimeError::BadComponent {
                path: components.place(component).unwrap_or_else(|| component.into()),
                reason: "the encoded prompt contains NaN or infinity; an adapter may be too strong".to_owned(),
            }));
        }
    }
    Ok(())
}

fn damage_of(components: &Components, name: &str) -> Option<RuntimeError> {
    damaged(&components.place(name)?, components.weights(name).ok()?.as_ref())
}

fn damaged(path: &Path, source: &dyn TensorSource) -> Option<RuntimeError> {
    let is_finite = |name: &str| source.read(name).map_or(true, |values| values.is_finite());
    let name = source.tensors().into_iter().map(|info| info.name).find(|name| !is_finite(name))?;
    Some(RuntimeError::BadComponent {
        path: path.to_owned(),
        reason: format!(
            "tensor {name:?} contains NaN or infinity, so nothing can be computed with it; copy the file again from where \
             the model came from"
        ),
    })
}
