//! [`bench_step`] and [`bench_model`]: time one evaluation of a transformer on random inputs.

use super::random_weights::{RandomWeights, WeightFormat};
use super::{median_ms, parse_grid};
use crate::sources::{open_transformer_with, read_options};
use crate::{ClearformError, ComputeDevice, FloatDtype, Result, SourceOptions};
use candle_core::Device;
use clearform_attention::{AttentionPlan, TokenGrid};
use clearform_layout::{Identified, Manifests};
use clearform_models::families::flux::Flux;
use clearform_models::{Architecture, FamilyRegistry, InputSizes, ModelFamily as _, random_input};
use clearform_runtime::{EvaluationSize, MemoryOptions, MemoryPlan, Residency, check_dtype};
use clearform_weights::{ConvertedSource, InMemoryTensors, StreamedSource, TensorSource};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How one evaluation on random inputs is timed.
#[derive(Debug, Clone)]
pub struct StepTiming {
    /// Text tokens; `None` is 512 if the model takes text.
    pub text: Option<usize>,
    /// Timed runs, after one warm-up run.
    pub repeat: usize,
    /// Where it runs.
    pub device: ComputeDevice,
    /// Dtype to compute in.
    pub dtype: FloatDtype,
    /// How much memory may be taken.
    pub memory: MemoryOptions,
}

/// Text tokens where no number is given.
const USUAL_TEXT: usize = 512;

/// A FLUX transformer of given sizes.
#[derive(Debug, Clone)]
pub struct StepBench {
    /// Hidden size of the transformer.
    pub width: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Double-stream blocks.
    pub double: usize,
    /// Single-stream blocks.
    pub single: usize,
    /// Image tokens, HEIGHTxWIDTH.
    pub grid: String,
    /// Attention plan.
    pub attention: AttentionPlan,
    /// How the weights are stored; `None` is in the dtype to compute in.
    pub format: Option<WeightFormat>,
    /// How it is timed.
    pub timing: StepTiming,
}

/// A model at several sizes and with several plans.
#[derive(Debug, Clone)]
pub struct ModelBench {
    /// The model.
    pub model: BenchedModel,
    /// Grids of image tokens, HEIGHTxWIDTH.
    pub grids: Vec<String>,
    /// Attention plans.
    pub plans: Vec<AttentionPlan>,
    /// How it is timed.
    pub timing: StepTiming,
}

/// Which model is timed.
#[derive(Debug, Clone)]
pub enum BenchedModel {
    /// One in a file.
    Stored {
        /// Portable model, diffusers folder or single file.
        path: PathBuf,
        /// How it is read.
        reading: SourceOptions,
    },
    /// One of the shapes of a published model, with random weights.
    Random {
        /// Its name ([`Manifests::published`]), such as `flux-dev`.
        name: String,
        /// How the weights are stored; `None` is in the dtype to compute in.
        format: Option<WeightFormat>,
    },
}

/// Times a FLUX transformer with random weights.
///
/// # Errors
/// Sizes that contradict each other, a device that does not exist, or a model that does not fit into memory.
pub fn bench_step(bench: &StepBench) -> Result<StepRow> {
    let model = StepModel::random(Flux.name(), &config(bench)?, bench.format, &bench.timing)?;
    Ok(model.rows(&bench.attention, std::slice::from_ref(&bench.grid))?.remove(0))
}

/// Times a given model at every grid with every plan.
///
/// # Errors
/// The model cannot be read or does not fit into memory, or a grid or plan does not fit it.
pub fn bench_model(bench: &ModelBench) -> Result<StepTable> {
    let model = match &bench.model {
        BenchedModel::Stored { path, reading } => StepModel::stored(path, reading, &bench.timing)?,
        BenchedModel::Random { name, format } => {
            let published = Manifests::embedded()?.published_model(name)?;
            StepModel::random(&published.family, &published.config, *format, &bench.timing)?
        }
    };
    let rows = bench.plans.iter().map(|plan| model.rows(plan, &bench.grids)).collect::<Result<Vec<_>>>()?;
    Ok(StepTable { rows: rows.into_iter().flatten().collect() })
}

/// FLUX.1-dev's config.json with the width, depth and head size of the options.
fn config(bench: &StepBench) -> Result<Value> {
    let StepBench { width, head_dim, .. } = bench;
    if width.checked_rem(*head_dim) != Some(0) || *width == 0 {
        let reason = format!("--width {width}: expected a positive multiple of --head-dim {head_dim}");
        return Err(ClearformError::BadOption(reason));
    }
    // FLUX.1-dev's axes are 16, 56 and 56 of 128 channels: 7/16 for each image axis, rounded down to an even number.
    let axis = head_dim * 7 / 16 / 2 * 2;
    Ok(json!({
        "in_channels": 64, "out_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "num_layers": bench.double, "num_single_layers": bench.single, "guidance_embeds": true,
        "attention_head_dim": head_dim, "num_attention_heads": width / head_dim,
        "width": width, "axes_dims_rope": [head_dim - 2 * axis, axis, axis],
    }))
}

/// A transformer, and how it is timed.
struct StepModel<'a> {
    architecture: Box<dyn Architecture>,
    /// Channels of a token.
    width: usize,
    weights: Arc<dyn TensorSource>,
    timing: &'a StepTiming,
    device: Device,
}

impl<'a> StepModel<'a> {
    /// The model at `path`.
    fn stored(path: &Path, reading: &SourceOptions, timing: &'a StepTiming) -> Result<Self> {
        let transformer = open_transformer_with(path, &read_options(reading)?.recorded(path)?)?;
        let Identified { family, config, .. } = transformer.identified();
        let width = transformer.identified().size("width").unwrap_or(0);
        Self::new(parsed(reading.families, family, config)?, width, Arc::new(transformer.source()), timing)
    }

    /// A model of `family` with the sizes of `config`, its hidden settings included.
    fn random(family: &str, config: &Value, format: Option<WeightFormat>, timing: &'a StepTiming) -> Result<Self> {
        let format = format.unwrap_or(WeightFormat::Dense(timing.dtype.into()));
        let weights = RandomWeights::new(Manifests::embedded()?.expected(family, config)?, format)?;
        let width = config["width"].as_u64().unwrap_or(0) as usize;
        Self::new(parsed(FamilyRegistry::default(), family, config)?, width, Arc::new(weights), timing)
    }

    fn new(
        architecture: Box<dyn Architecture>,
        width: usize,
        weights: Arc<dyn TensorSource>,
        timing: &'a StepTiming,
    ) -> Result<Self> {
        if let (Some(text), None) = (timing.text, architecture.input_channels().text) {
            return Err(ClearformError::bad_option(format!("--text {text}: the model takes no text; leave it out")));
        }
        let device = timing.device.open()?;
        check_dtype(&device, timing.dtype.into())?;
        let dtype = Some(timing.dtype.into());
        let weights: Arc<dyn TensorSource> = match device.is_cpu() {
            true => Arc::new(ConvertedSource::new(weights, dtype)),
            false => Arc::new(InMemoryTensors::load(weights.as_ref(), dtype, &device)?),
        };
        Ok(Self { architecture, width, weights, timing, device })
    }

    /// One row per grid.
    fn rows(&self, plan: &AttentionPlan, grids: &[String]) -> Result<Vec<StepRow>> {
        let grids: Vec<TokenGrid> = grids.iter().map(|text| parse_grid("--grid", text)).collect::<Result<_>>()?;
        let largest = grids.iter().map(|grid| grid.tokens()).max().unwrap_or(0);
        let denoiser = match self.residency(largest + self.text())? {
            Residency::InMemory => self.architecture.build(self.weights.as_ref(), plan)?,
            Residency::Streamed => self.architecture.build(&StreamedSource(self.weights.clone()), plan)?,
        };
        let row = |grid: TokenGrid| {
            let (text, dtype) = (self.text(), self.timing.dtype.into());
            let input = random_input(
                self.architecture.as_ref(),
                &InputSizes { grid, text, dtype, device: self.device.clone() },
            )?;
            let evaluate = || Ok(denoiser.forward(&input).map(|_| ())?);
            let median_ms = median_ms(self.timing.repeat, &self.device, evaluate)?;
            Ok(StepRow { grid: format!("{}x{}", grid.height, grid.width), attention: plan.to_string(), median_ms })
        };
        grids.into_iter().map(row).collect()
    }

    /// Number of text tokens.
    fn text(&self) -> usize {
        let usual = if self.architecture.input_channels().text.is_some() { USUAL_TEXT } else { 0 };
        self.timing.text.unwrap_or(usual)
    }

    /// Where the weights of blocks are while `tokens` are evaluated. Nothing is planned for a GPU.
    fn residency(&self, tokens: usize) -> Result<Residency> {
        if !self.device.is_cpu() {
            return Ok(Residency::InMemory);
        }
        let size = EvaluationSize { tokens, width: self.width, dtype: self.timing.dtype.into() };
        let plan = MemoryPlan::of_transformer(self.weights.as_ref(), size, self.timing.memory)?;
        Ok(plan.stages[0].residency)
    }
}

/// The architecture of a model of `family` with this config.json.
fn parsed(families: FamilyRegistry, family: &str, config: &Value) -> Result<Box<dyn Architecture>> {
    let known = families.get(family);
    let known = known.ok_or_else(|| ClearformError::bad_option(format!("the family {family:?} cannot be run")))?;
    Ok(known.parse(config)?)
}

/// One evaluation.
#[derive(Debug, Serialize)]
pub struct StepRow {
    /// Image tokens.
    pub grid: String,
    /// Attention plan.
    pub attention: String,
    /// Median, in milliseconds.
    pub median_ms: f64,
}

impl fmt::Display for StepRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>10}  {:<12}  median {:>10.1} ms", self.grid, self.attention, self.median_ms)
    }
}

/// The result of [`bench_model`].
#[derive(Debug, Serialize)]
pub struct StepTable {
    /// One row per grid and plan.
    pub rows: Vec<StepRow>,
}

impl fmt::Display for StepTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}
