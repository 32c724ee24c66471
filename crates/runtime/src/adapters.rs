//! [`Adapters`]: LoRA files and ControlNets, opened by plugins and ready to be applied to a model.

use crate::files::TRANSFORMER;
use crate::{Components, Result, RuntimeError, TransformerCheckpoint};
use clearform_layout::{Hints, Identified, LayoutError, Manifests, ParameterMap, Sidecar, detect_source};
use clearform_plugin_host::{
    Adapter, AdapterReport, BaseModel, CONTROLNET_INTERFACE, ComponentParameters, ControlNet, LowRankMode, Plugin,
    PluginChoice, PluginError, PluginRegistry, ScaledAdapter, Strength, WeightEdits, adapter_parts,
};
use clearform_weights::{Checkpoint, TensorSource as _};
use std::path::PathBuf;
use std::sync::Arc;

/// An adapter that is to be used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterRequest {
    /// Its file or folder.
    pub path: PathBuf,
    /// The factor of its effect.
    pub strength: Strength,
    /// Which plugin opens it.
    pub choice: PluginChoice,
    /// When and in which mode a ControlNet acts.
    pub schedule: ControlNetSchedule,
}

/// When and in which mode a ControlNet acts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlNetSchedule {
    /// Start and end as fractions of all steps: diffusers' `control_guidance_start` and `control_guidance_end`.
    pub interval: [f64; 2],
    /// The mode of a union ControlNet: diffusers' `control_mode`.
    pub mode: Option<usize>,
}

impl AdapterRequest {
    fn bad_setting(&self, reason: &str) -> RuntimeError {
        RuntimeError::BadSetting(format!("{}: {reason}", self.path.display()))
    }
}

impl Default for ControlNetSchedule {
    fn default() -> Self {
        Self { interval: [0.0, 1.0], mode: None }
    }
}

/// Adapters with open files.
#[derive(Debug, Clone)]
pub struct Adapters {
    weights: Vec<WeightAdapter>,
    controlnets: Vec<PendingControlNet>,
    /// Whether low-rank edits are merged into the weights or added to the outputs of layers.
    pub low_rank: LowRankMode,
    /// Continue although tensors of an adapter have no counterpart in the model.
    pub allow_partial: bool,
    /// The attention of ControlNets, as the value of `--attention`.
    pub controlnet_attention: String,
}

/// An adapter that edits weights, in one or several parts: peft saves one for each component.
#[derive(Debug, Clone)]
struct WeightAdapter {
    path: PathBuf,
    parts: Vec<ScaledAdapter>,
}

/// The file of a ControlNet, which its plugin opens once the model is known.
#[derive(Debug, Clone)]
struct PendingControlNet {
    plugin: Plugin,
    file: Arc<Checkpoint>,
    request: AdapterRequest,
}

/// A transformer with the edits of adapters. Clones share it.
#[derive(Clone)]
pub struct EditedTransformer {
    /// The transformer.
    pub transformer: Arc<TransformerCheckpoint>,
    /// The edits of all components.
    pub edits: Arc<WeightEdits>,
    /// What became of each adapter's tensors.
    pub reports: Vec<AdapterReport>,
}

/// Components beside the transformer that adapters may edit.
pub const EDITABLE_COMPONENTS: [&str; 4] = ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"];

/// An open ControlNet with its settings.
#[derive(Debug, Clone)]
pub struct ActiveControlNet {
    /// The ControlNet.
    pub controlnet: Arc<ControlNet>,
    /// Factor of its residuals: diffusers' `controlnet_conditioning_scale`.
    pub scale: f64,
    /// When and in which mode it acts.
    pub schedule: ControlNetSchedule,
}

impl Default for Adapters {
    fn default() -> Self {
        Self {
            weights: Vec::new(),
            controlnets: Vec::new(),
            low_rank: LowRankMode::default(),
            allow_partial: false,
            controlnet_attention: "full".to_owned(),
        }
    }
}

impl Adapters {
    /// Opens the files of `requests`. Only the plugins that they need are loaded.
    ///
    /// # Errors
    /// A strength is out of range, a file is damaged, no plugin opens it, or the plugin rejects it.
    pub fn open(requests: &[AdapterRequest], registry: &PluginRegistry) -> Result<Self> {
        let mut adapters = Self::default();
        for request in requests {
            request.strength.check().map_err(|reason| request.bad_setting(&reason))?;
            adapters.add(request, registry)?;
        }
        Ok(adapters)
    }

    fn add(&mut self, request: &AdapterRequest, registry: &PluginRegistry) -> Result<()> {
        let mut parts = Vec::new();
        for part in adapter_parts(&request.path) {
            let file = Arc::new(Checkpoint::open(&part)?);
            let plugin =
                registry.choose(&file, &request.choice).map_err(|error| with_what_it_is(error, &file))?.clone();
            match plugin.description.interface.as_str() {
                CONTROLNET_INTERFACE => {
                    self.controlnets.push(PendingControlNet { plugin, file, request: request.clone() })
                }
                _ => {
                    let adapter = Arc::new(Adapter::open(&plugin, file)?);
                    parts.push(ScaledAdapter { adapter, strength: request.strength.clone() });
                }
            }
        }
        if !parts.is_empty() {
            self.weights.push(WeightAdapter { path: request.path.clone(), parts });
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.controlnets.is_empty()
    }

    /// Without the ControlNets.
    #[must_use]
    pub fn only_weights(&self) -> Self {
        Self { controlnets: Vec::new(), ..self.clone() }
    }

    /// Without the adapters that edit weights.
    #[must_use]
    pub fn only_controlnets(&self) -> Self {
        Self { weights: Vec::new(), ..self.clone() }
    }

    /// Number of ControlNets.
    pub fn controlnet_count(&self) -> usize {
        self.controlnets.len()
    }

    /// Applies the weight edits to `transformer`, and to the other components of its pipeline if `components` are given.
    ///
    /// # Errors
    /// Nothing of an adapter is applied; tensors of one have no counterpart and [`Self::allow_partial`] is not set; or an
    /// edit changes a shape that is fixed.
    pub fn apply_to(
        &self,
        transformer: TransformerCheckpoint,
        components: Option<&Components>,
        manifests: &Manifests,
    ) -> Result<EditedTransformer> {
        if self.weights.is_empty() {
            let transformer = Arc::new(transformer);
            return Ok(EditedTransformer { transformer, edits: Arc::default(), reports: Vec::new() });
        }
        let parts: Vec<ScaledAdapter> = self.weights.iter().flat_map(|adapter| adapter.parts.clone()).collect();
        let (edits, reports) = WeightEdits::place(&parts, &editable_parameters(&transformer, components)?);
        let reports = self.whole(reports);
        reports.iter().try_for_each(|report| self.check(report))?;
        edits.check_finite()?;
        let edits = Arc::new(edits);
        let transformer = Arc::new(transformer.patched(edits.clone(), self.low_rank, manifests)?);
        Ok(EditedTransformer { transformer, edits, reports })
    }

    /// One report for each adapter, from those of all parts.
    fn whole(&self, reports: Vec<AdapterReport>) -> Vec<AdapterReport> {
        let mut reports = reports.into_iter();
        let whole = |WeightAdapter { path, parts }: &WeightAdapter| {
            AdapterReport::of_parts(path, reports.by_ref().take(parts.len()).collect())
        };
        self.weights.iter().map(whole).collect()
    }

    fn check(&self, report: &AdapterReport) -> Result<()> {
        match report.applied {
            0 => Err(RuntimeError::UnusedAdapter(report.to_string())),
            _ if report.is_complete() || self.allow_partial => Ok(()),
            _ => Err(RuntimeError::PartialAdapter(report.to_string())),
        }
    }

    /// Opens the ControlNets for `transformer`. Union ControlNets may still lack a mode:
    /// [`ActiveControlNet::require_mode`].
    ///
    /// # Errors
    /// The plugin rejects a file, the file belongs to another model, or interval or mode are invalid.
    pub fn open_controlnets(&self, transformer: &TransformerCheckpoint) -> Result<Vec<ActiveControlNet>> {
        let identified = transformer.identified();
        let base =
            BaseModel { family: &identified.family, config: &identified.config, attention: &self.controlnet_attention };
        self.controlnets.iter().map(|pending| pending.open(base)).collect()
    }
}

/// The error that no plugin opens `file`, with what the file is if it is known: users mistake models for adapters.
fn with_what_it_is(error: PluginError, file: &Checkpoint) -> PluginError {
    let PluginError::NoPlugin { adapter, reason } = error else { return error };
    let sidecar = Sidecar { config: file.config(), metadata: file.metadata() };
    let found = Manifests::embedded().and_then(|known| detect_source(file, sidecar, &known, &Hints::default()));
    let reason = match found {
        Ok(Identified { family, .. }) => format!("{reason}; the file is a model of the family {family}"),
        Err(LayoutError::Unsupported { name, .. }) => format!("{reason}; the file is {name}"),
        Err(_) => reason,
    };
    PluginError::NoPlugin { adapter, reason }
}

/// The parameters that adapters may edit, by component.
fn editable_parameters(
    transformer: &TransformerCheckpoint,
    components: Option<&Components>,
) -> Result<ComponentParameters> {
    let parameters = ComponentParameters::default().with(TRANSFORMER, transformer.identified().parameter_map());
    let Some(components) = components else { return Ok(parameters.skip_others("no text encoder is loaded")) };
    EDITABLE_COMPONENTS.into_iter().filter(|name| components.has(name)).try_fold(parameters, |parameters, name| {
        // Some libraries write CLIP's names with this prefix, and some without.
        let map = ParameterMap::of_tensors(&components.weights(name)?.tensors(), "text_model.");
        Ok(parameters.with(name, map))
    })
}

impl PendingControlNet {
    fn open(&self, base: BaseModel) -> Result<ActiveControlNet> {
        let controlnet = Arc::new(ControlNet::open(&self.plugin, self.file.clone(), base)?);
        let ControlNetSchedule { interval: [start, end], mode } = self.request.schedule;
        let bad = |reason: String| Err(self.request.bad_setting(&reason));
        if !(0.0 <= start && start <= end && end <= 1.0) {
            return bad(format!("start and end: expected 0 <= start <= end <= 1, found {start} and {end}"));
        }
        match (controlnet.input().modes, mode) {
            (0, Some(_)) => return bad("it has no modes; remove ,mode=N".to_owned()),
            (modes, Some(mode)) if mode >= modes => return bad(wrong_mode(modes, &mode.to_string())),
            _ => {}
        }
        Ok(ActiveControlNet { controlnet, scale: self.request.strength.overall, schedule: self.request.schedule })
    }
}

impl ActiveControlNet {
    /// Checks that a union ControlNet has a mode.
    ///
    /// # Errors
    /// It has none.
    pub fn require_mode(&self) -> Result<()> {
        match (self.controlnet.input().modes, self.schedule.mode) {
            (0, _) | (_, Some(_)) => Ok(()),
            (modes, None) => Err(RuntimeError::BadSetting(format!(
                "{}: {}",
                self.controlnet.path().display(),
                wrong_mode(modes, "none")
            ))),
        }
    }
}

fn wrong_mode(modes: usize, found: &str) -> String {
    format!("a union ControlNet with {modes} modes: pass ,mode=N, 0 to {}, found {found}", modes - 1)
}
