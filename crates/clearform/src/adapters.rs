//! [`AdapterOptions`]: LoRAs and ControlNets that a call applies, and the plugins that read them.

use crate::bundled_plugins::BUNDLED_PLUGINS;
use crate::error::WithContext as _;
use crate::observer::{Observer, note};
use crate::{ClearformError, Result};
use clearform_attention::AttentionPlan;
use clearform_models::StepIndex;
use clearform_plugin_host::{
    ADAPTER_INTERFACE, AdapterReport, CONTROLNET_INTERFACE, LowRankMode, PluginChoice, PluginRegistry, Strength,
    is_within,
};
use clearform_runtime::{ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, RgbImage};
use clearform_weights::read_file;
use image::{DynamicImage, ImageDecoder as _, ImageReader};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Cursor;
use std::path::{Path, PathBuf};

/// Adapters to apply, in order, and how.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterOptions {
    /// The adapters.
    pub adapters: Vec<AdapterSpec>,
    /// How low-rank edits are applied.
    pub apply_mode: LoraApplyMode,
    /// Continues although tensors of an adapter do not match the model.
    pub allow_partial: bool,
    /// Attention plan of ControlNets, `full` or `clear:r=R`; `None` is full attention.
    pub controlnet_attention: Option<String>,
    /// Where plugins are found.
    pub plugins: PluginOptions,
}

/// An adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterSpec {
    /// Its file or folder.
    pub path: PathBuf,
    /// What it must be.
    #[serde(default)]
    pub kind: AdapterKind,
    /// Factor of its effect: the strength of a LoRA, the conditioning scale of a ControlNet.
    #[serde(default = "one")]
    pub strength: f64,
    /// Strengths of blocks whose names contain a text, instead of `strength`.
    #[serde(default)]
    pub block_strengths: Vec<(String, f64)>,
    /// When a ControlNet acts, as fractions of the steps: diffusers' `control_guidance_start` and `control_guidance_end`.
    #[serde(default = "always")]
    pub interval: [f64; 2],
    /// Control mode of a union ControlNet.
    #[serde(default)]
    pub mode: Option<usize>,
    /// The plugin that opens it, by id; `None` is the one that recognises it.
    #[serde(default)]
    pub plugin: Option<String>,
}

/// What an adapter is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// Whatever a plugin recognises.
    #[default]
    Any,
    /// A LoRA or another edit of weights.
    Lora,
    /// A ControlNet.
    ControlNet,
}

/// How low-rank edits are applied to weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraApplyMode {
    /// As separate products beside the weights: exact in every dtype.
    #[default]
    AtRuntime,
    /// Merged into the weights when they are loaded: slightly faster.
    Immediately,
}

/// Where plugins are found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginOptions {
    /// Folders that are searched before the program's own.
    pub folders: Vec<PathBuf>,
    /// Uses no plugins.
    pub disabled: bool,
}

fn one() -> f64 {
    1.0
}

fn always() -> [f64; 2] {
    [0.0, 1.0]
}

impl AdapterSpec {
    /// The adapter at `path`, with full strength.
    pub fn new(path: impl Into<PathBuf>, kind: AdapterKind) -> Self {
        Self {
            path: path.into(),
            kind,
            strength: one(),
            block_strengths: Vec::new(),
            interval: always(),
            mode: None,
            plugin: None,
        }
    }

    /// The same adapter with another strength.
    #[must_use]
    pub fn with_strength(self, strength: f64) -> Self {
        Self { strength, ..self }
    }

    /// Whether it changes anything: at strength 0, or in an empty interval of steps, it does not.
    pub(crate) fn has_effect(&self) -> bool {
        let [start, end] = self.interval;
        let acts = start < end;
        acts && (self.strength != 0.0 || self.block_strengths.iter().any(|(_, strength)| *strength != 0.0))
    }

    /// Settings that are not the defaults, as `KEY=VALUE`.
    fn settings(&self) -> Vec<String> {
        let blocks = self.block_strengths.iter().map(|(block, strength)| format!("{block}={strength}"));
        let [start, end] = self.interval;
        let start = (start != 0.0).then(|| format!("start={start}"));
        let end = (end != 1.0).then(|| format!("end={end}"));
        let mode = self.mode.map(|mode| format!("mode={mode}"));
        let plugin = self.plugin.as_ref().map(|id| format!("plugin={id}"));
        blocks.chain([start, end, mode, plugin].into_iter().flatten()).collect()
    }

    fn request(&self) -> AdapterRequest {
        AdapterRequest {
            path: self.path.clone(),
            strength: Strength { overall: self.strength, blocks: self.block_strengths.clone() },
            choice: PluginChoice { interface: self.kind.interface(), id: self.plugin.clone() },
            schedule: ControlNetSchedule { interval: self.interval, mode: self.mode },
        }
    }
}

impl AdapterKind {
    /// The command line's option.
    fn flag(self) -> &'static str {
        match self {
            Self::Any => "--adapter",
            Self::Lora => "--lora",
            Self::ControlNet => "--controlnet",
        }
    }

    fn interface(self) -> Option<&'static str> {
        match self {
            Self::Any => None,
            Self::Lora => Some(ADAPTER_INTERFACE),
            Self::ControlNet => Some(CONTROLNET_INTERFACE),
        }
    }
}

impl AdapterOptions {
    /// Applies `adapters` in this order.
    pub fn new(adapters: impl IntoIterator<Item = AdapterSpec>) -> Self {
        Self { adapters: adapters.into_iter().collect(), ..Self::default() }
    }

    /// Opens the files. Plugins are searched for only if there is an adapter.
    ///
    /// # Errors
    /// A file is damaged, or no plugin opens it.
    pub fn open(&self) -> Result<Adapters> {
        if self.adapters.is_empty() {
            return Ok(Adapters::default());
        }
        let requests: Vec<AdapterRequest> = self.adapters.iter().map(AdapterSpec::request).collect();
        let mut adapters = Adapters::open(&requests, &plugin_registry(&self.plugins)?)?;
        adapters.allow_partial = self.allow_partial;
        adapters.low_rank = match self.apply_mode {
            LoraApplyMode::AtRuntime => LowRankMode::Separate,
            LoraApplyMode::Immediately => LowRankMode::Fused,
        };
        if let Some(attention) = &self.controlnet_attention {
            attention.parse::<AttentionPlan>().context("--controlnet-attention")?;
            adapters.controlnet_attention.clone_from(attention);
        }
        Ok(adapters)
    }

    /// Whether one of them may be a ControlNet, which takes control images.
    pub(crate) fn may_take_control(&self) -> bool {
        self.adapters.iter().any(|adapter| adapter.kind != AdapterKind::Lora)
    }

    /// The same without ControlNets that act in none of `steps` steps.
    pub(crate) fn acting_in(&self, steps: usize) -> Self {
        let acts = |adapter: &&AdapterSpec| acts_within(adapter.interval, steps);
        Self { adapters: self.adapters.iter().filter(acts).cloned().collect(), ..self.clone() }
    }

    /// The same without adapters that change nothing, as `reports` say.
    pub(crate) fn with_effect(&self, reports: &[AdapterReport]) -> Self {
        let is_idle =
            |adapter: &AdapterSpec| reports.iter().any(|found| found.adapter == adapter.path && !found.has_effect);
        let active = self.adapters.iter().filter(|adapter| adapter.has_effect() && !is_idle(adapter));
        Self { adapters: active.cloned().collect(), ..self.clone() }
    }

    /// What is said of settings for adapters of which there are none.
    pub(crate) fn without_effect(&self) -> Vec<String> {
        let has = |kind| self.adapters.iter().any(|adapter| [kind, AdapterKind::Any].contains(&adapter.kind));
        let is_set = [
            (self.apply_mode != LoraApplyMode::default(), AdapterKind::Lora, "--lora-apply-mode"),
            (self.allow_partial && !has(AdapterKind::ControlNet), AdapterKind::Lora, "--allow-partial"),
            (
                self.controlnet_attention.as_ref().is_some_and(|plan| plan != "full"),
                AdapterKind::ControlNet,
                "--controlnet-attention",
            ),
        ];
        let idle = is_set.into_iter().filter(|(is_set, kind, _)| *is_set && !has(*kind));
        let idle = idle.map(|(_, kind, flag)| format!("{flag} has no effect without {}", kind.flag()));
        let idle_folders = (self.adapters.is_empty() && !self.plugins.folders.is_empty())
            .then(|| "--plugin-dir has no effect without an adapter".to_owned());
        idle.chain(idle_folders).collect()
    }
}

/// As command-line options, with file names instead of paths, without those that have no effect.
impl fmt::Display for AdapterOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let active: Vec<&AdapterSpec> = self.adapters.iter().filter(|adapter| adapter.has_effect()).collect();
        let has_controlnet = active.iter().any(|adapter| adapter.kind != AdapterKind::Lora);
        let attention = self.controlnet_attention.iter().filter(|plan| has_controlnet && *plan != "full");
        let attention = attention.map(|plan| format!("--controlnet-attention {plan}"));
        let each = active.iter().map(|adapter| adapter.to_string()).chain(attention);
        f.write_str(&each.collect::<Vec<_>>().join(" "))
    }
}

impl fmt::Display for AdapterSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        write!(f, "{} {name}", self.kind.flag())?;
        if self.strength != one() {
            write!(f, ":{}", self.strength)?;
        }
        let settings = self.settings();
        if settings.is_empty() { Ok(()) } else { write!(f, ":{}", settings.join(",")) }
    }
}

/// Whether one of `steps` steps lies in `interval`.
pub(crate) fn acts_within(interval: [f64; 2], steps: usize) -> bool {
    (0..steps).any(|index| is_within(StepIndex { index, steps }, interval))
}

/// The plugins in the given folders, then those next to the program, then those that are linked into it.
///
/// # Errors
/// A folder cannot be read, or is inside a model.
pub(crate) fn plugin_registry(options: &PluginOptions) -> Result<PluginRegistry> {
    if options.disabled {
        return Ok(PluginRegistry::disabled());
    }
    let program = std::env::current_exe().context("finding the program's folder")?;
    let program_folder = program.parent().map(Path::to_owned);
    let folders: Vec<PathBuf> = options.folders.iter().cloned().chain(program_folder).collect();
    Ok(PluginRegistry::scan(&folders)?.with_linked(&BUNDLED_PLUGINS))
}

/// A ControlNet that acted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ControlNetReport {
    /// Its file or folder.
    pub controlnet: PathBuf,
    /// Factor of its residuals.
    pub strength: f64,
    /// Start and end, as fractions of the steps.
    pub interval: [f64; 2],
    /// Its mode, if it is a union.
    pub mode: Option<usize>,
}

impl From<&ActiveControlNet> for ControlNetReport {
    fn from(ActiveControlNet { controlnet, scale, schedule }: &ActiveControlNet) -> Self {
        let ControlNetSchedule { interval, mode } = *schedule;
        Self { controlnet: controlnet.path().to_owned(), strength: *scale, interval, mode }
    }
}

/// Passes on how many tensors of each adapter were applied, and the plugins' notes.
pub(crate) fn note_reports(reports: &[AdapterReport], controlnets: &[ActiveControlNet], observer: &mut dyn Observer) {
    for report in reports {
        report.notes.iter().for_each(|text| note(observer, text));
        note(observer, report);
    }
    controlnets.iter().flat_map(|active| active.controlnet.notes()).for_each(|text| note(observer, text));
}

/// Reads the images that are given with the option `flag`.
///
/// # Errors
/// A file is not an image.
pub(crate) fn load_control_images(flag: &str, paths: &[PathBuf]) -> Result<Vec<RgbImage>> {
    paths.iter().map(|path| load_image(path).context(format_args!("{flag} {}", path.display()))).collect()
}

/// The pixels of the image at `path`, turned as its EXIF data says.
fn load_image(path: &Path) -> Result<RgbImage> {
    let bytes = read_file(path)?;
    if is_cut_jpeg(&bytes) {
        return Err(ClearformError::bad_option("the image is cut short; copy it again"));
    }
    let reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format()?;
    if !reader.format().is_some_and(|format| format.reading_enabled()) {
        return Err(ClearformError::bad_option("is no image of a format that is read; save it as PNG, JPEG or WebP"));
    }
    let mut decoder = reader.into_decoder()?;
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image.to_rgb8())
}

/// Whether a JPEG file lacks the marker of its end, without which the decoder would fill in grey. Thumbnails, which have one
/// too, are at its beginning.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    let is_jpeg = bytes.starts_with(b"\xff\xd8");
    let end = bytes.windows(2).rposition(|marker| marker == b"\xff\xd9");
    is_jpeg && end.is_none_or(|end| end < bytes.len() / 2)
}

/// One control image for each of `count` prompts; a single one serves all.
///
/// # Errors
/// Any other number of images.
pub(crate) fn control_images_per_prompt(paths: &[PathBuf], count: usize) -> Result<Vec<RgbImage>> {
    let images = load_control_images("--control-image", paths)?;
    match images.len() {
        1 => Ok(vec![images[0].clone(); count]),
        found if found == 0 || found == count => Ok(images),
        found => Err(ClearformError::bad_option(format!(
            "--control-image: expected one image, or one for each of {count} prompts, found {found}"
        ))),
    }
}
