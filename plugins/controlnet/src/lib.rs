//! The plugin `controlnet`: ControlNets for FLUX.1, in the format of diffusers' `FluxControlNetModel` (InstantX,
//! Shakker) and in that of XLabs.
//!
//! The network itself is [`FluxControlNet`] in `clearform_models`. This crate reads its files (`flux.toml`, `source`),
//! and decides which blocks of the model each residual is added to (`injection`).
//!
//! This crate is linked into programs; `library/` exports it as a shared library.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod injection;
mod source;

use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_layout::{Hints, Manifests, Sidecar, detect_source};
use clearform_models::families::flux::{FluxConfig, FluxControlNet};
use clearform_models::{Conditions, DenoiserInput, StepIndex};
use clearform_plugin_abi::sdk::{
    AdapterFile, BlockResidual, ControlNetPlugin, ControlSpec, Result, StepInput, TargetModel,
};
use clearform_plugin_abi::tensor::{BorrowedTensor, OwnedTensor};
use clearform_plugin_abi::{CONTROL_LATENTS, CONTROL_PIXELS, PluginEntry, controlnet_entry};
use injection::InjectionRule;
use serde_json::{Value, json};
use source::FileSource;
use std::collections::BTreeMap;

const MANIFEST: &str = include_str!("../flux.toml");
/// Pixel values for black and white, for the VAE as well as for XLabs' ControlNets.
const PIXEL_RANGE: [f64; 2] = [-1.0, 1.0];

/// An open ControlNet.
pub struct ControlNetFile {
    net: FluxControlNet,
    injection: InjectionRule,
}

/// The plugin.
pub const PLUGIN: PluginEntry = controlnet_entry!(ControlNetFile, "../plugin.toml");

impl ControlNetPlugin for ControlNetFile {
    fn open(file: AdapterFile, model: TargetModel) -> Result<Self> {
        let base = flux_config(&model)?;
        // A shared library has a copy of rayon of its own. The pool is global, so building it fails for every file but
        // the first, and in a program that the plugin is linked into: both are fine, as the pool exists then.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(file.threads()).build_global();
        let plan: AttentionPlan =
            model.attention.parse().map_err(|error| format!("attention {:?}: {error}", model.attention))?;
        let net = build_net(file, &base, &plan)?;
        check_sizes(net.config(), &base)?;
        let injection = InjectionRule::new(&net, &base);
        Ok(Self { net, injection })
    }

    fn control_spec(&self) -> ControlSpec {
        let (control, channels) = match self.net.takes_pixels() {
            true => (CONTROL_PIXELS, 3),
            false => (CONTROL_LATENTS, self.net.config().in_channels as u32),
        };
        ControlSpec { control, channels, modes: self.net.modes() as u32, range: PIXEL_RANGE }
    }

    fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>> {
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
        let input = DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions };
        let mode = optional(step.mode)?;
        let residuals = self.net.forward(&input, &to_candle(step.control)?, mode.as_ref());
        let residuals = residuals.map_err(|error| error.to_string())?;
        self.injection.place(residuals).into_iter().map(block_residual).collect()
    }
}

fn to_candle(tensor: BorrowedTensor) -> Result<Tensor> {
    tensor.to_candle().map_err(|error| error.to_string())
}

fn block_residual((tensor, blocks): (Tensor, Vec<u32>)) -> Result<BlockResidual> {
    let tensor = OwnedTensor::from_candle(&tensor).map_err(|error| error.to_string())?;
    Ok(BlockResidual { tensor, blocks })
}

fn flux_config(model: &TargetModel) -> Result<FluxConfig> {
    if model.family != "flux" {
        return Err(format!("the ControlNet is for FLUX.1, but the model's family is {:?}", model.family));
    }
    let config: Value = serde_json::from_str(&model.config).map_err(|error| format!("the model's config: {error}"))?;
    FluxConfig::new(&config).map_err(|error| format!("the model's config: {error}"))
}

/// Detects the file's layout and builds the ControlNet. Without a config.json, the rotary axes are those of the model:
/// no tensor shows them.
fn build_net(file: AdapterFile, base: &FluxConfig, plan: &AttentionPlan) -> Result<FluxControlNet> {
    let message = |error: clearform_layout::LayoutError| error.to_string();
    let manifests = Manifests::alone("flux.toml", MANIFEST).map_err(message)?;
    let config = file.config().map(|config| serde_json::from_str::<Value>(&config)).transpose();
    let config = config.map_err(|error| format!("config.json: {error}"))?;
    let config = config.unwrap_or_else(|| json!({ "axes_dims_rope": base.rope_axes }));
    let source = FileSource::new(file)?;
    let sidecar = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
    let identified = detect_source(&source, sidecar, &manifests, &Hints::default()).map_err(message)?;
    let canonical = identified.canonical(&source).require_complete().map_err(message)?;
    let config = FluxConfig::new(&identified.config).map_err(|error| error.to_string())?;
    FluxControlNet::build(config, &canonical, plan).map_err(|error| error.to_string())
}

/// Residuals are added to the model's tokens, so the widths must be equal; and both take the same text embeddings.
fn check_sizes(net: &FluxConfig, base: &FluxConfig) -> Result<()> {
    let sizes = [
        ("width", net.width(), base.width()),
        ("joint_attention_dim", net.text_channels, base.text_channels),
        ("pooled_projection_dim", net.pooled_channels, base.pooled_channels),
    ];
    match sizes.iter().find(|(_, net, base)| net != base) {
        None => Ok(()),
        Some((name, net, base)) => {
            Err(format!("{name}: expected {base} as in the model, found {net}: the ControlNet is for another model"))
        }
    }
}
