//! The demo's chapter on what carries over: a fine-tune, a LoRA and a ControlNet that were made for the teacher, on it and
//! on a student.

use super::edges::mirrored_edges;
use crate::adapters::{open_all, registry};
use crate::args::{AdapterArg, AdapterArgs, DeviceArg, PluginSearchArgs, WeightAdapterArgs};
use crate::evaluation::EvaluationRun;
use crate::output::Output;
use crate::sources::plainly;
use crate::transfer::{TransferReport, TransferStudy, with_merged_adapters};
use clearform_runtime::{Adapters, RgbImage};
use std::path::{Path, PathBuf};

/// The plugins that open the demo's adapters.
const PLUGINS: [&str; 2] = ["lora", "controlnet"];

/// Tells it, if the plugins are at hand. `assets` holds the teacher with what was made for it.
pub fn run(
    assets: &Path,
    student: &Path,
    evaluation: EvaluationRun,
    plugins: &PluginSearchArgs,
    output: &Output,
) -> anyhow::Result<Option<TransferReport>> {
    if plugins.no_plugins || !plugins_found(plugins)? {
        output.note("the plugins are not beside the program, so the chapter on adapters is left out: `cargo build --release` puts them there");
        return Ok(None);
    }
    let open = |lora: bool, controlnet: &str| adapters(assets, lora, controlnet, plugins);
    let plan =
        clearform_portable_model::recorded_plan(student)?.map_or_else(|| "full".to_owned(), |plan| plan.to_string());
    let named = |name: &str, adapters: Adapters| (name.to_owned(), adapters);
    let study = TransferStudy {
        teacher: &assets.join("base"),
        student,
        fine_tune: Some(&assets.join("variants/pencil")),
        adapters: vec![
            named("LoRA", open(true, "")?),
            named("ControlNet", open(false, "full")?),
            named(&format!("ControlNet of {plan}"), open(false, &plan)?),
            named("LoRA and ControlNet", open(true, "full")?),
        ],
        evaluation,
        control: &|pictures: &[RgbImage]| pictures.iter().map(mirrored_edges).collect(),
        options: with_merged_adapters(plainly(None, DeviceArg::Cpu)?),
        folder: &assets.with_file_name("transfer"),
    };
    study.run(output).map(Some)
}

fn plugins_found(plugins: &PluginSearchArgs) -> anyhow::Result<bool> {
    let registry = registry(plugins)?;
    let ids: Vec<&str> = registry.plugins().iter().map(|plugin| plugin.description.id.as_str()).collect();
    Ok(PLUGINS.iter().all(|id| ids.contains(id)))
}

/// The LoRA or none, and the ControlNet with an attention or none.
fn adapters(assets: &Path, lora: bool, controlnet: &str, plugins: &PluginSearchArgs) -> anyhow::Result<Adapters> {
    let given = |there: bool, name: &str| -> Vec<AdapterArg> {
        let arg = |path: PathBuf| AdapterArg { path, ..AdapterArg::default() };
        there.then(|| arg(assets.join(name))).into_iter().collect()
    };
    open_all(&AdapterArgs {
        weights: WeightAdapterArgs {
            lora: given(lora, "lora"),
            plugins: plugins.clone(),
            ..WeightAdapterArgs::default()
        },
        adapter: Vec::new(),
        controlnet: given(!controlnet.is_empty(), "controlnet"),
        controlnet_attention: controlnet.to_owned(),
    })
}
