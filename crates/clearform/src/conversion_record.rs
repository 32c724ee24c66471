//! [`ConversionHistory`]: what the record of a converted model says of how it came about.

use crate::Result;
use crate::adapters::{AdapterOptions, AdapterSpec};
use clearform_plugin_host::{AdapterReport, adapter_files};
use clearform_portable_model::{
    AdapterRecord, ComponentRecord, DistillationRecord, ModelRecord, PortableModel, SourceRecord,
};
use clearform_runtime::Components;
use clearform_weights::digest;
use std::path::Path;

/// What a converted model is made from.
pub(crate) struct ConversionHistory<'a> {
    /// The model that is converted.
    pub source: &'a Path,
    /// Its components.
    pub components: &'a Components,
    /// The adapters that are merged into it.
    pub adapters: &'a AdapterOptions,
    /// What became of them.
    pub reports: &'a [AdapterReport],
    /// How the result was distilled.
    pub distilled: Option<DistillationRecord>,
}

impl ConversionHistory<'_> {
    /// Adds to `record` the components in files of their own, the adapters, and the distillation. What the record of a
    /// portable model says of them stays, as far as it still holds.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn add_to(self, record: &mut ModelRecord) -> Result<()> {
        record.component = self.components.in_own_files().map(component_record).collect::<Result<_>>()?;
        let applied = self.adapters.with_effect(self.reports).adapters;
        record.adapter = applied.iter().map(adapter_record).collect::<Result<_>>()?;
        record.distillation = self.distilled;
        let Some(earlier) = earlier_record(self.source)? else { return Ok(()) };
        // Its figures hold for the weights as they were distilled, with that attention.
        if record.adapter.is_empty() && record.distillation.is_none() {
            let attention = earlier.distilled_for();
            record.distillation = earlier.distillation.map(|earlier| DistillationRecord { attention, ..earlier });
        }
        record.adapter.splice(0..0, earlier.adapter);
        record.patch = earlier.patch;
        let own: Vec<String> = record.component.iter().map(|component| component.name.clone()).collect();
        record.component.extend(earlier.component.into_iter().filter(|component| !own.contains(&component.name)));
        Ok(())
    }
}

/// The record of `source`, if it is a portable model.
fn earlier_record(source: &Path) -> Result<Option<ModelRecord>> {
    let is_portable_model = PortableModel::is_portable_model(source);
    Ok(is_portable_model.then(|| ModelRecord::read(source)).transpose()?)
}

fn component_record((name, path): (&str, &Path)) -> Result<ComponentRecord> {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(ComponentRecord { name: name.to_owned(), file, sha256: digest(path)?.sha256 })
}

fn adapter_record(adapter: &AdapterSpec) -> Result<AdapterRecord> {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut files = Vec::new();
    for path in adapter_files(&adapter.path)? {
        let name = match path.strip_prefix(&adapter.path) {
            Ok(part) if part.iter().count() > 1 => part.to_string_lossy().into_owned(),
            _ => name(&path),
        };
        files.push(SourceRecord { name, sha256: digest(&path)?.sha256 });
    }
    let sha256 = files.remove(0).sha256;
    let blocks = adapter.block_strengths.iter().cloned().collect();
    Ok(AdapterRecord { name: name(&adapter.path), sha256, strength: adapter.strength, blocks, file: files })
}
