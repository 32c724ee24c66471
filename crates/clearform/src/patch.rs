//! [`extract_patch`] and [`apply_patch`]: distilled attention as one file, and onto other checkpoints.

use crate::adapters::AdapterOptions;
use crate::conversion_record::ConversionHistory;
use crate::observer::{Observer, Progress, Stage, note};
use crate::output_place::{Existing, check_is_no_input, prepare_tensor_file};
use crate::sources::{
    ExtraComponents, linear_plan, note_checkpoint, open_original_transformer, open_transformer, open_transformer_with,
    read_options,
};
use crate::{ClearformError, Result, SourceOptions, WrittenModel};
use clearform_attention::{AttentionPlan, Radius, learning_layer};
use clearform_convert::{AttentionPatch, BaseDifference, ConversionPlan, PatchMode, SourceHashes, source_record};
use clearform_portable_model::{CopyMode, ModelRecord, Overwrite, PatchRecord, PortableModel, StagingDir};
use clearform_runtime::{ComponentFiles, TransformerCheckpoint};
use clearform_weights::{TensorInfo, TensorSource, is_finite};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// A patch that was written.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractedPatch {
    /// Its file.
    pub patch: PathBuf,
    /// Number of its tensors.
    pub tensors: usize,
}

/// Writes the distilled attention of the portable model `model`, made from `base`, to the safetensors file `path`, which is
/// replaced if it exists and `existing` allows it.
///
/// # Errors
/// A model cannot be read, nothing was distilled, or `model` was not made from `base`.
///
/// # Example
/// ```no_run
/// let patch = clearform::extract_patch(
///     "FLUX.1-dev-clear".as_ref(),
///     "FLUX.1-dev".as_ref(),
///     "clear-r16.safetensors".as_ref(),
///     clearform::Existing::Keep,
///     &mut (),
/// )?;
/// println!("{patch}");
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn extract_patch(
    model: &Path,
    base: &Path,
    path: &Path,
    existing: Existing,
    observer: &mut dyn Observer,
) -> Result<ExtractedPatch> {
    check_is_no_input(path, &[model, base])?;
    let file = prepare_tensor_file(path, existing)?;
    let record = PortableModel::open(model)?.record().clone();
    let student = open_transformer(model)?;
    let teacher = open_original_transformer(base, model)?;
    check_base([model, base], [&student, &teacher], &record, observer)?;
    let (student, teacher) = (student.source(), teacher.source());
    let plan = record.plan()?;
    let tensors = file.write(|path| AttentionPatch::extract(&student, &teacher, &record.family, &plan, path))?;
    Ok(ExtractedPatch { patch: path.to_owned(), tensors })
}

/// Refuses a base from which the model was not made, and notes that it may be a variant of that.
pub(crate) fn check_base(
    [model, base]: [&Path; 2],
    [student, teacher]: [&TransformerCheckpoint; 2],
    record: &ModelRecord,
    observer: &mut dyn Observer,
) -> Result<()> {
    let [model, base] = [model, base].map(Path::display);
    let families = [student, teacher].map(|transformer| &transformer.identified().family);
    if families[0] != families[1] {
        return Err(ClearformError::bad_option(format!(
            "{base}: is a model of the family {}, and {model} is one of {}; expected the original that it was made from",
            families[1], families[0]
        )));
    }
    let Some(difference) = BaseDifference::largest(&student.source(), &teacher.source())? else { return Ok(()) };
    if difference.is_of_another_model() {
        let merged = match record.adapter.is_empty() {
            true => "",
            false => "; adapters were merged into the model, so its base is the original with the same adapters merged",
        };
        return Err(ClearformError::bad_option(format!(
            "{base}: is not the model that {model} was distilled from: {difference}, and distillation changes attention \
             alone{merged}"
        )));
    }
    note(
        observer,
        format_args!(
            "warning: {base} is a variant of the model that {model} was distilled from, or another number format of it: \
             {difference}; what they differ by in attention counts as distilled, too"
        ),
    );
    Ok(())
}

/// What [`apply_patch`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchOptions {
    /// A patch from [`extract_patch`], or a file published by CLEAR's authors.
    pub patch: PathBuf,
    /// The checkpoint to apply it to.
    pub checkpoint: PathBuf,
    /// Folder of the portable model to write.
    pub output: PathBuf,
    /// How the patch is applied.
    #[serde(default)]
    pub mode: PatchMode,
    /// The patch's teacher, for [`PatchMode::Shift`].
    #[serde(default)]
    pub base: Option<PathBuf>,
    /// Window radius in tokens, for a patch that does not state it.
    #[serde(default)]
    pub radius: Option<f64>,
    /// A diffusers folder with the components that the checkpoint lacks; by default that of the base.
    #[serde(default)]
    pub components: Option<PathBuf>,
    /// Components in files of their own, which take precedence.
    #[serde(default)]
    pub component_files: ComponentFiles,
    /// Whether an existing portable model is replaced.
    #[serde(default)]
    pub overwrite: Overwrite,
}

impl PatchOptions {
    /// Applies `patch` to `checkpoint`, replacing its attention, and writes the model to `output`.
    pub fn new(patch: impl Into<PathBuf>, checkpoint: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            patch: patch.into(),
            checkpoint: checkpoint.into(),
            output: output.into(),
            mode: PatchMode::default(),
            base: None,
            radius: None,
            components: None,
            component_files: ComponentFiles::default(),
            overwrite: Overwrite::default(),
        }
    }

    /// Where the components come from that the checkpoint lacks.
    fn extra_components(&self) -> ExtraComponents<'_> {
        let of_base = self.base.as_deref().filter(|base| base.is_dir());
        ExtraComponents { folder: self.components.as_deref().or(of_base), files: &self.component_files }
    }

    fn patch_record(&self, attention: &AttentionPlan) -> PatchRecord {
        let name = |path: &Path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let (mode, base) = match self.mode {
            PatchMode::Replace => ("replace", None),
            PatchMode::Shift => ("shift", self.base.as_deref().map(name)),
        };
        PatchRecord { file: name(&self.patch), attention: attention.to_string(), mode: mode.to_owned(), base }
    }

    /// Why the checkpoint is no model of the patch's family: it may be one of another family.
    fn explained(&self, error: ClearformError, patch: &AttentionPatch) -> ClearformError {
        let (Ok(found), Some(family)) = (open_transformer(&self.checkpoint), patch.family()) else { return error };
        match &found.identified().family {
            found if found == family => error,
            found => ClearformError::bad_option(format!(
                "{}: is a model of the family {found}, and the patch {} is for the family {family}; apply it to a model of \
                 that family",
                self.checkpoint.display(),
                self.patch.display()
            )),
        }
    }

    /// Refuses to add what distillation changed to a model that is distilled already.
    fn check_checkpoint(&self) -> Result<()> {
        let plan = linear_plan(&self.checkpoint)?;
        match plan.filter(|_| self.mode == PatchMode::Shift) {
            None => Ok(()),
            Some(plan) => Err(ClearformError::bad_option(format!(
                "{}: is a linear model already (attention {plan}), and shifting it would add what distillation changed \
                 twice; apply the patch to the model that it was made from",
                self.checkpoint.display()
            ))),
        }
    }
}

/// Applies a patch to a checkpoint and writes a portable model.
///
/// # Errors
/// The patch does not fit the checkpoint, a model cannot be read, or the output cannot be written;
/// [`ClearformError::Cancelled`](crate::ClearformError::Cancelled).
///
/// # Example
/// ```no_run
/// use clearform::{PatchOptions, apply_patch};
///
/// let options = PatchOptions::new("clear-r16.safetensors", "fine-tune.safetensors", "fine-tune-clear");
/// println!("{}", apply_patch(&options, &mut ())?);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn apply_patch(options: &PatchOptions, observer: &mut dyn Observer) -> Result<WrittenModel> {
    let PatchOptions { checkpoint, output, mode, overwrite, .. } = options;
    options.check_checkpoint()?;
    let patch = AttentionPatch::open(&options.patch, options.radius.map(Radius::new).transpose()?)?;
    let base = options.base.as_deref().map(open_transformer).transpose()?;
    let base = base.as_ref().map(TransformerCheckpoint::source);
    let base = base.as_ref().map(|base| base as &dyn TensorSource);
    let reading = SourceOptions { family: patch.family().map(str::to_owned), ..SourceOptions::default() };
    let reading = read_options(&reading)?;
    let transformer = open_transformer_with(checkpoint, &reading).map_err(|error| options.explained(error, &patch))?;
    note_checkpoint(transformer.checkpoint(), observer);
    check_finite(&options.patch, &patch)?;
    note_untouched(&patch, &transformer, observer);
    if let Some(base) = options.base.as_ref().filter(|_| *mode == PatchMode::Replace) {
        let what = if base.is_dir() { "only gives components" } else { "has no effect" };
        note(
            observer,
            format_args!("--base {}: {what}, since attention is replaced; --mode shift needs it", base.display()),
        );
    }
    let source = transformer.source();
    let patched = patch.apply_to(&source, *mode, base)?;
    let extra = options.extra_components();
    let components = extra.of(checkpoint).with_embedded(&transformer, &reading)?;
    components.check(transformer.identified())?;
    let folders = [checkpoint.is_dir().then_some(checkpoint.as_path()), extra.folder];
    let folders = folders.into_iter().flatten().map(Path::to_owned).collect();
    let conversion = ConversionPlan::new(transformer.identified(), patch.plan().clone())
        .made_from(checkpoint.clone())
        .with_components(folders, CopyMode::Copy)
        .with_component_data(components.open_embedded()?);
    let hashes = SourceHashes::start(transformer.checkpoint());
    let mut staging = StagingDir::begin(output, *overwrite)?;
    let mut watch = |done, total| observer.progress(&Progress::new(Stage::Writing, done as usize, total as usize));
    let report = conversion.apply(&patched, transformer.load_report(), &mut staging, &mut watch)?;
    let sources = [hashes.wait()?, vec![source_record(options.patch.clone())?]].concat();
    let mut record = conversion.record(sources)?;
    let (adapters, reports) = (&AdapterOptions::default(), &[]);
    let history = ConversionHistory { source: checkpoint, components: &components, adapters, reports, distilled: None };
    history.add_to(&mut record)?;
    // What an earlier distillation trained is replaced.
    record.distillation = None;
    record.patch = Some(options.patch_record(patch.plan()));
    conversion.write_card(&record, &staging)?;
    staging.finish(record)?;
    Ok(WrittenModel::new(output, patch.plan(), report, None))
}

/// Refuses a patch with NaN or infinity.
fn check_finite(path: &Path, patch: &AttentionPatch) -> Result<()> {
    for TensorInfo { name, .. } in patch.source().tensors() {
        if !is_finite(&patch.source().tensor(&name)?)? {
            let path = path.display();
            let reason =
                format!("{path}: tensor {name:?} has NaN or infinity: the patch is damaged, download it again");
            return Err(ClearformError::bad_option(reason));
        }
    }
    Ok(())
}

/// Says which attention the patch leaves as it is. A whole patch has all that distillation changes.
fn note_untouched(patch: &AttentionPatch, transformer: &TransformerCheckpoint, observer: &mut dyn Observer) {
    let names: BTreeSet<String> = patch.source().tensors().into_iter().map(|info| info.name).collect();
    let expected = transformer.identified().expected();
    let layers: BTreeSet<&str> = expected.iter().filter_map(|info| learning_layer(&info.name)).collect();
    let distilled = layers.iter().flat_map(|layer| transformer.architecture().distilled_layers(layer));
    let all: Vec<String> = distilled.flat_map(|layer| layer.parameters).collect();
    let untouched: Vec<&String> =
        all.iter().filter(|name| !names.contains(*name) && transformer.source().info(name).is_some()).collect();
    if let Some(first) = untouched.first() {
        note(
            observer,
            format_args!(
                "warning: the patch lacks {} of the {} tensors that distillation trains, such as {first}; they stay as \
                 they are",
                untouched.len(),
                all.len()
            ),
        );
    }
}

impl fmt::Display for ExtractedPatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} attention tensors", self.patch.display(), self.tensors)
    }
}
