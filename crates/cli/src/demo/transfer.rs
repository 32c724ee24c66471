//! The demo's transfer study: a fine-tune, a LoRA and a ControlNet that were trained for the teacher, applied to the
//! teacher and to a student.

use super::edges::mirrored_edges;
use crate::adapters::open_all;
use crate::args::{AdapterArg, AdapterArgs, DeviceArg, PluginSearchArgs, WeightAdapterArgs};
use crate::evaluation::EvaluationRun;
use crate::output::Output;
use crate::sources::default_options;
use crate::transfer::{TransferReport, TransferStudy, in_f32};
use clearform_portable_model::recorded_plan;
use clearform_runtime::{Adapters, RgbImage};
use std::path::Path;

/// Runs the study; returns none if plugins are disabled. `assets` holds the teacher and its adapters.
pub fn run(
    assets: &Path,
    student: &Path,
    evaluation: EvaluationRun,
    plugins: &PluginSearchArgs,
    output: &Output,
) -> anyhow::Result<Option<TransferReport>> {
    if plugins.no_plugins {
        output.note("plugins are disabled (--no-plugins), so the demo leaves out the adapters");
        return Ok(None);
    }
    let with_lora = vec![AdapterArg { path: assets.join("lora"), ..AdapterArg::default() }];
    let plan = recorded_plan(student)?.map_or_else(|| "full".to_owned(), |plan| plan.to_string());
    let open = |lora: &[AdapterArg], controlnet| open_adapters(assets, lora, controlnet, plugins);
    let study = TransferStudy {
        teacher: &assets.join("base"),
        student,
        fine_tune: Some(&assets.join("variants/pencil")),
        adapters: vec![
            ("LoRA".to_owned(), open(&with_lora, None)?),
            ("ControlNet".to_owned(), open(&[], Some("full"))?),
            (format!("ControlNet of {plan}"), open(&[], Some(&plan))?),
            ("LoRA and ControlNet".to_owned(), open(&with_lora, Some("full"))?),
        ],
        evaluation,
        control_images: &|images: &[RgbImage]| images.iter().map(mirrored_edges).collect(),
        options: in_f32(default_options(None, DeviceArg::Cpu)?),
        folder: &assets.with_file_name("transfer"),
    };
    study.run(output).map(Some)
}

/// `lora` and, if it has an attention plan, the ControlNet.
fn open_adapters(
    assets: &Path,
    lora: &[AdapterArg],
    controlnet_plan: Option<&str>,
    plugins: &PluginSearchArgs,
) -> anyhow::Result<Adapters> {
    let controlnet = controlnet_plan.map(|_| AdapterArg { path: assets.join("controlnet"), ..AdapterArg::default() });
    open_all(&AdapterArgs {
        weights: WeightAdapterArgs { lora: lora.to_vec(), plugins: plugins.clone(), ..WeightAdapterArgs::default() },
        adapter: Vec::new(),
        controlnet: controlnet.into_iter().collect(),
        controlnet_attention: controlnet_plan.unwrap_or("full").to_owned(),
    })
}
