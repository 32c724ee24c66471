//! The demo's transfer study: a fine-tune, a LoRA and a ControlNet that were trained for the teacher, applied to the
//! teacher and to a student.

use super::edges::mirrored_edges;
use candle_core::DType;
use clearform::evaluation::EvaluationRun;
use clearform::{
    AdapterKind, AdapterOptions, AdapterSpec, Observer, PipelineOptions, PluginOptions, RgbImage, TransferReport,
    TransferStudy,
};
use clearform_portable_model::recorded_plan;
use std::path::Path;

/// Runs the study; returns none if plugins are disabled. `assets` holds the teacher and its adapters.
pub fn run(
    assets: &Path,
    student: &Path,
    evaluation: EvaluationRun,
    plugins: &PluginOptions,
    observer: &mut dyn Observer,
) -> anyhow::Result<Option<TransferReport>> {
    if plugins.disabled {
        observer.note("plugins are disabled (--no-plugins), so the demo leaves out the adapters");
        return Ok(None);
    }
    let lora = AdapterSpec::new(assets.join("lora"), AdapterKind::Lora);
    let controlnet = AdapterSpec::new(assets.join("controlnet"), AdapterKind::ControlNet);
    let plan = recorded_plan(student)?.map_or_else(|| "full".to_owned(), |plan| plan.to_string());
    let open = |adapters: &[&AdapterSpec], plan: &str| {
        let adapters = adapters.iter().copied().cloned().collect();
        let controlnet_attention = Some(plan.to_owned());
        AdapterOptions { adapters, controlnet_attention, plugins: plugins.clone(), ..AdapterOptions::default() }.open()
    };
    let study = TransferStudy {
        teacher: &assets.join("base"),
        student,
        fine_tune: Some(&assets.join("variants/pencil")),
        adapters: vec![
            ("LoRA".to_owned(), open(&[&lora], "full")?),
            ("ControlNet".to_owned(), open(&[&controlnet], "full")?),
            (format!("ControlNet of {plan}"), open(&[&controlnet], &plan)?),
            ("LoRA and ControlNet".to_owned(), open(&[&lora, &controlnet], "full")?),
        ],
        evaluation,
        control_images: &|images: &[RgbImage]| images.iter().map(mirrored_edges).collect(),
        options: PipelineOptions { dtype: Some(DType::F32), ..PipelineOptions::default_options()? },
        folder: &assets.with_file_name("transfer"),
    };
    Ok(Some(study.run(observer)?))
}
