//! `clearform transfer`: measures what carries over from a model to its linear model.

use crate::adapters::{load_control_images, open_all};
use crate::args::TransferArgs;
use crate::evaluation::EvaluationRun;
use crate::output::{CommandOutcome, Output};
use crate::report::Page;
use crate::sources::default_options;
use crate::transfer::{TransferStudy, in_f32};
use anyhow::{Context as _, bail};
use clearform_runtime::{Adapters, Pipeline, RgbImage};

/// Runs the study and writes its report.
pub fn run(args: &TransferArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let options = in_f32(default_options(args.sampling.components.as_deref(), args.running.device)?);
    let evaluation = EvaluationRun::new(&args.sampling, &Pipeline::open(&args.teacher, options.clone())?)?;
    let control_images = control_images(args, evaluation.prompts.len())?;
    let study = TransferStudy {
        teacher: &args.teacher,
        student: &args.student,
        fine_tune: args.fine_tune.as_deref(),
        adapters: conditions(args)?,
        evaluation,
        control_images: &|_| control_images.clone(),
        options,
        folder: &args.output,
    };
    std::fs::create_dir_all(&args.output).with_context(|| format!("{}", args.output.display()))?;
    let report = study.run(output)?;
    let mut page = Page::new("What carries over to the linear model");
    report.write(&mut page, &args.output)?;
    let write = |name: &str, bytes: &[u8]| clearform_weights::write_atomically(args.output.join(name), bytes);
    write("report.json", &serde_json::to_vec_pretty(&report)?)?;
    write("report.html", page.render().as_bytes())?;
    output.result(&report)?;
    Ok(CommandOutcome::Complete)
}

/// The LoRAs, the ControlNets, and both together.
fn conditions(args: &TransferArgs) -> anyhow::Result<Vec<(String, Adapters)>> {
    let all = open_all(&args.adapters)?;
    let weights = all.only_weights();
    let controlnets = all.only_controlnets();
    let has_both = !weights.is_empty() && !controlnets.is_empty();
    let named = [("LoRA", weights), ("ControlNet", controlnets)].map(|(name, adapters)| (name.to_owned(), adapters));
    let both = has_both.then(|| ("LoRA and ControlNet".to_owned(), all));
    Ok(named.into_iter().filter(|(_, adapters)| !adapters.is_empty()).chain(both).collect())
}

/// One control image per prompt; a single one is repeated.
fn control_images(args: &TransferArgs, prompts: usize) -> anyhow::Result<Vec<RgbImage>> {
    let images = load_control_images(&args.control_image)?;
    match (images.len(), args.adapters.controlnet.len()) {
        (0, 0) => Ok(images),
        (1, _) => Ok(vec![images[0].clone(); prompts]),
        (count, _) if count == prompts => Ok(images),
        (count, _) => bail!("--control-image: expected one image, or one for each of {prompts} prompts, found {count}"),
    }
}
