//! Converts a checkpoint to a portable model: reads it, replaces its attention, distils it and writes it. For `convert`
//! and `demo`.

use crate::adapters::{open_weight_adapters, print_reports};
use crate::args::{AdapterArg, ConvertArgs, DtypeArg};
use crate::distillation::{self, StudentSpec, TrainedStudent};
use crate::output::Output;
use crate::sources::{default_options, print_notes, read_options};
use clearform_attention::AttentionPlan;
use clearform_convert::{ConversionPlan, ConversionReport, PatchedAttention, SourceHashes};
use clearform_distill::SampleSet;
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_portable_model::{AdapterRecord, CopyMode, Overwrite, StagingDir};
use clearform_runtime::{
    Adapters, Components, EDITABLE_COMPONENTS, EditedTransformer, Pipeline, PipelineOptions, TransformerCheckpoint,
};
use clearform_weights::{Checkpoint, digest};

/// The result of a conversion.
pub struct ConvertedModel {
    /// What became of every tensor.
    pub report: ConversionReport,
    /// The trained student, unless training was turned off.
    pub trained: Option<TrainedStudent>,
}

/// Converts a checkpoint to a portable model with attention `plan`. The output folder appears once it is complete.
///
/// # Errors
/// If the source cannot be read completely, components for distillation are missing, the output exists and may not be
/// replaced, or training or writing fails.
pub fn convert(args: &ConvertArgs, plan: &AttentionPlan, output: &Output) -> anyhow::Result<ConvertedModel> {
    let adapters = open_weight_adapters(&args.adapters)?;
    let source = OpenSource::open(args, &adapters, output)?;
    if !args.no_distill && args.training.samples.is_none() {
        let needed = source.edited.transformer.identified().components();
        distillation::require_components(&source.components.missing(needed))?;
    }
    let overwrite = Overwrite::allowed_if(args.overwrite);
    let staging = match args.training.resume {
        true => StagingDir::resume(&args.output, overwrite)?,
        false => StagingDir::begin(&args.output, overwrite)?,
    };
    let conversion = Conversion { args, plan, source, output };
    let trained = (!args.no_distill).then(|| conversion.train(&staging, &adapters)).transpose()?;
    let report = conversion.write(staging, trained.as_ref())?;
    Ok(ConvertedModel { report, trained })
}

/// The source, and where the components of its pipeline are.
struct OpenSource {
    edited: EditedTransformer,
    components: Components,
}

impl OpenSource {
    /// Opens the source, with the adapters that are merged into it.
    fn open(args: &ConvertArgs, adapters: &Adapters, output: &Output) -> anyhow::Result<Self> {
        let options = read_options(&args.reading)?;
        let components = Components::new(&args.source, args.training.components.as_deref());
        let transformer = TransformerCheckpoint::open(&components.transformer_path(), &options)?;
        print_notes(transformer.checkpoint(), output);
        let components = components.with_embedded(&transformer, &options)?;
        let edited = adapters.apply_to(transformer, Some(&components), &options.manifests)?;
        print_reports(&edited.reports, &[], output);
        Ok(Self { edited, components })
    }
}

/// A conversion under way.
struct Conversion<'a> {
    args: &'a ConvertArgs,
    plan: &'a AttentionPlan,
    source: OpenSource,
    output: &'a Output,
}

impl Conversion<'_> {
    fn train(&self, staging: &StagingDir, adapters: &Adapters) -> anyhow::Result<TrainedStudent> {
        let samples = self.samples(staging, adapters)?;
        let teacher = &self.source.edited.transformer;
        let start = teacher.source();
        let folder = staging.work().join("training");
        let student = StudentSpec { plan: self.plan, start: &start, folder: &folder, device: self.args.running.device };
        distillation::train(teacher, student, &samples, &self.args.training, self.output)
    }

    fn samples(&self, staging: &StagingDir, adapters: &Adapters) -> anyhow::Result<SampleSet> {
        let ConvertArgs { source, reading, training, running, .. } = self.args;
        if let Some(folder) = &training.samples {
            return distillation::open_samples(folder);
        }
        let options = PipelineOptions {
            reading: read_options(reading)?,
            adapters: adapters.clone(),
            ..default_options(training.components.as_deref(), running.device)?
        };
        let pipeline = Pipeline::open(source, options)?;
        distillation::prepare_samples(&pipeline, training, &staging.work().join("samples"), self.output)
    }

    fn write(&self, mut staging: StagingDir, trained: Option<&TrainedStudent>) -> anyhow::Result<ConversionReport> {
        let transformer = &self.source.edited.transformer;
        let conversion = self.conversion_plan()?;
        // Hashing the source runs in the background while the model is written.
        let hashes = SourceHashes::start(transformer.checkpoint());
        let report = self.write_transformer(&conversion, &mut staging, trained)?;
        merge_into_components(&self.source.components, &self.source.edited.edits, &mut staging)?;
        let mut record = conversion.record(hashes.wait()?)?;
        record.adapter = self.args.adapters.lora.iter().map(adapter_record).collect::<anyhow::Result<_>>()?;
        record.distillation = trained.map(|trained| trained.record.clone());
        staging.finish(record)?;
        Ok(report)
    }

    fn write_transformer(
        &self,
        conversion: &ConversionPlan,
        staging: &mut StagingDir,
        trained: Option<&TrainedStudent>,
    ) -> anyhow::Result<ConversionReport> {
        let transformer = &self.source.edited.transformer;
        let source = transformer.source();
        let bar = self.output.progress("writing", 0);
        let mut watch = |done: u64, all: u64| {
            bar.set_length(all);
            bar.set_position(done);
        };
        let report = match trained {
            Some(trained) => {
                let distilled = PatchedAttention::new(&source, &trained.distilled.tensors);
                conversion.apply(&distilled, transformer.load_report(), staging, &mut watch)?
            }
            None => conversion.apply(&source, transformer.load_report(), staging, &mut watch)?,
        };
        bar.finish_and_clear();
        Ok(report)
    }

    fn conversion_plan(&self) -> anyhow::Result<ConversionPlan> {
        let ConvertArgs { source, training, dtype, link, .. } = self.args;
        let copy_mode = if *link { CopyMode::Link } else { CopyMode::Copy };
        let folders = source.is_dir().then(|| source.clone()).into_iter();
        let folders = folders.chain(training.components.clone()).collect();
        Ok(ConversionPlan::new(self.source.edited.transformer.identified(), self.plan.clone())
            .with_dtype(dtype.map(DtypeArg::as_dtype))
            .with_components(folders, copy_mode)
            .with_component_data(self.source.components.open_embedded()?))
    }
}

/// Rewrites the components other than the transformer that adapters edit.
fn merge_into_components(components: &Components, edits: &WeightEdits, staging: &mut StagingDir) -> anyhow::Result<()> {
    for component in EDITABLE_COMPONENTS.into_iter().filter(|component| edits.affects(component)) {
        let stored = components.weights(component)?;
        staging.replace_tensors(component, &PatchedSource::new(stored, edits, component, LowRankMode::Fused))?;
    }
    Ok(())
}

fn adapter_record(arg: &AdapterArg) -> anyhow::Result<AdapterRecord> {
    let name = arg.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let checkpoint = Checkpoint::open(&arg.path)?;
    let sha256 = digest(&checkpoint.files()[0].path)?.sha256;
    Ok(AdapterRecord { name, sha256, strength: arg.strength.unwrap_or(1.0) })
}
