//! [`check`]: loads a plugin and lets it open the examples that it declares, as a host would.

use crate::adapter::Adapter;
use crate::controlnet::{BaseModel, ControlNet, Controls, Residual};
use crate::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE, Example, ExampleBase, ExampleStep, Plugin, PluginError, Result};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, DenoiserInput, StepIndex};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource};
use serde::Serialize;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Each example's name, with why it failed if it did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ExampleResult(Vec<(String, Option<String>)>);

impl ExampleResult {
    /// The examples that failed, with reasons.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().filter_map(|(name, failure)| Some((name.as_str(), failure.as_deref()?)))
    }
}

impl std::fmt::Display for ExampleResult {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, failure) in &self.0 {
            writeln!(
                f,
                "  {}: {name}",
                failure.as_ref().map_or("holds".to_owned(), |reason| format!("FAILS, {reason}"))
            )?;
        }
        write!(f, "{} of {} examples hold", self.0.len() - self.failures().count(), self.0.len())
    }
}

/// Loads `plugin` and runs its examples.
///
/// # Errors
/// It cannot be loaded, declares no examples, or is of an interface that is not known.
pub fn check(plugin: &Plugin) -> Result<ExampleResult> {
    let bad = |reason: String| PluginError::BadPlugin { path: plugin.path.clone(), reason };
    let run: fn(&Plugin, &Example) -> Result<()> = match plugin.description.interface.as_str() {
        ADAPTER_INTERFACE => run_adapter,
        CONTROLNET_INTERFACE => run_branch,
        other => return Err(bad(format!("the interface {other:?} is not known"))),
    };
    if plugin.description.examples.is_empty() {
        return Err(bad("its description has no [[example]], so nothing can be checked".to_owned()));
    }
    let checked = plugin.description.examples.iter().map(|example| {
        let outcome = claimed(plugin, example).and_then(|()| run(plugin, example));
        (example.name.clone(), outcome.err().map(|error| error.to_string()))
    });
    Ok(ExampleResult(checked.collect()))
}

fn claimed(plugin: &Plugin, example: &Example) -> Result<()> {
    let names: BTreeSet<&str> = example.tensors.keys().map(String::as_str).collect();
    match plugin.description.claims(&names, &example.metadata) {
        true => Ok(()),
        false => Err(failed("none of the plugin's claims fits it")),
    }
}

/// Every tensor is in an edit or left out with a reason, the edits are those that are declared, and give their tensors.
fn run_adapter(plugin: &Plugin, example: &Example) -> Result<()> {
    let folder = ScratchDir::new()?;
    let adapter = Adapter::open(plugin, Arc::new(folder.file(example)?))?;
    let edits: Vec<String> =
        adapter.edits().iter().map(|edit| format!("{}.{}", edit.component, edit.parameter)).collect();
    if edits != example.edits {
        return Err(failed(&format!("expected the edits {:?}, found {edits:?}", example.edits)));
    }
    let known = adapter.edits().iter().flat_map(|edit| &edit.sources).chain(adapter.skipped().iter().map(|(at, _)| at));
    let known: BTreeSet<usize> = known.copied().collect();
    if let Some(name) = (0..adapter.tensor_names().len()).find(|index| !known.contains(index)) {
        return Err(failed(&format!("tensor {:?} is in no edit", adapter.tensor_names()[name])));
    }
    (0..edits.len()).try_for_each(|index| adapter.values(index).map(drop))
}

/// It opens, says what it takes, and gives the residuals that are declared.
fn run_branch(plugin: &Plugin, example: &Example) -> Result<()> {
    let ExampleBase { family, config } = example.base.as_ref().ok_or_else(|| failed("it has no base"))?;
    let folder = ScratchDir::new()?;
    let config = serde_json::to_value(config).map_err(|error| failed(&error.to_string()))?;
    let base = BaseModel { family, config: &config, attention: "full" };
    let controlnet = ControlNet::open(plugin, Arc::new(folder.file(example)?), base)?;
    let step = example.step.as_ref().ok_or_else(|| failed("it has no step"))?;
    let controls = Controls { control: &ones(&step.control)?, mode: None, guidance: None };
    let residuals = controlnet.residuals(&input(step)?, controls)?;
    let blocks: Vec<_> = residuals.iter().map(|residual| residual.blocks.clone()).collect();
    match blocks == step.residuals {
        true => residuals.iter().try_for_each(|residual| check_residual(residual, step)),
        false => Err(failed(&format!("expected residuals for the blocks {:?}, found {blocks:?}", step.residuals))),
    }
}

fn check_residual(residual: &Residual, step: &ExampleStep) -> Result<()> {
    let (tensor, tokens) = (&residual.tensor, step.grid[0] * step.grid[1]);
    let finite = (tensor.to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0;
    match tensor.dims() {
        [1, found, _] if *found == tokens && finite => Ok(()),
        shape => Err(failed(&format!("a residual {shape:?} of {tokens} tokens is misshapen or not finite"))),
    }
}

/// One evaluation with inputs of the step's extents.
fn input(step: &ExampleStep) -> Result<DenoiserInput> {
    let ([rows, columns], [tokens, channels]) = (step.grid, step.text);
    let place = |token: usize| [0, token / columns.max(1), token % columns.max(1)].map(|id| id as f32);
    let ids: Vec<f32> = (0..rows * columns).flat_map(place).collect();
    let conditions = Conditions {
        text: Some(ones(&[1, tokens, channels])?),
        pooled: Some(ones(&[1, step.pooled])?),
        image_ids: Some(Tensor::from_vec(ids, (rows * columns, 3), &Device::Cpu)?),
        text_ids: Some(Tensor::zeros((tokens, 3), DType::F32, &Device::Cpu)?),
        ..Conditions::default()
    };
    let (latents, timestep) = (ones(&[1, rows * columns, step.channels])?, (ones(&[1])? * 0.5)?);
    Ok(DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions })
}

fn ones(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?)
}

fn failed(reason: &str) -> PluginError {
    PluginError::Tensor(candle_core::Error::Msg(reason.to_owned()))
}

/// A folder that is gone when it is no longer needed.
struct ScratchDir(tempfile::TempDir);

impl ScratchDir {
    fn new() -> Result<Self> {
        let made = tempfile::tempdir();
        Ok(Self(made.map_err(|source| PluginError::Io { path: std::env::temp_dir(), source })?))
    }

    /// The example as a file, its values small numbers that repeat at no extent.
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
