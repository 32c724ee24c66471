//! [`Adapters`]: the adapters that somebody asked for, opened by plugins and ready to meet a model.

use crate::transformer::TRANSFORMER;
use crate::{Components, Result, RuntimeError, Transformer};
use clearform_layout::{Manifests, ParameterMap};
use clearform_plugin_host::{
    Adapter, AdapterReport, BaseModel, CONTROLNET_INTERFACE, ComponentParameters, ControlNet, LowRankMode, Plugin,
    PluginChoice, PluginRegistry, ScaledAdapter, Strength, WeightEdits,
};
use clearform_weights::{Checkpoint, TensorSource as _};
use std::path::PathBuf;
use std::sync::Arc;

/// An adapter that somebody asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterRequest {
    /// Its file or folder.
    pub path: PathBuf,
    /// How strongly it acts.
    pub strength: Strength,
    /// Which plugin opens it.
    pub choice: PluginChoice,
    /// When and how a branch acts.
    pub schedule: ControlNetSchedule,
}

/// When and how a branch acts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlNetSchedule {
    /// The part of the way, within 0 to 1.
    pub interval: [f64; 2],
    /// The mode of a union ControlNet.
    pub mode: Option<usize>,
}

impl Default for ControlNetSchedule {
    fn default() -> Self {
        Self { interval: [0.0, 1.0], mode: None }
    }
}

/// Adapters whose files are open.
#[derive(Debug, Clone)]
pub struct Adapters {
    weights: Vec<ScaledAdapter>,
    controlnets: Vec<PendingControlNet>,
    /// How low-rank edits meet the weights.
    pub low_rank: LowRankMode,
    /// Go on although tensors of an adapter do not meet the model.
    pub allow_partial: bool,
    /// The attention of branches, as `--attention` takes it.
    pub branch_attention: String,
}

/// A branch's file, which is opened when its model is known.
#[derive(Debug, Clone)]
struct PendingControlNet {
    plugin: Plugin,
    file: Arc<Checkpoint>,
    request: AdapterRequest,
}

/// A transformer with its edits.
pub struct EditedTransformer {
    /// The transformer.
    pub transformer: Transformer,
    /// The edits of it and of all other parts.
    pub edits: Arc<WeightEdits>,
    /// What became of each adapter's tensors.
    pub reports: Vec<AdapterReport>,
}

/// Parts beside the transformer that adapters may edit.
pub const EDITED_PARTS: [&str; 4] = ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"];

/// An open branch, with how it acts.
#[derive(Debug, Clone)]
pub struct ActiveControlNet {
    /// The branch.
    pub controlnet: Arc<ControlNet>,
    /// Factor of its residuals.
    pub scale: f64,
    /// When and how it acts.
    pub schedule: ControlNetSchedule,
}

impl Default for Adapters {
    fn default() -> Self {
        Self {
            weights: Vec::new(),
            controlnets: Vec::new(),
            low_rank: LowRankMode::default(),
            allow_partial: false,
            branch_attention: "full".to_owned(),
        }
    }
}

impl Adapters {
    /// Opens the files of `requests`, and loads the plugins that they need and no others.
    ///
    /// # Errors
    /// A file is damaged, no plugin opens it, or the plugin refuses it.
    pub fn open(requests: &[AdapterRequest], registry: &PluginRegistry) -> Result<Self> {
        let mut adapters = Self::default();
        for request in requests {
            let file = Arc::new(Checkpoint::open(&request.path)?);
            let plugin = registry.choose(&file, &request.choice)?.clone();
            match plugin.description.interface.as_str() {
                CONTROLNET_INTERFACE => {
                    adapters.controlnets.push(PendingControlNet { plugin, file, request: request.clone() })
                }
                _ => {
                    let adapter = Arc::new(Adapter::open(&plugin, file)?);
                    adapters.weights.push(ScaledAdapter { adapter, strength: request.strength.clone() });
                }
            }
        }
        Ok(adapters)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.controlnets.is_empty()
    }

    /// Those that edit weights.
    #[must_use]
    pub fn only_weights(&self) -> Self {
        Self { controlnets: Vec::new(), ..self.clone() }
    }

    /// The branches.
    #[must_use]
    pub fn only_controlnets(&self) -> Self {
        Self { weights: Vec::new(), ..self.clone() }
    }

    /// How many branches there are.
    pub fn controlnet_count(&self) -> usize {
        self.controlnets.len()
    }

    /// Puts the weight edits on `transformer`, and on the other parts of its pipeline if these are to run.
    ///
    /// # Errors
    /// Tensors of an adapter meet nothing, and that was not allowed; or they widen what must not be wider.
    pub fn apply_to(
        &self,
        transformer: Transformer,
        components: Option<&Components>,
        manifests: &Manifests,
    ) -> Result<EditedTransformer> {
        if self.weights.is_empty() {
            return Ok(EditedTransformer { transformer, edits: Arc::default(), reports: Vec::new() });
        }
        let (edits, reports) = WeightEdits::place(&self.weights, &parts(&transformer, components)?);
        match reports.iter().find(|report| !report.is_whole()) {
            Some(report) if !self.allow_partial => return Err(RuntimeError::PartialAdapter(report.to_string())),
            _ => {}
        }
        let edits = Arc::new(edits);
        let transformer = transformer.patched(edits.clone(), self.low_rank, manifests)?;
        Ok(EditedTransformer { transformer, edits, reports })
    }

    /// Opens the branches for `transformer`.
    ///
    /// # Errors
    /// The plugin refuses the file, or it is for another model or acts in no mode.
    pub fn open_controlnets(&self, transformer: &Transformer) -> Result<Vec<ActiveControlNet>> {
        let identified = transformer.identified();
        let base =
            BaseModel { family: &identified.family, config: &identified.config, attention: &self.branch_attention };
        self.controlnets.iter().map(|unopened| unopened.open(base)).collect()
    }
}

/// What adapters may edit.
fn parts(transformer: &Transformer, components: Option<&Components>) -> Result<ComponentParameters> {
    let parts = ComponentParameters::default().with(TRANSFORMER, transformer.identified().parameter_map());
    let Some(components) = components else { return Ok(parts.and_no_other("the transformer runs alone")) };
    EDITED_PARTS.into_iter().filter(|name| components.has(name)).try_fold(parts, |parts, name| {
        // Some libraries write CLIP's names with this prefix, and some without.
        let addresses = ParameterMap::of_tensors(&components.weights(name)?.tensors(), "text_model.");
        Ok(parts.with(name, addresses))
    })
}

impl PendingControlNet {
    fn open(&self, base: BaseModel) -> Result<ActiveControlNet> {
        let controlnet = Arc::new(ControlNet::open(&self.plugin, self.file.clone(), base)?);
        let ControlNetSchedule { interval: [start, end], mode } = self.request.schedule;
        let bad = |reason: String| RuntimeError::BadSetting(format!("{}: {reason}", self.request.path.display()));
        if !(0.0 <= start && start <= end && end <= 1.0) {
            return Err(bad(format!("start and end: expected 0 <= start <= end <= 1, found {start} and {end}")));
        }
        match (controlnet.input().modes, mode) {
            (0, None) => {}
            (0, Some(_)) => return Err(bad("it takes no mode; leave mode=N out".to_owned())),
            (modes, Some(mode)) if mode < modes => {}
            (modes, found) => {
                let found = found.map_or("none".to_owned(), |mode| mode.to_string());
                return Err(bad(format!(
                    "it is a union of {modes} modes: give ,mode=N, 0 to {}, found {found}",
                    modes - 1
                )));
            }
        }
        Ok(ActiveControlNet { controlnet, scale: self.request.strength.whole, schedule: self.request.schedule })
    }
}
