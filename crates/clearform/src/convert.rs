//! [`convert`]: from a checkpoint to a portable model: reads it, replaces its attention, distils it and writes it.

use crate::adapters::{AdapterOptions, note_reports};
use crate::conversion_record::ConversionHistory;
use crate::export::block_format;
use crate::forecast::{Forecast, announce};
use crate::inspect::pipeline_scale;
use crate::observer::{NumberedStages, Observer, Progress, Stage, note};
use crate::output_place::prepare_folder;
use crate::recipe::{ResolvedTraining, check_training};
use crate::sources::{ExtraComponents, Opening, default_options, linear_plan, note_checkpoint, read_options};
use crate::training::{self, StudentSpec, TrainedStudent};
use crate::training_samples::{TrainingSamples, check_samples_folder, sample_settings};
use crate::window_gain::WindowGain;
use crate::{
    ClearformError, ComputeDevice, FloatDtype, Result, SourceOptions, TrainingOptions, WrittenModel, run_record,
};
use candle_core::DType;
use candle_core::quantized::GgmlDType;
use clearform_attention::{AttentionPlan, Radius};
use clearform_convert::{AttentionOverlay, ConversionPlan, ConversionReport, SourceHashes};
use clearform_distill::LossEntry;
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_portable_model::{CopyMode, Overwrite, StagingDir, check_target};
use clearform_runtime::{
    Adapters, ComponentFiles, Components, EDITABLE_COMPONENTS, EditedTransformer, Pipeline, PipelineOptions,
    TransformerCheckpoint,
};
use clearform_weights::{Dtype, TensorInfo, TensorSource as _};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Window radius where none is given, in tokens. The paper's choice for 1024 px (section 4.1).
const DEFAULT_RADIUS: f64 = 16.0;

/// What [`convert`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvertOptions {
    /// Diffusers folder, single file, or portable model.
    pub source: PathBuf,
    /// Folder of the portable model. It appears once the model is complete.
    pub output: PathBuf,
    /// How the source is read.
    #[serde(default)]
    pub reading: SourceOptions,
    /// The attention of each layer, parsed from `full` or `clear:r=R[,d=D]` (window radius R in tokens, pooled context of D
    /// x D tokens) or read by [`parse_plan`](crate::parse_plan); by default `clear:r=16`.
    #[serde(default = "default_attention")]
    pub attention: AttentionPlan,
    /// How the student is distilled; `None` replaces the attention without distilling.
    #[serde(default = "default_training")]
    pub training: Option<TrainingOptions>,
    /// A diffusers folder with the components that the source lacks.
    #[serde(default)]
    pub components: Option<PathBuf>,
    /// Components in files of their own, which take precedence.
    #[serde(default)]
    pub component_files: ComponentFiles,
    /// LoRAs that are merged into the model before it is distilled.
    #[serde(default)]
    pub adapters: AdapterOptions,
    /// Dtype of the written transformer; `None` is the source's.
    #[serde(default)]
    pub dtype: Option<FloatDtype>,
    /// Format of GGUF for the matrices of the transformer's blocks, such as `q8_0` or `q4_k`; `None` writes safetensors.
    #[serde(default)]
    pub quantize: Option<String>,
    /// How components are taken from other folders.
    #[serde(default)]
    pub copy_mode: CopyMode,
    /// Whether an existing portable model is replaced.
    #[serde(default)]
    pub overwrite: Overwrite,
    /// Where the student is trained.
    #[serde(default)]
    pub device: ComputeDevice,
}

/// The command, in the record of a run.
const COMMAND: &str = "convert";

fn default_attention() -> AttentionPlan {
    Radius::new(DEFAULT_RADIUS).map_or_else(|_| AttentionPlan::full(), |radius| AttentionPlan::clear(radius, None))
}

fn default_training() -> Option<TrainingOptions> {
    Some(TrainingOptions::default())
}

impl ConvertOptions {
    /// Converts `source` to a portable model in `output`, with the defaults of the command line.
    pub fn new(source: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            output: output.into(),
            reading: SourceOptions::default(),
            attention: default_attention(),
            training: default_training(),
            components: None,
            component_files: ComponentFiles::default(),
            adapters: AdapterOptions::default(),
            dtype: None,
            quantize: None,
            copy_mode: CopyMode::default(),
            overwrite: Overwrite::default(),
            device: ComputeDevice::default(),
        }
    }
}

impl ConvertOptions {
    fn extra_components(&self) -> ExtraComponents<'_> {
        ExtraComponents { folder: self.components.as_deref(), files: &self.component_files }
    }

    /// The options of the run that is resumed, if one is.
    fn resumed(&self, observer: &mut dyn Observer) -> Result<Option<Self>> {
        if !self.training.as_ref().is_some_and(|training| training.resume) {
            return Ok(None);
        }
        let usual = Self::new(&self.source, &self.output);
        let work = StagingDir::work_of(&self.output);
        let resumed = run_record::resumed(COMMAND, self, &usual, &work)?;
        run_record::say(resumed.as_ref(), self, &work, observer);
        Ok(resumed)
    }

    /// The format of blocks that is asked for.
    fn blocks(&self) -> Result<Option<GgmlDType>> {
        self.quantize.as_deref().map(block_format).transpose()
    }

    /// Refuses settings of the training, and places for its samples, that cannot be used.
    fn check_training(&self) -> Result<()> {
        let Some(training) = &self.training else { return Ok(()) };
        check_training(training)?;
        check_samples_folder(training, &self.output)
    }

    /// Refuses a linear model as the teacher, and says what has no effect.
    fn check_source(&self, observer: &mut dyn Observer) -> Result<()> {
        self.blocks()?;
        self.adapters.without_effect().iter().for_each(|text| note(observer, text));
        let Some(plan) = linear_plan(&self.source)? else {
            return Ok(());
        };
        let source = self.source.display();
        if self.training.is_some() {
            return Err(ClearformError::bad_option(format!(
                "{source}: is a linear model already (attention {plan}), and no teacher; convert the original, or \
                 train this one further with `clearform distill {source} --teacher ORIGINAL -o FOLDER`"
            )));
        }
        if plan != self.attention {
            note(
                observer,
                format_args!("{source}: its weights are those for attention {plan}, not for {}", self.attention),
            );
        }
        Ok(())
    }
}

/// The result of [`convert`].
#[derive(Debug, Serialize)]
pub struct ConvertReport {
    /// What was written, and what became of every tensor.
    #[serde(flatten)]
    pub model: WrittenModel,
    /// Losses of every training step; empty without distillation.
    #[serde(skip)]
    pub losses: Vec<LossEntry>,
}

/// Converts a checkpoint to a portable model. The output folder appears once it is complete.
///
/// # Errors
/// The source cannot be read completely, components for distillation are missing, the output exists and may not be
/// replaced, or training or writing fails; [`ClearformError::Cancelled`](crate::ClearformError::Cancelled).
///
/// # Example
/// ```no_run
/// use clearform::{ConvertOptions, TrainingOptions, convert};
///
/// let training = TrainingOptions { steps: Some(2000), ..TrainingOptions::default() };
/// let options = ConvertOptions {
///     attention: "clear:r=8".parse()?,
///     training: Some(training),
///     ..ConvertOptions::new("FLUX.1-dev", "FLUX.1-dev-clear")
/// };
/// let report = convert(&options, &mut ())?;
/// println!("{}", report.model);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn convert(options: &ConvertOptions, observer: &mut dyn Observer) -> Result<ConvertReport> {
    let resumed = options.resumed(observer)?;
    let options = resumed.as_ref().unwrap_or(options);
    let observer = &mut NumberedStages::of_conversion(observer, options.training.as_ref());
    options.check_training()?;
    options.check_source(observer)?;
    let adapters = options.adapters.open()?;
    let source = OpenSource::open(options, &adapters, observer)?;
    if options.training.as_ref().is_some_and(TrainingOptions::generates_samples) {
        source.require_components()?;
    }
    let staging = match options.training.as_ref().is_some_and(|training| training.resume) {
        true => StagingDir::resume(&options.output, options.overwrite)?,
        false => StagingDir::begin(&options.output, options.overwrite)?,
    };
    let _kept = options.training.is_some().then(|| run_record::keep(COMMAND, options, staging.work())).transpose()?;
    let mut conversion = Conversion { options, source, observer };
    let trained = match &options.training {
        Some(training) => Some(conversion.train(training, &staging, &adapters)?),
        None => {
            conversion.source.gain(&options.attention)?.announce(conversion.observer);
            None
        }
    };
    let report = conversion.write(staging, trained.as_ref())?;
    let record = trained.as_ref().map(|trained| &trained.record);
    let model = WrittenModel::new(&options.output, &options.attention, report, record);
    Ok(ConvertReport { model, losses: trained.map(|trained| trained.distilled.entries).unwrap_or_default() })
}

/// Tells `observer` what the conversion would gain and about what it would take. Writes nothing. Returns the options that it
/// would go by: those that a resumed run was begun with.
///
/// # Errors
/// As [`convert`], before anything is computed.
pub fn preview_conversion(options: &ConvertOptions, observer: &mut dyn Observer) -> Result<ConvertOptions> {
    let resumed = options.resumed(observer)?;
    let options = resumed.as_ref().unwrap_or(options);
    options.check_training()?;
    options.check_source(observer)?;
    check_target(&options.output, options.overwrite)?;
    let parent = options.output.parent().filter(|parent| !parent.as_os_str().is_empty());
    drop(prepare_folder(parent.unwrap_or(Path::new(".")))?);
    let adapters = options.adapters.open()?;
    let source = OpenSource::open(options, &adapters, observer)?;
    let mut conversion = Conversion { options, source, observer };
    let pipeline = conversion.pipeline(&adapters)?;
    match &options.training {
        Some(training) if pipeline.is_some() || !training.generates_samples() => {
            let training = conversion.forecast(training, pipeline.as_ref())?;
            if let Some(pipeline) = &pipeline {
                sample_settings(pipeline, &training, conversion.observer)?;
            }
        }
        training => {
            conversion.source.gain(&options.attention)?.announce(conversion.observer);
            if training.is_some() {
                conversion.source.require_components()?;
            }
        }
    }
    Ok(options.clone())
}

/// The source, and where the components of its pipeline are.
struct OpenSource {
    edited: EditedTransformer,
    components: Components,
}

impl OpenSource {
    /// Opens the source, with the adapters that are merged into it.
    fn open(options: &ConvertOptions, adapters: &Adapters, observer: &mut dyn Observer) -> Result<Self> {
        let reading = read_options(&options.reading)?;
        let components = options.extra_components().of(&options.source);
        let transformer = TransformerCheckpoint::open(&components.transformer_path(), &reading)?;
        note_checkpoint(transformer.checkpoint(), observer);
        transformer.identified().notes.iter().for_each(|text| note(observer, text));
        let components = components.with_embedded(&transformer, &reading)?;
        components.check(transformer.identified())?;
        let components = components.with_checked_tensors(transformer.identified())?;
        components.notes().iter().for_each(|text| note(observer, text));
        let unused = components.unused_note(transformer.identified().all_components());
        unused.iter().for_each(|text| note(observer, text));
        let edited = adapters.apply_to(transformer, Some(&components), &reading.manifests)?;
        note_reports(&edited.reports, &[], observer);
        if options.dtype.is_none() && edited.transformer.is_quantized() {
            note(
                observer,
                "the source is quantised: the transformer is written in bf16; --dtype f32 keeps its exact values",
            );
        }
        let is_fp8 = |info: &TensorInfo| matches!(info.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2);
        if options.dtype.is_none() && edited.transformer.checkpoint().tensors().iter().any(is_fp8) {
            note(observer, "the source is in fp8: the transformer is written in bf16");
        }
        edited.transformer.check_plan(&options.attention)?;
        Ok(Self { edited, components })
    }

    /// The dtype to write floating-point tensors in: `given`, or of a quantised source bf16, which it is computed in; `None`
    /// is the source's.
    fn written_dtype(&self, given: Option<FloatDtype>) -> Option<DType> {
        let is_quantized = self.edited.transformer.is_quantized();
        given.map(Into::into).or(is_quantized.then_some(DType::BF16))
    }

    /// What `plan` gains at the size that the model was trained on.
    fn gain(&self, plan: &AttentionPlan) -> Result<WindowGain> {
        let identified = self.edited.transformer.identified();
        WindowGain::at_native_size(identified, pipeline_scale(&self.components, identified), plan)
    }

    /// Checks that the components are there that generate samples.
    fn require_components(&self) -> Result<()> {
        let needed = self.edited.transformer.identified().components();
        training::require_components(&self.components.missing(needed))
    }
}

/// A conversion under way.
struct Conversion<'a> {
    options: &'a ConvertOptions,
    source: OpenSource,
    observer: &'a mut dyn Observer,
}

impl Conversion<'_> {
    fn train(
        &mut self,
        training: &TrainingOptions,
        staging: &StagingDir,
        adapters: &Adapters,
    ) -> Result<TrainedStudent> {
        let pipeline = self.pipeline(adapters)?;
        let training = self.forecast(training, pipeline.as_ref())?;
        let teacher = &self.source.edited.transformer;
        let samples = TrainingSamples::gather(pipeline, &training, staging.work(), self.observer)?;
        let folder = staging.work().join("training");
        let plan = &self.options.attention;
        let student = StudentSpec { plan, earlier: None, folder: &folder, device: self.options.device };
        training::train(teacher, student, &samples, &training, self.observer)
    }

    /// Decides what the options leave open, and tells the observer what the training gains and takes.
    fn forecast(&mut self, training: &TrainingOptions, pipeline: Option<&Pipeline>) -> Result<ResolvedTraining> {
        let teacher = &self.source.edited.transformer;
        let training = ResolvedTraining::new(training, teacher, pipeline)?;
        let device = self.options.device;
        announce(
            &Forecast::new(teacher, &self.options.attention, &training, device)?,
            &training,
            device,
            self.observer,
        )?;
        Ok(training)
    }

    /// The teacher's pipeline; `None` if a component of it is missing.
    fn pipeline(&self, adapters: &Adapters) -> Result<Option<Pipeline>> {
        let OpenSource { edited, components } = &self.source;
        if !components.missing(edited.transformer.identified().components()).is_empty() {
            return Ok(None);
        }
        let ConvertOptions { device, training, .. } = self.options;
        let memory = training.as_ref().map(|training| training.memory).unwrap_or_default();
        let components_of = self.options.extra_components();
        let opened = default_options(Opening { components: components_of, device: *device, memory })?;
        let options = PipelineOptions { adapters: adapters.clone(), ..opened };
        Ok(Some(Pipeline::of_opened(components.clone(), edited.clone(), options)?))
    }

    fn write(&mut self, mut staging: StagingDir, trained: Option<&TrainedStudent>) -> Result<ConversionReport> {
        let conversion = self.conversion_plan()?;
        // Hashing the source runs in the background while the model is written.
        let hashes = SourceHashes::start(self.source.edited.transformer.checkpoint());
        let report = self.write_transformer(&conversion, &mut staging, trained)?;
        merge_into_components(&self.source.components, &self.source.edited.edits, &mut staging)?;
        let mut record = conversion.record(hashes.wait()?)?;
        let history = ConversionHistory {
            source: &self.options.source,
            components: &self.source.components,
            adapters: &self.options.adapters,
            reports: &self.source.edited.reports,
            distilled: trained.map(|trained| trained.record.clone()),
        };
        history.add_to(&mut record)?;
        conversion.write_card(&record, &staging)?;
        if let Some(trained) = trained {
            trained.write_report(&staging)?;
        }
        staging.finish(record)?;
        Ok(report)
    }

    fn write_transformer(
        &mut self,
        conversion: &ConversionPlan,
        staging: &mut StagingDir,
        trained: Option<&TrainedStudent>,
    ) -> Result<ConversionReport> {
        let transformer = &self.source.edited.transformer;
        // What is merged is rounded once, to what is written.
        let wide = self.options.dtype.filter(|dtype| *dtype == FloatDtype::F32).map(Into::into);
        let source = transformer.source_in(wide);
        let observer = &mut *self.observer;
        let mut watch =
            |done: u64, total: u64| observer.progress(&Progress::new(Stage::Writing, done as usize, total as usize));
        Ok(match trained {
            Some(trained) => {
                let distilled = AttentionOverlay::new(&source, &trained.distilled.tensors);
                let mut report = conversion.apply(&distilled, transformer.load_report(), staging, &mut watch)?;
                let learned = trained.distilled.tensors.iter().map(|(name, _)| name);
                report.added.extend(learned.filter(|name| source.info(name).is_none()).map(str::to_owned));
                report
            }
            None => conversion.apply(&source, transformer.load_report(), staging, &mut watch)?,
        })
    }

    fn conversion_plan(&self) -> Result<ConversionPlan> {
        let ConvertOptions { source, attention, copy_mode, .. } = self.options;
        let folders = source.is_dir().then(|| source.clone()).into_iter();
        let folders = folders.chain(self.options.components.clone()).collect();
        Ok(ConversionPlan::new(self.source.edited.transformer.identified(), attention.clone())
            .made_from(source.clone())
            .with_dtype(self.source.written_dtype(self.options.dtype))
            .quantized(self.options.blocks()?)
            .with_components(folders, *copy_mode)
            .with_component_data(self.source.components.open_embedded()?))
    }
}

/// Rewrites the components other than the transformer that adapters edit.
fn merge_into_components(components: &Components, edits: &WeightEdits, staging: &mut StagingDir) -> Result<()> {
    for component in EDITABLE_COMPONENTS.into_iter().filter(|component| edits.affects(component)) {
        let stored = components.weights(component)?;
        staging.replace_tensors(component, &PatchedSource::new(stored, edits, component, LowRankMode::Fused))?;
    }
    Ok(())
}
