//! [`check_plugin`]: loads a plugin and opens the examples of its description, as the host would open an adapter.

use crate::adapter::Adapter;
use crate::controlnet::{BaseModel, ControlNet, Controls, Residual};
use crate::edit::Edit;
use crate::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE, Example, ExampleBase, ExampleStep, Plugin, PluginError, Result};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, DenoiserInput, StepIndex};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource};
use serde::Serialize;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Name of each example, with the reason if it failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ExampleResults(Vec<(String, Option<String>)>);

impl ExampleResults {
    /// The failed examples, with reasons.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().filter_map(|(name, failure)| Some((name.as_str(), failure.as_deref()?)))
    }
}

impl std::fmt::Display for ExampleResults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, failure) in &self.0 {
            match failure {
                None => writeln!(f, "  passed: {name}")?,
                Some(reason) => writeln!(f, "  FAILED: {name}: {reason}")?,
            }
        }
        write!(f, "{} of {} examples passed", self.0.len() - self.failures().count(), self.0.len())
    }
}

/// Loads `plugin` and runs its examples.
///
/// # Errors
/// The plugin cannot be loaded, has no examples, or has an unknown interface.
pub fn check_plugin(plugin: &Plugin) -> Result<ExampleResults> {
    let run: fn(&Plugin, &Example) -> Result<()> = match plugin.description.interface.as_str() {
        ADAPTER_INTERFACE => run_adapter,
        CONTROLNET_INTERFACE => run_controlnet,
        other => return Err(plugin.error(format!("unknown interface {other:?}"))),
    };
    if plugin.description.examples.is_empty() {
        return Err(plugin.error("there is nothing to check: add an [[example]] to its description".to_owned()));
    }
    let results = plugin.description.examples.iter().map(|example| {
        let outcome = check_claims(plugin, example).and_then(|()| run(plugin, example));
        (example.name.clone(), outcome.err().map(|error| error.to_string()))
    });
    Ok(ExampleResults(results.collect()))
}

fn check_claims(plugin: &Plugin, example: &Example) -> Result<()> {
    let names: BTreeSet<&str> = example.tensors.keys().map(String::as_str).collect();
    match plugin.description.claims(&names, &example.metadata) {
        true => Ok(()),
        false => Err(failed("none of the plugin's claims matches it")),
    }
}

/// Opens the example, compares the edits with those that it declares, and reads their tensors. Every tensor of the file
/// must be in an edit or be skipped for a reason.
fn run_adapter(plugin: &Plugin, example: &Example) -> Result<()> {
    let folder = ScratchDir::new()?;
    let adapter = Adapter::open(plugin, Arc::new(folder.file(example)?))?;
    let edits: Vec<String> = adapter.edits().iter().map(Edit::qualified_name).collect();
    if edits != example.edits {
        return Err(failed(&format!("expected the edits {:?}, found {edits:?}", example.edits)));
    }
    if let Some(name) = unused_tensor(&adapter) {
        return Err(failed(&format!("tensor {name:?} is neither in an edit nor skipped for a reason")));
    }
    (0..edits.len()).try_for_each(|index| adapter.values(index).map(drop))
}

fn unused_tensor(adapter: &Adapter) -> Option<&str> {
    let edited = adapter.edits().iter().flat_map(|edit| edit.sources.iter().copied());
    let skipped = adapter.skipped().iter().map(|(index, _)| *index);
    let used: BTreeSet<usize> = edited.chain(skipped).collect();
    let unused = adapter.tensor_names().iter().enumerate().find(|(index, _)| !used.contains(index))?;
    Some(unused.1)
}

/// Opens the example, and compares the residuals of one evaluation with those that it declares.
fn run_controlnet(plugin: &Plugin, example: &Example) -> Result<()> {
    let base = example.base.as_ref().ok_or_else(|| failed("the example has no base"))?;
    let ExampleBase { family, config } = base;
    let folder = ScratchDir::new()?;
    let config = serde_json::to_value(config).map_err(|error| failed(&error.to_string()))?;
    let base = BaseModel { family, config: &config, attention: "full" };
    let controlnet = ControlNet::open(plugin, Arc::new(folder.file(example)?), base)?;
    let step = example.step.as_ref().ok_or_else(|| failed("the example has no step"))?;
    let embedded = step.embedded.as_deref().map(ones).transpose()?;
    let controls = Controls { control: &ones(&step.control)?, mode: None, guidance: None, embedded: embedded.as_ref() };
    let residuals = controlnet.residuals(&input(step)?, controls)?;
    let blocks: Vec<_> = residuals.iter().map(|residual| residual.blocks.clone()).collect();
    match blocks == step.residuals {
        true => residuals.iter().try_for_each(|residual| check_residual(residual, step)),
        false => Err(failed(&format!("expected residuals for the blocks {:?}, found {blocks:?}", step.residuals))),
    }
}

fn check_residual(residual: &Residual, step: &ExampleStep) -> Result<()> {
    let tensor = &residual.tensor;
    let tokens = step.grid[0] * step.grid[1];
    // Zero times a finite value is zero; times NaN or infinity it is NaN.
    let finite = (tensor.to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0;
    match tensor.dims() {
        [1, found, _] if *found == tokens && finite => Ok(()),
        [1, found, _] if *found == tokens => Err(failed("a residual has values that are not finite")),
        shape => Err(failed(&format!("expected residuals of the shape [1, {tokens}, width], found {shape:?}"))),
    }
}

/// The input of one evaluation, in the sizes of the step.
fn input(step: &ExampleStep) -> Result<DenoiserInput> {
    let [rows, columns] = step.grid;
    let [tokens, channels] = step.text;
    let position = |token: usize| [0, token / columns.max(1), token % columns.max(1)].map(|id| id as f32);
    let ids: Vec<f32> = (0..rows * columns).flat_map(position).collect();
    let conditions = Conditions {
        text: Some(ones(&[1, tokens, channels])?),
        pooled: Some(ones(&[1, step.pooled])?),
        image_ids: Some(Tensor::from_vec(ids, (rows * columns, 3), &Device::Cpu)?),
        text_ids: Some(Tensor::zeros((tokens, 3), DType::F32, &Device::Cpu)?),
        ..Conditions::default()
    };
    let latents = ones(step.latents.as_deref().unwrap_or(&[1, rows * columns, step.channels]))?;
    let timestep = (ones(&[1])? * 0.5)?;
    Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
}

fn ones(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?)
}

fn failed(reason: &str) -> PluginError {
    PluginError::Tensor(candle_core::Error::Msg(reason.to_owned()))
}

/// A temporary folder.
struct ScratchDir(tempfile::TempDir);

impl ScratchDir {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir();
        Ok(Self(folder.map_err(|source| PluginError::Io { path: std::env::temp_dir(), source })?))
    }

    /// Writes the example as a file. Its values are small, and repeat only after 11 elements so that rows differ.
    fn file(&self, example: &Example) -> Result<Checkpoint> {
        let value = |index: usize| ((index * 7 + 3) % 11) as f32 / 64.0 + 0.01;
        let tensor = |(name, shape): (&String, &Vec<usize>)| -> Result<(String, Tensor)> {
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
            Ok((name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?))
        };
        let source: InMemoryTensors = example.tensors.iter().map(tensor).collect::<Result<_>>()?;
        let path = self.0.path().join("example.safetensors");
        clearform_weights::save(&path, &source as &dyn TensorSource, &example.metadata)?;
        Ok(Checkpoint::open(&path)?)
    }
}
