//! `clearform transfer`: what carries over from a model to its linear form.

use crate::adapters;
use crate::args::TransferArgs as Args;
use crate::evaluation::EvaluationRun;
use crate::output::{CommandOutcome, Output};
use crate::report::Page;
use crate::sources::plainly;
use crate::transfer::{TransferStudy, with_merged_adapters};
use anyhow::{Context as _, bail};
use clearform_runtime::{Adapters, Pipeline, RgbImage};

pub fn run(args: &Args, output: &Output) -> anyhow::Result<CommandOutcome> {
    let options = with_merged_adapters(plainly(args.drawing.components.as_deref(), args.drawing.device)?);
    let evaluation = EvaluationRun::new(&args.drawing, &Pipeline::open(&args.teacher, options.clone())?)?;
    let controls = control_images(args, evaluation.prompts.len())?;
    let study = TransferStudy {
        teacher: &args.teacher,
        student: &args.student,
        fine_tune: args.fine_tune.as_deref(),
        adapters: conditions(args)?,
        evaluation,
        control: &|_| controls.clone(),
        options,
        folder: &args.output,
    };
    std::fs::create_dir_all(&args.output).with_context(|| format!("{}", args.output.display()))?;
    let found = study.run(output)?;
    let mut page = Page::new("What carries over to the linear form");
    found.write(&mut page, &args.output)?;
    let write = |name: &str, bytes: &[u8]| clearform_weights::write_atomically(args.output.join(name), bytes);
    write("report.json", &serde_json::to_vec_pretty(&found)?)?;
    write("report.html", page.render().as_bytes())?;
    output.result(&found)?;
    Ok(CommandOutcome::Whole)
}

/// The LoRAs, the ControlNets, and both together.
fn conditions(args: &Args) -> anyhow::Result<Vec<(String, Adapters)>> {
    let all = adapters::open_all(&args.adapters)?;
    let (weights, controlnets) = (all.only_weights(), all.only_controlnets());
    let several = !weights.is_empty() && !controlnets.is_empty();
    let named = [("LoRA", weights), ("ControlNet", controlnets)].map(|(name, adapters)| (name.to_owned(), adapters));
    let both = several.then(|| ("LoRA and ControlNet".to_owned(), all));
    Ok(named.into_iter().filter(|(_, adapters)| !adapters.is_empty()).chain(both).collect())
}

/// One picture for each prompt, or one for all of them.
fn control_images(args: &Args, prompts: usize) -> anyhow::Result<Vec<RgbImage>> {
    let pictures = adapters::control_images(&args.control_image)?;
    match (pictures.len(), args.adapters.controlnet.len()) {
        (0, 0) => Ok(pictures),
        (1, _) => Ok(vec![pictures[0].clone(); prompts]),
        (count, _) if count == prompts => Ok(pictures),
        (count, _) => {
            bail!("--control-image: expected one picture, or one for each of {prompts} prompts, found {count}")
        }
    }
}
