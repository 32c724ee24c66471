//! `clearform generate`: generates images from a prompt or a class.

use crate::args::GenerateArgs;
use crate::image_names::image_names;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{GenerateOptions, Prompt, generate, parse_plan};
use clearform_plugin_host::AdapterReport;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// Generates the images and writes them as PNG files.
pub fn run(args: &GenerateArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let names = image_names(&args.output, args.batch)?;
    let generated = generate(&options(args)?, &mut ProgressBars::default())?;
    generated.save(&names)?;
    output.result(&SavedImages {
        images: names,
        attention: generated.attention,
        seed: args.seed,
        adapters: generated.adapters,
    })?;
    Ok(CommandOutcome::Complete)
}

fn options(args: &GenerateArgs) -> anyhow::Result<GenerateOptions> {
    let prompt = args.class.map(Prompt::Class).unwrap_or(Prompt::Text(args.prompt.clone().unwrap_or_default()));
    Ok(GenerateOptions {
        negative_prompt: args.negative_prompt.clone(),
        reading: (&args.reading).into(),
        components: args.components.clone(),
        component_files: (&args.component_files).into(),
        attention: args.attention.as_deref().map(parse_plan).transpose()?,
        width: args.width,
        height: args.height,
        resolution_binning: !args.no_resolution_binning,
        steps: args.steps,
        guidance: args.guidance,
        true_cfg_scale: args.true_cfg_scale,
        guided_channels: args.guided_channels,
        seed: args.seed,
        batch: args.batch,
        adapters: args.adapters.options()?,
        control_images: args.control_image.clone(),
        device: args.running.device,
        dtype: args.dtype.map(Into::into),
        ..GenerateOptions::new(&args.model, prompt)
    })
}

#[derive(Debug, Serialize)]
struct SavedImages {
    #[serde(rename = "pictures")]
    images: Vec<PathBuf>,
    attention: String,
    seed: u64,
    /// How many tensors of each weight adapter were applied.
    adapters: Vec<AdapterReport>,
}

impl fmt::Display for SavedImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.images.iter().map(|path| path.display().to_string()).collect();
        f.write_str(&lines.join("\n"))
    }
}
