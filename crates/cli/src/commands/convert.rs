//! `clearform convert`, the whole main job: ingest, rewrite, distil, emit.

use crate::adapters;
use crate::args::{AdapterArg, ConvertArgs};
use crate::distillation::{self, StudentSpec, TrainedStudent};
use crate::output::{CommandOutcome, Output};
use crate::sources::{identify, plainly, plan, reading, tell};
use clearform_attention::{AttentionPlan, Radius};
use clearform_convert::{ConversionPlan, ConversionReport, PatchedAttention, SourceHashes};
use clearform_distill::SampleSet;
use clearform_layout::Inspection;
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_portable_model::{AdapterRecord, CopyMode, Overwrite, StagingDir};
use clearform_runtime::{
    Adapters, Components, EDITED_PARTS, EditedTransformer, Pipeline, PipelineOptions, Transformer,
};
use clearform_weights::{Checkpoint, digest};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

pub fn run(args: &ConvertArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let attention = attention(args)?;
    if args.dry_run {
        return dry_run(args, &attention, output);
    }
    let converted = convert(args, &attention, output)?;
    output.result(&WrittenModel::new(&args.output, &attention, converted.report))?;
    Ok(CommandOutcome::Whole)
}

/// What was made.
pub struct ConvertedModel {
    /// What became of every tensor.
    pub report: ConversionReport,
    /// What training gave, where there was training.
    pub trained: Option<TrainedStudent>,
}

/// Converts; the model appears when it is whole.
pub fn convert(args: &ConvertArgs, attention: &AttentionPlan, output: &Output) -> anyhow::Result<ConvertedModel> {
    let adapters = adapters::open_weights(&args.adapters)?;
    let opened = open(args, &adapters, output)?;
    let transformer = &opened.edited.transformer;
    if !args.no_distill && args.training.samples.is_none() {
        distillation::require_components(
            args.training.components.as_deref(),
            &opened.components.missing(transformer.identified().components()),
        )?;
    }
    let replace = Overwrite::allowed_if(args.overwrite);
    let stage = match args.training.resume {
        true => StagingDir::resume(&args.output, replace)?,
        false => StagingDir::begin(&args.output, replace)?,
    };
    let trained =
        (!args.no_distill).then(|| trained(args, attention, transformer, &stage, &adapters, output)).transpose()?;
    let report = write(args, attention, &opened, stage, trained.as_ref(), output)?;
    Ok(ConvertedModel { report, trained })
}

/// The plan that the arguments ask for.
pub fn attention(args: &ConvertArgs) -> anyhow::Result<AttentionPlan> {
    match &args.attention {
        Some(text) => plan(text),
        None => Ok(AttentionPlan::clear(Radius::new(args.radius)?, args.pool)),
    }
}

fn dry_run(args: &ConvertArgs, attention: &AttentionPlan, output: &Output) -> anyhow::Result<CommandOutcome> {
    let (checkpoint, identified) = identify(&args.source, &args.reading)?;
    tell(checkpoint.source(), output);
    let inspection = Inspection::of(&identified, &checkpoint);
    output.note(format_args!("would write {} with attention {attention}", args.output.display()));
    output.result(&inspection)?;
    Ok(CommandOutcome::whole_if(inspection.complete()))
}

/// The source, and where the parts of its pipeline lie.
struct OpenSource {
    edited: EditedTransformer,
    components: Components,
}

/// Opens the source, with the adapters that are to be baked into it.
fn open(args: &ConvertArgs, adapters: &Adapters, output: &Output) -> anyhow::Result<OpenSource> {
    let reading = reading(&args.reading)?;
    let components = Components::new(&args.source, args.training.components.as_deref());
    let transformer = Transformer::open(&components.transformer(), &reading)?;
    tell(transformer.checkpoint(), output);
    let components = components.with_embedded(&transformer, &reading)?;
    let edited = adapters.apply_to(transformer, Some(&components), &reading.manifests)?;
    adapters::tell(&edited.reports, &[], output);
    Ok(OpenSource { edited, components })
}

fn trained(
    args: &ConvertArgs,
    attention: &AttentionPlan,
    transformer: &Transformer,
    stage: &StagingDir,
    adapters: &Adapters,
    output: &Output,
) -> anyhow::Result<TrainedStudent> {
    let samples = samples(args, stage, adapters, output)?;
    let start = transformer.source();
    let student = StudentSpec { plan: attention, start: &start, folder: &stage.work().join("training") };
    distillation::train(transformer, student, &samples, &args.training, output)
}

fn samples(args: &ConvertArgs, stage: &StagingDir, adapters: &Adapters, output: &Output) -> anyhow::Result<SampleSet> {
    if let Some(folder) = &args.training.samples {
        return distillation::existing_samples(folder);
    }
    let options = PipelineOptions {
        reading: reading(&args.reading)?,
        adapters: adapters.clone(),
        ..plainly(args.training.components.as_deref(), args.training.device)?
    };
    let pipeline = Pipeline::open(&args.source, options)?;
    distillation::samples(&pipeline, &args.training, &stage.work().join("samples"), output)
}

fn write(
    args: &ConvertArgs,
    attention: &AttentionPlan,
    opened: &OpenSource,
    mut stage: StagingDir,
    trained: Option<&TrainedStudent>,
    output: &Output,
) -> anyhow::Result<ConversionReport> {
    let transformer = &opened.edited.transformer;
    let (plan, source) = (conversion(args, attention, opened)?, transformer.source());
    let origins = SourceHashes::of(transformer.checkpoint());
    let bar = output.progress("writing", 0);
    let mut watch = |done: u64, all: u64| {
        bar.set_length(all);
        bar.set_position(done);
    };
    let report = match trained {
        Some(trained) => {
            let distilled = PatchedAttention::new(&source, &trained.distilled.tensors);
            plan.apply(&distilled, transformer.load_report(), &mut stage, &mut watch)?
        }
        None => plan.apply(&source, transformer.load_report(), &mut stage, &mut watch)?,
    };
    bar.finish_and_clear();
    bake_components(&opened.components, &opened.edited.edits, &mut stage)?;
    let mut record = plan.record(origins.wait()?)?;
    record.adapter = args.adapters.lora.iter().map(adapter_record).collect::<anyhow::Result<_>>()?;
    record.distillation = trained.map(|trained| trained.record.clone());
    stage.finish(record)?;
    Ok(report)
}

fn conversion(args: &ConvertArgs, attention: &AttentionPlan, opened: &OpenSource) -> anyhow::Result<ConversionPlan> {
    let placing = if args.link { CopyMode::Link } else { CopyMode::Copy };
    let folders = args.source.is_dir().then(|| args.source.clone()).into_iter();
    let folders = folders.chain(args.training.components.clone()).collect();
    Ok(ConversionPlan::new(opened.edited.transformer.identified(), attention.clone())
        .with_dtype(args.dtype.map(crate::args::DtypeArg::computed))
        .with_components(folders, placing)
        .with_parts(opened.components.embedded()?))
}

/// Writes the parts beside the transformer that adapters edit anew.
fn bake_components(components: &Components, edits: &WeightEdits, stage: &mut StagingDir) -> anyhow::Result<()> {
    for part in EDITED_PARTS.into_iter().filter(|part| edits.touch(part)) {
        let stored = components.weights(part)?;
        stage.replace_tensors(part, &PatchedSource::new(stored, edits, part, LowRankMode::Fused))?;
    }
    Ok(())
}

fn adapter_record(arg: &AdapterArg) -> anyhow::Result<AdapterRecord> {
    let name = arg.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let files = Checkpoint::open(&arg.path)?;
    let sha256 = digest(&files.files()[0].path)?.sha256;
    Ok(AdapterRecord { name, sha256, strength: arg.weight.unwrap_or(1.0) })
}

/// A model that was written.
#[derive(Debug, Serialize)]
pub struct WrittenModel {
    model: PathBuf,
    attention: String,
    #[serde(flatten)]
    report: ConversionReport,
}

impl WrittenModel {
    /// The model at `model`.
    pub fn new(model: &Path, attention: &AttentionPlan, report: ConversionReport) -> Self {
        Self { model: model.to_owned(), attention: attention.to_string(), report }
    }
}

impl fmt::Display for WrittenModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, attention, report } = self;
        let (used, skipped) = (report.load_report.used(), report.load_report.skipped().count());
        writeln!(f, "{}: attention {attention}, {} parameters", model.display(), report.parameters)?;
        write!(f, "{used} tensors used, {skipped} skipped, {} added", report.added.len())?;
        if !report.components.is_empty() {
            write!(f, "; with {}", report.components.join(", "))?;
        }
        report.component_reports.iter().try_for_each(|(part, load_report)| {
            write!(f, "\n{part}, from the same file: {} tensors used", load_report.used())?;
            write!(f, ", {} skipped", load_report.skipped().count())
        })
    }
}
