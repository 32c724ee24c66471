//! The plugin `controlnet`: ControlNets for FLUX.1 in the format of diffusers' `FluxControlNetModel` (InstantX, Shakker)
//! and in that of XLabs, and for Stable Diffusion 3 in the format of diffusers' `SD3ControlNetModel` (InstantX,
//! Stability) and in Stability's own.
//!
//! The networks themselves are in `clearform_models`. This crate reads their files (`identified_file.rs`, `flux.toml`,
//! `sd3.toml`), and decides which blocks of the model each residual is added to (`injection.rs`). A family is a file
//! that implements `ControlNetwork` and a line in `FAMILIES`.
//!
//! This crate is linked into programs; `library/` exports it as a shared library.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod flux;
mod identified_file;
mod injection;
mod network;
mod sd3;
mod source;

use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_models::{Conditions, DenoiserInput, StepIndex};
use clearform_plugin_abi::sdk::{
    AdapterFile, BlockResidual, ControlNetPlugin, ControlSpec, Result, StepInput, TargetModel,
};
use clearform_plugin_abi::tensor::{BorrowedTensor, OwnedTensor};
use clearform_plugin_abi::{PluginEntry, controlnet_entry};
use identified_file::IdentifiedFile;
use network::{ControlNetwork, NetworkInput};
use serde_json::{Map, Value};

/// A family of models that there are ControlNets for.
struct ControlledFamily {
    /// Name of the family.
    name: &'static str,
    /// What its models are called.
    title: &'static str,
    /// Name of its ControlNets' family in their manifest.
    manifest: &'static str,
    /// Keys whose values no tensor of a ControlNet shows. They are the model's where there is no config.json.
    shared_keys: &'static [&'static str],
    /// Builds a ControlNet for a model with the given config.json.
    open: fn(&IdentifiedFile, &Value, &AttentionPlan) -> Result<Box<dyn ControlNetwork>>,
}

/// Every family of models that there are ControlNets for.
const FAMILIES: [ControlledFamily; 2] = [
    ControlledFamily {
        name: "flux",
        title: "FLUX.1",
        manifest: "flux-controlnet",
        shared_keys: &["axes_dims_rope"],
        open: flux::open,
    },
    ControlledFamily {
        name: "sd3",
        title: "Stable Diffusion 3",
        manifest: "sd3-controlnet",
        shared_keys: &["attention_head_dim"],
        open: sd3::open,
    },
];

/// An open ControlNet.
pub struct ControlNetFile {
    network: Box<dyn ControlNetwork>,
}

/// The plugin.
pub const PLUGIN: PluginEntry = controlnet_entry!(ControlNetFile, "../plugin.toml");

impl ControlNetPlugin for ControlNetFile {
    fn open(file: AdapterFile, model: TargetModel) -> Result<Self> {
        let family = family_of(&model)?;
        let config: Value =
            serde_json::from_str(&model.config).map_err(|error| format!("the model's config: {error}"))?;
        // A shared library has a copy of rayon of its own. The pool is global, so building it fails for every file but
        // the first, and in a program that the plugin is linked into: both are fine, as the pool exists then.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(file.threads()).build_global();
        let plan: AttentionPlan =
            model.attention.parse().map_err(|error| format!("attention {:?}: {error}", model.attention))?;
        let file = IdentifiedFile::new(file, &family.shared(&config))?;
        if file.family() != family.manifest {
            let found = FAMILIES.iter().find(|known| known.manifest == file.family());
            let found = found.map_or(file.family(), |found| found.title);
            return Err(format!("the ControlNet is for {found}, but the model's family is {:?}", model.family));
        }
        Ok(Self { network: (family.open)(&file, &config, &plan)? })
    }

    fn control_spec(&self) -> ControlSpec {
        self.network.control_spec()
    }

    fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>> {
        let residuals = self.network.residuals(&network_input(step)?)?;
        residuals.into_iter().map(block_residual).collect()
    }
}

impl ControlledFamily {
    /// The settings that a ControlNet shares with a model of the config `config`.
    fn shared(&self, config: &Value) -> Value {
        let shared = self.shared_keys.iter().filter_map(|key| Some(((*key).to_owned(), config.get(key)?.clone())));
        Value::Object(shared.collect::<Map<_, _>>())
    }
}

fn family_of(model: &TargetModel) -> Result<&'static ControlledFamily> {
    FAMILIES.iter().find(|family| family.name == model.family).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.title).collect();
        format!("there are ControlNets for {}, but the model's family is {:?}", known.join(" and "), model.family)
    })
}

fn network_input(step: &StepInput) -> Result<NetworkInput> {
    let optional = |tensor: Option<BorrowedTensor>| tensor.map(to_candle).transpose();
    let conditions = Conditions {
        text: optional(step.text)?,
        pooled: optional(step.pooled)?,
        guidance: optional(step.guidance)?,
        image_ids: optional(step.image_ids)?,
        text_ids: optional(step.text_ids)?,
        ..Conditions::default()
    };
    let latents = to_candle(step.latents)?;
    let timestep = to_candle(step.timestep)?;
    Ok(NetworkInput {
        model: DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions },
        control: to_candle(step.control)?,
        mode: optional(step.mode)?,
        embedded: optional(step.embedded)?,
    })
}

fn to_candle(tensor: BorrowedTensor) -> Result<Tensor> {
    tensor.to_candle().map_err(|error| error.to_string())
}

fn block_residual((tensor, blocks): (Tensor, Vec<u32>)) -> Result<BlockResidual> {
    let tensor = OwnedTensor::from_candle(&tensor).map_err(|error| error.to_string())?;
    Ok(BlockResidual { tensor, blocks })
}
