//! `clearform export`: a transformer in one file, under the names that other programs know.

use crate::args::ExportArgs;
use crate::output::{CommandOutcome, Output};
use crate::sources::{open_as, reading, tell};
use clearform_convert::PatchedAttention;
use clearform_layout::Identified;
use clearform_weights::{TensorSource as _, save};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

pub fn run(args: &ExportArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    check_target(args)?;
    let transformer = open_as(&args.model, &reading(&args.reading)?.recorded(&args.model)?)?;
    tell(transformer.checkpoint(), output);
    let layout = layout(transformer.identified(), &args.to);
    let exported = transformer.identified().foreign(layout, transformer.source())?.complete()?;
    let computed = transformer.family().computed(transformer.config(), layout)?;
    let file = PatchedAttention::new(&exported, &computed);
    let plan = clearform_portable_model::recorded_plan(&args.model)?;
    save(&args.output, &file, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    if let Some(plan) = plan {
        output.note(format_args!("the file does not tell the attention: {plan}; give --attention where it is run"));
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
    Ok(CommandOutcome::Whole)
}

/// What stands is not replaced by accident.
fn check_target(args: &ExportArgs) -> anyhow::Result<()> {
    let path = &args.output;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => anyhow::bail!("{}: is a folder; give the name of a file", path.display()),
        Ok(_) if !args.overwrite => {
            anyhow::bail!("{}: stands already; give --overwrite to replace it, or another name", path.display())
        }
        _ => Ok(()),
    }
}

/// The layout called `asked`; `original` is that of the authors' code, whatever the family calls it.
fn layout<'a>(identified: &'a Identified, asked: &'a str) -> &'a str {
    let others = || identified.layouts().find(|name| !["diffusers", "comfy"].contains(name));
    match asked {
        "original" => others().unwrap_or(asked),
        _ => asked,
    }
}

#[derive(Debug, Serialize)]
struct ExportSummary {
    file: PathBuf,
    family: String,
    layout: String,
    /// Tensors of the model that are in the file.
    used: usize,
    /// Tensors of the model that the layout has no place for, and why that loses nothing.
    skipped: Vec<String>,
    /// Tensors of the file.
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
