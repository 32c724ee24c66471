//! `clearform export`: writes the transformer to one file, with the tensor names of another layout.

use crate::args::ExportArgs;
use crate::output::{CommandOutcome, Output};
use crate::sources::{open_transformer_with, print_notes, read_options};
use clearform_convert::PatchedAttention;
use clearform_layout::Identified;
use clearform_weights::{TensorSource as _, save};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Writes the file, and states the attention plan, which the file cannot hold.
pub fn run(args: &ExportArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    check_target(args)?;
    let transformer = open_transformer_with(&args.model, &read_options(&args.reading)?.recorded(&args.model)?)?;
    print_notes(transformer.checkpoint(), output);
    let layout = layout(transformer.identified(), &args.to);
    let exported = transformer.identified().to_layout(layout, transformer.source())?.require_complete()?;
    let computed = transformer.family().computed_tensors(transformer.config(), layout)?;
    let file = PatchedAttention::new(&exported, &computed);
    let plan = clearform_portable_model::recorded_plan(&args.model)?;
    save(&args.output, &file, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    if let Some(plan) = plan {
        output.note(format_args!("the file does not record the attention plan; run it with --attention {plan}"));
    }
    output.result(&ExportSummary {
        file: args.output.clone(),
        family: transformer.identified().family.clone(),
        layout: layout.to_owned(),
        used: exported.load_report().used(),
        skipped: exported.load_report().skipped().map(|(name, reason)| format!("{name}: {reason}")).collect(),
        written: file.tensors().len(),
        bytes: std::fs::metadata(&args.output)?.len(),
    })?;
    Ok(CommandOutcome::Complete)
}

/// Refuses a target that exists, unless it may be overwritten.
fn check_target(args: &ExportArgs) -> anyhow::Result<()> {
    let path = &args.output;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => anyhow::bail!("{}: is a folder; expected a file name", path.display()),
        Ok(_) if !args.overwrite => {
            anyhow::bail!("{}: already exists; pass --overwrite to replace it or choose another name", path.display())
        }
        _ => Ok(()),
    }
}

/// The layout named `name`; `original` stands for that of the authors' code, whatever the family calls it.
fn layout<'a>(identified: &'a Identified, name: &'a str) -> &'a str {
    let of_authors = || identified.layouts().find(|layout| !["diffusers", "comfy"].contains(layout));
    match name {
        "original" => of_authors().unwrap_or(name),
        _ => name,
    }
}

#[derive(Debug, Serialize)]
struct ExportSummary {
    file: PathBuf,
    family: String,
    layout: String,
    /// Tensors of the model that the file contains.
    used: usize,
    /// Tensors of the model that the layout does not have, and why nothing is lost.
    skipped: Vec<String>,
    /// Tensors in the file.
    written: usize,
    bytes: u64,
}

impl fmt::Display for ExportSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, family, layout, used, skipped, written, bytes } = self;
        writeln!(f, "{}: {family} in layout {layout}, {written} tensors, {bytes} bytes", file.display())?;
        write!(f, "{used} tensors used, {} skipped", skipped.len())?;
        skipped.iter().try_for_each(|skipped| write!(f, "\n  skipped   {skipped}"))
    }
}
