//! The plugin `controlnet`: ControlNets for FLUX.1, as diffusers' `FluxControlNetModel` saves them (InstantX, Shakker) and
//! in XLabs' own files.
//!
//! The net itself is `clearform_models`' [`FluxControlNet`]; what is here is what its file is (`flux.toml`, `source`),
//! and after which block of the model each residual is added (`injection`).
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
use clearform_plugin_abi::{CONTROL_LATENTS, CONTROL_PIXELS, export_controlnet};
use injection::InjectionRule;
use serde_json::{Value, json};
use source::FileSource;
use std::collections::BTreeMap;

const MANIFEST: &str = include_str!("../flux.toml");
/// What black and white become, for the VAE and for XLabs' nets alike.
const RANGE: [f64; 2] = [-1.0, 1.0];

/// An open ControlNet.
pub struct ControlNetFile {
    net: FluxControlNet,
    injection: InjectionRule,
}

export_controlnet!(ControlNetFile, "../plugin.toml");

impl ControlNetPlugin for ControlNetFile {
    fn open(file: AdapterFile, model: TargetModel) -> Result<Self> {
        let base = base(&model)?;
        // The host's threads are a whole process's; a second pool beside a first changes nothing, so its refusal is none.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(file.threads()).build_global();
        let plan: AttentionPlan =
            model.attention.parse().map_err(|error| format!("attention {:?}: {error}", model.attention))?;
        let net = net(file, &base, &plan)?;
        check(net.config(), &base)?;
        let injection = InjectionRule::new(&net, &base);
        Ok(Self { net, injection })
    }

    fn takes(&self) -> ControlSpec {
        let (control, channels) = match self.net.takes_pixels() {
            true => (CONTROL_PIXELS, 3),
            false => (CONTROL_LATENTS, self.net.config().in_channels as u32),
        };
        ControlSpec { control, channels, modes: self.net.modes() as u32, range: RANGE }
    }

    fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>> {
        let received = |tensor: BorrowedTensor| tensor.to_candle().map_err(|error| error.to_string());
        let optional = |tensor: Option<BorrowedTensor>| tensor.map(received).transpose();
        let conditions = Conditions {
            text: optional(step.text)?,
            pooled: optional(step.pooled)?,
            guidance: optional(step.guidance)?,
            image_ids: optional(step.image_ids)?,
            text_ids: optional(step.text_ids)?,
            ..Conditions::default()
        };
        let (latents, timestep) = (received(step.latents)?, received(step.timestep)?);
        let input = DenoiserInput { latents, timestep, step_index: StepIndex::default(), conditions };
        let (control, mode) = (received(step.control)?, optional(step.mode)?);
        let residuals = self.net.forward(&input, &control, mode.as_ref()).map_err(|error| error.to_string())?;
        let placed = self.injection.place(residuals).into_iter();
        let sent = |tensor: &Tensor| OwnedTensor::of_candle(tensor).map_err(|error| error.to_string());
        placed.map(|(tensor, blocks)| Ok(BlockResidual { tensor: sent(&tensor)?, blocks })).collect()
    }
}

fn base(model: &TargetModel) -> Result<FluxConfig> {
    if model.family != "flux" {
        return Err(format!("it is for FLUX.1, but the model is of the family {:?}", model.family));
    }
    let config: Value = serde_json::from_str(&model.config).map_err(|error| format!("the model's config: {error}"))?;
    FluxConfig::new(&config).map_err(|error| format!("the model's config: {error}"))
}

/// Recognises the file's layout, and builds the net. A file without a config.json has the model's own rotary axes, which
/// no tensor tells.
fn net(file: AdapterFile, base: &FluxConfig, plan: &AttentionPlan) -> Result<FluxControlNet> {
    let text = |error: clearform_layout::LayoutError| error.to_string();
    let manifests = Manifests::alone("flux.toml", MANIFEST).map_err(text)?;
    let config = file.config().map(|config| serde_json::from_str::<Value>(&config)).transpose();
    let config = config.map_err(|error| format!("config.json: {error}"))?;
    let config = config.unwrap_or_else(|| json!({ "axes_dims_rope": base.rope_axes }));
    let source = FileSource::new(file)?;
    let beside = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
    let identified = detect_source(&source, beside, &manifests, &Hints::default()).map_err(text)?;
    let canonical = identified.canonical(&source).complete().map_err(text)?;
    let config = FluxConfig::new(&identified.config).map_err(|error| error.to_string())?;
    FluxControlNet::build(config, &canonical, plan).map_err(|error| error.to_string())
}

/// Residuals are added to the model's tokens, so both must be of one width; and they see the same text.
fn check(net: &FluxConfig, base: &FluxConfig) -> Result<()> {
    let sizes = [
        ("width", net.width(), base.width()),
        ("joint_attention_dim", net.text_channels, base.text_channels),
        ("pooled_projection_dim", net.pooled_channels, base.pooled_channels),
    ];
    match sizes.iter().find(|(_, net, base)| net != base) {
        None => Ok(()),
        Some((name, net, base)) => {
            Err(format!("{name}: the ControlNet's is {net}, the model's {base}: it is for another model"))
        }
    }
}
