//! [`ForwardArguments`]: the arguments of a forward by name, and checks of their shapes.

use crate::{Conditions, DenoiserInput, ModelError, Result, StepIndex};
use candle_core::{DType, Tensor};
use clearform_attention::{Geometries, Geometry, TokenGrid};
use std::collections::BTreeMap;

/// The arguments of a class's `forward`, by name. Each is taken once.
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

    /// Fails if an argument is left over. `known` are the inputs of `family`.
    pub(crate) fn finish(self, family: &str, known: &[&str]) -> Result<()> {
        match self.0.into_keys().next() {
            Some(name) => {
                let reason = format!("is not an input of {family}; expected {}", known.join(", "));
                Err(ModelError::bad_input(&name, reason))
            }
            None => Ok(()),
        }
    }
}

/// The input of a class-conditional family: latents, timestep and class labels.
pub(crate) fn class_input(family: &str, tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
    let mut arguments = ForwardArguments::new(tensors);
    let latents = arguments.required("hidden_states")?;
    let timestep = arguments.required("timestep")?;
    let conditions = Conditions { classes: Some(arguments.required("class_labels")?), ..Conditions::default() };
    arguments.finish(family, &["hidden_states", "timestep", "class_labels"])?;
    Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
}

/// Fails unless `tensor` has the shape `shape`, where `None` matches any size.
pub(crate) fn expect(name: &str, tensor: &Tensor, shape: &[Option<usize>]) -> Result<()> {
    let fits = |(found, wanted): (&usize, &Option<usize>)| wanted.is_none_or(|wanted| wanted == *found);
    if tensor.rank() == shape.len() && tensor.dims().iter().zip(shape).all(fits) {
        return Ok(());
    }
    let wanted: Vec<String> = shape.iter().map(|size| size.map_or("any".to_owned(), |size| size.to_string())).collect();
    let reason = format!("expected shape ({}), found {:?}", wanted.join(", "), tensor.dims());
    Err(ModelError::bad_input(name, reason))
}

/// Checks latents (batch, `channels`, height, width) and timesteps (batch), and returns the batch size.
pub(crate) fn checked_batch(latents: &Tensor, timestep: &Tensor, channels: usize) -> Result<usize> {
    expect("hidden_states", latents, &[None, Some(channels), None, None])?;
    let batch = latents.dim(0)?;
    expect("timestep", timestep, &[Some(batch)])?;
    Ok(batch)
}

/// The token grid of latents (batch, channels, height, width) as (rows, columns), and its geometry from the cache.
pub(crate) fn grid(latents: &Tensor, patch_size: usize, geometries: &Geometries) -> Result<((usize, usize), Geometry)> {
    let (_, _, height, width) = latents.dims4()?;
    let rows = height / patch_size.max(1);
    let columns = width / patch_size.max(1);
    let grid = TokenGrid::new(rows, columns);
    let grid = grid.map_err(|error| ModelError::bad_input("hidden_states", error.to_string()))?;
    Ok(((rows, columns), geometries.get(vec![grid])))
}

/// Class labels, one per sample. Label `classes` means no class (unconditional).
///
/// # Shapes
/// The result is (batch) in u32.
pub(crate) fn labels(input: &DenoiserInput, batch: usize, classes: usize) -> Result<Tensor> {
    let labels = input.conditions.classes.as_ref().ok_or_else(|| ModelError::missing_input("class_labels"))?;
    expect("class_labels", labels, &[Some(batch)])?;
    let labels: Vec<f64> = labels.to_dtype(DType::F64)?.to_vec1()?;
    let is_label = |label: &f64| label.fract() == 0.0 && (0.0..=classes as f64).contains(label);
    if let Some(wrong) = labels.iter().find(|label| !is_label(label)) {
        let reason = format!("expected whole numbers from 0 to {classes} ({classes} means no class), found {wrong}");
        return Err(ModelError::bad_input("class_labels", reason));
    }
    Ok(Tensor::from_iter(labels.into_iter().map(|label| label as u32), input.latents.device())?)
}
