//! [`export`]: writes the transformer to one file, with the tensor names of another layout, as safetensors or as GGUF.

use crate::observer::{Observer, note};
use crate::output_place::{OutputFile, prepare_file_ending_in};
use crate::sources::{linear_plan, note_checkpoint, open_transformer_with, read_options};
use crate::{ClearformError, Existing, Result, SourceOptions, check_is_no_input};
use candle_core::quantized::GgmlDType;
use clearform_attention::AttentionPlan;
use clearform_convert::{AttentionOverlay, GgufPlan};
use clearform_layout::Identified;
use clearform_portable_model::PLAN_METADATA;
use clearform_weights::{CONFIG_METADATA, TensorSource, block_format_named, save};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// The layout, and the ending, of GGUF files.
const GGUF: &str = "gguf";
/// Formats of blocks, by stable-diffusion.cpp's names.
const FORMATS: &str = "q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k";
/// The key in a safetensors file's metadata that transformers requires.
const SAFETENSORS_KIND: &str = "format";

/// What [`export`] does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportOptions {
    /// Portable model, diffusers folder or single file.
    pub model: PathBuf,
    /// Layout whose tensor names to use: `diffusers`, `original` (the authors'), or another layout of the family. `gguf` is
    /// that of the authors, which other programs expect in GGUF files.
    pub layout: String,
    /// File to write: safetensors, or GGUF if its name ends in .gguf.
    pub output: PathBuf,
    /// Format of GGUF for the matrices of the model's blocks, such as `q8_0` or `q4_k`; `None` keeps the stored one.
    #[serde(default)]
    pub quantize: Option<String>,
    /// How the model is read.
    #[serde(default)]
    pub reading: SourceOptions,
    /// Whether an existing file is replaced.
    #[serde(default)]
    pub replace: bool,
}

impl ExportOptions {
    /// Writes the transformer of `model` to `output` in `layout`.
    pub fn new(model: impl Into<PathBuf>, layout: &str, output: impl Into<PathBuf>) -> Self {
        let reading = SourceOptions::default();
        let (model, layout, output) = (model.into(), layout.to_owned(), output.into());
        Self { model, layout, output, quantize: None, reading, replace: false }
    }

    /// Whether GGUF is written.
    fn is_gguf(&self) -> bool {
        self.layout == GGUF || self.output.extension().is_some_and(|extension| extension == GGUF)
    }

    fn blocks(&self) -> Result<Option<GgmlDType>> {
        let Some(name) = &self.quantize else { return Ok(None) };
        if !self.is_gguf() {
            let reason = "--quantize: safetensors has no such formats; pass --to gguf, or an output that ends in .gguf";
            return Err(ClearformError::bad_option(reason));
        }
        block_format(name).map(Some)
    }
}

/// Writes the transformer to one file, whose metadata hold its config.json and the attention plan.
///
/// # Errors
/// The model is incomplete, the layout is none of its family, or the file exists or cannot be written.
///
/// # Example
/// ```no_run
/// use clearform::{ExportOptions, export};
///
/// let options = ExportOptions::new("FLUX.1-dev-clear", "comfy", "flux-clear.safetensors");
/// println!("{}", export(&options, &mut ())?);
/// # Ok::<(), clearform::ClearformError>(())
/// ```
pub fn export(options: &ExportOptions, observer: &mut dyn Observer) -> Result<ExportReport> {
    check_is_no_input(&options.output, &[&options.model])?;
    let blocks = options.blocks()?;
    let ending = if options.is_gguf() { GGUF } else { "safetensors" };
    let output = prepare_file_ending_in(ending, &options.output, Existing::replaced_if(options.replace))?;
    let reading = read_options(&options.reading)?.recorded(&options.model)?;
    let transformer = open_transformer_with(&options.model, &reading)?;
    note_checkpoint(transformer.checkpoint(), observer);
    if transformer.is_quantized() && !options.is_gguf() {
        note(observer, "the model is quantised: its tensors are written as the f32 values that they stand for");
    }
    let layout = layout(transformer.identified(), &options.layout);
    let exported = transformer.identified().to_layout(layout, transformer.source())?.require_complete()?;
    let computed = transformer.architecture().computed_tensors(layout)?;
    let file = AttentionOverlay::new(&exported, &computed);
    let plan = linear_plan(&options.model)?;
    let metadata = metadata(transformer.config(), plan.as_ref());
    if options.is_gguf() {
        write_gguf(output, &file, blocks, &transformer.identified().family, metadata, observer)?;
    } else {
        output.write(|path| save(path, &file, &metadata))?;
    }
    if let Some(plan) = plan {
        note(observer, format_args!("the file's metadata hold the plan {plan}, which other programs do not read"));
    }
    Ok(ExportReport {
        file: options.output.clone(),
        family: transformer.identified().family.clone(),
        layout: layout.to_owned(),
        used: exported.load_report().used(),
        skipped: exported.load_report().skipped().map(|(name, reason)| format!("{name}: {reason}")).collect(),
        written: file.tensors().len(),
        bytes: std::fs::metadata(&options.output)?.len(),
    })
}

/// Writes `file` as GGUF.
fn write_gguf(
    output: OutputFile,
    file: &dyn TensorSource,
    blocks: Option<GgmlDType>,
    family: &str,
    mut metadata: BTreeMap<String, String>,
    observer: &mut dyn Observer,
) -> Result<()> {
    metadata.remove(SAFETENSORS_KIND);
    let plan = GgufPlan::new(file, blocks)?;
    if let Some(blocks) = blocks {
        note(observer, plan.summary(blocks));
    }
    output.write(|path| plan.write(path, family, metadata, &mut |_| ControlFlow::Continue(()))).map(drop)
}

/// The format of blocks that `--quantize` calls `name`.
pub(crate) fn block_format(name: &str) -> Result<GgmlDType> {
    block_format_named(name)
        .ok_or_else(|| ClearformError::bad_option(format!("--quantize: expected one of {FORMATS}, found {name:?}")))
}

/// What other programs expect, and what reading the file again takes: the sizes that its tensors do not tell, and the
/// attention plan.
fn metadata(config: &Value, plan: Option<&AttentionPlan>) -> BTreeMap<String, String> {
    let ours = [Some((CONFIG_METADATA, config.to_string())), plan.map(|plan| (PLAN_METADATA, plan.to_toml()))];
    let all = [(SAFETENSORS_KIND, "pt".to_owned())].into_iter().chain(ours.into_iter().flatten());
    all.map(|(key, text)| (key.to_owned(), text)).collect()
}

/// The layout named `name`; `original` stands for that of the authors' code, whatever the family calls it.
fn layout<'a>(identified: &'a Identified, name: &'a str) -> &'a str {
    let of_authors = || identified.layouts().find(|layout| !["diffusers", "comfy"].contains(layout));
    match name {
        "original" | GGUF => of_authors().unwrap_or(name),
        _ => name,
    }
}

/// A file that was written.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// Its path.
    pub file: PathBuf,
    /// The model's family.
    pub family: String,
    /// The layout of its tensor names.
    pub layout: String,
    /// Tensors of the model that the file contains.
    pub used: usize,
    /// Tensors of the model that the layout does not have, and why nothing is lost.
    pub skipped: Vec<String>,
    /// Tensors in the file.
    pub written: usize,
    /// Its size.
    pub bytes: u64,
}

impl fmt::Display for ExportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, family, layout, used, skipped, written, bytes } = self;
        writeln!(f, "{}: {family} in layout {layout}, {written} tensors, {bytes} bytes", file.display())?;
        write!(f, "{used} tensors used, {} skipped", skipped.len())?;
        skipped.iter().try_for_each(|skipped| write!(f, "\n  skipped   {skipped}"))
    }
}
