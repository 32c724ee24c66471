//! [`ForwardArguments`] of a forward by name, and checks of their shapes.

use crate::{Conditions, DenoiserInput, ModelError, Result, StepIndex};
use candle_core::{DType, Tensor};
use clearform_attention::{Geometries, Geometry, TokenGrid};
use std::collections::BTreeMap;

/// Named tensors that are the arguments of a class's `forward`; each is taken once.
pub(crate) struct ForwardArguments(BTreeMap<String, Tensor>);

impl ForwardArguments {
    pub(crate) fn new(tensors: BTreeMap<String, Tensor>) -> Self {
        Self(tensors)
    }

    pub(crate) fn required(&mut self, name: &str) -> Result<Tensor> {
        self.0.remove(name).ok_or_else(|| ModelError::missing_input(name))
    }

    pub(crate) fn optional(&mut self, name: &str) -> Option<Tensor> {
        self.0.remove(name)
    }

    /// Nothing may be left over; `known` are the inputs of `family`.
    pub(crate) fn finish(self, family: &str, known: &[&str]) -> Result<()> {
        match self.0.into_keys().next() {
            Some(name) => {
                let reason = format!("is none of {family}'s inputs: {}", known.join(", "));
                Err(ModelError::bad_input(&name, reason))
            }
            None => Ok(()),
        }
    }
}

/// The input of a family that draws classes: latents, times and labels.
pub(crate) fn class_input(family: &str, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
    let mut arguments = ForwardArguments::new(tensors);
    let (latents, timestep) = (arguments.required("hidden_states")?, arguments.required("timestep")?);
    let conditions = Conditions { classes: Some(arguments.required("class_labels")?), ..Conditions::default() };
    arguments.finish(family, &["hidden_states", "timestep", "class_labels"])?;
    Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
}

/// Fails unless `tensor` has the extents `shape`, of which none stands for any.
pub(crate) fn expect(name: &str, tensor: &Tensor, shape: &[Option<usize>]) -> Result<()> {
    let fits = |(found, wanted): (&usize, &Option<usize>)| wanted.is_none_or(|wanted| wanted == *found);
    if tensor.rank() == shape.len() && tensor.dims().iter().zip(shape).all(fits) {
        return Ok(());
    }
    let wanted: Vec<String> = shape.iter().map(|size| size.map_or("any".to_owned(), |size| size.to_string())).collect();
    let reason = format!("expected shape ({}), found {:?}", wanted.join(", "), tensor.dims());
    Err(ModelError::bad_input(name, reason))
}

/// Checks latents of `channels` channels and times, one a sample, and gives the batch.
pub(crate) fn checked_batch(latents: &Tensor, timestep: &Tensor, channels: usize) -> Result<usize> {
    expect("hidden_states", latents, &[None, Some(channels), None, None])?;
    let batch = latents.dim(0)?;
    expect("timestep", timestep, &[Some(batch)])?;
    Ok(batch)
}

/// The one grid of latents (batch, channels, height, width) whose tokens are `patch` places high and wide, as rows and
/// columns, and the geometry of it out of those that are known.
pub(crate) fn grid(latents: &Tensor, patch: usize, known: &Geometries) -> Result<((usize, usize), Geometry)> {
    let (_, _, height, width) = latents.dims4()?;
    let (rows, columns) = (height / patch.max(1), width / patch.max(1));
    let grid = TokenGrid::new(rows, columns);
    let grid = grid.map_err(|error| ModelError::bad_input("hidden_states", error.to_string()))?;
    Ok(((rows, columns), known.of(vec![grid])))
}

/// Class labels, one a sample; `classes` itself stands for none of them.
///
/// # Shapes
/// The result is (batch) in u32.
pub(crate) fn labels(input: &DenoiserInput, batch: usize, classes: usize) -> Result<Tensor> {
    let labels = input.conditions.classes.as_ref().ok_or_else(|| ModelError::missing_input("class_labels"))?;
    expect("class_labels", labels, &[Some(batch)])?;
    let labels: Vec<f64> = labels.to_dtype(DType::F64)?.to_vec1()?;
    let is_label = |label: &f64| label.fract() == 0.0 && (0.0..=classes as f64).contains(label);
    if let Some(wrong) = labels.iter().find(|label| !is_label(label)) {
        let reason = format!("expected whole numbers from 0 to {classes} (which is no class), found {wrong}");
        return Err(ModelError::bad_input("class_labels", reason));
    }
    Ok(Tensor::from_iter(labels.into_iter().map(|label| label as u32), input.latents.device())?)
}
