//! `clearform generate`: generates images from a prompt or a class.

use crate::adapters::{load_control_images, open_all, print_reports};
use crate::args::{DtypeArg, GenerateArgs};
use crate::output::{CommandOutcome, Output};
use crate::sources::{default_options, parse_plan, read_options};
use anyhow::bail;
use clearform_layout::SamplingDefaults;
use clearform_models::{ImageSize, Prompt};
use clearform_plugin_host::AdapterReport;
use clearform_runtime::png::{self, GenerationParameters};
use clearform_runtime::{GenerateRequest, Pipeline, PipelineOptions, PipelineStage, RgbImage};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// Generates the images and writes them as PNG files.
pub fn run(args: &GenerateArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let names = file_names(&args.output, args.batch)?;
    let options = PipelineOptions {
        plan: args.attention.as_deref().map(parse_plan).transpose()?,
        dtype: args.dtype.map(DtypeArg::as_dtype),
        reading: read_options(&args.reading)?,
        guided_channels: args.guided_channels,
        adapters: open_all(&args.adapters)?,
        ..default_options(args.components.as_deref(), args.running.device)?
    };
    let pipeline = Pipeline::open(&args.model, options)?;
    pipeline.notes().iter().for_each(|note| output.note(note));
    print_reports(pipeline.adapter_reports(), pipeline.controlnets(), output);
    let request = request(args, &pipeline)?;
    let images = generate(&pipeline, &request, output)?;
    for (index, (name, image)) in names.iter().zip(&images).enumerate() {
        png::save(name, image, &parameters(args, &request, &pipeline, index))?;
    }
    let attention = pipeline.plan().to_string();
    let adapters = pipeline.adapter_reports().to_vec();
    output.result(&SavedImages { images: names, attention, seed: args.seed, adapters })?;
    Ok(CommandOutcome::Complete)
}

/// One file name per image: `out-%03d.png` sets where the number goes; without it, several images get `-000` and so on
/// before the extension.
fn file_names(pattern: &str, batch: usize) -> anyhow::Result<Vec<PathBuf>> {
    let (before, after, digits) = match pattern.split_once("%0").or_else(|| pattern.split_once('%')) {
        Some((before, rest)) => match rest.split_once('d') {
            Some((digits, after)) if digits.is_empty() || digits.parse::<usize>().is_ok() => {
                (before, after, digits.parse().unwrap_or(1))
            }
            _ => bail!("-o {pattern:?}: expected a number pattern such as %03d"),
        },
        None if batch == 1 => return Ok(vec![PathBuf::from(pattern)]),
        None => match pattern.rsplit_once('.') {
            Some((stem, _)) => (stem, &pattern[stem.len()..], 3),
            None => (pattern, "", 3),
        },
    };
    let separator = if pattern.contains('%') { "" } else { "-" };
    Ok((0..batch).map(|index| PathBuf::from(format!("{before}{separator}{index:0digits$}{after}"))).collect())
}

fn request(args: &GenerateArgs, pipeline: &Pipeline) -> anyhow::Result<GenerateRequest> {
    let native = pipeline.native_size();
    let SamplingDefaults { steps, guidance, .. } = pipeline.transformer().identified().variant.defaults;
    let size = ImageSize { height: args.height.unwrap_or(native.height), width: args.width.unwrap_or(native.width) };
    Ok(GenerateRequest {
        prompt: args.class.map(Prompt::Class).unwrap_or(Prompt::Text(args.prompt.clone().unwrap_or_default())),
        negative: args.negative_prompt.clone().map(Prompt::Text),
        size: Some(size),
        steps: args.steps.unwrap_or(steps),
        guidance: args.guidance.unwrap_or(guidance),
        true_cfg_scale: args.true_cfg_scale,
        seed: args.seed,
        batch: args.batch,
        control_images: load_control_images(&args.control_image)?,
    })
}

fn generate(pipeline: &Pipeline, request: &GenerateRequest, output: &Output) -> anyhow::Result<Vec<RgbImage>> {
    let bar = output.progress("generating", request.steps);
    let images = pipeline.generate(request, &mut |stage| match stage {
        PipelineStage::Encoding => bar.set_message("encoding the prompt"),
        PipelineStage::Loading => bar.set_message("loading the transformer"),
        PipelineStage::Step(step) => {
            bar.set_message("");
            bar.set_position(step.done as u64);
        }
        PipelineStage::Decoding => bar.set_message("decoding"),
    })?;
    bar.finish_and_clear();
    Ok(images)
}

fn parameters(
    args: &GenerateArgs,
    request: &GenerateRequest,
    pipeline: &Pipeline,
    index: usize,
) -> GenerationParameters {
    let model = args.model.file_name().unwrap_or(args.model.as_os_str());
    GenerationParameters {
        prompt: request.prompt.to_string(),
        negative_prompt: args.negative_prompt.clone().unwrap_or_default(),
        seed: request.seed,
        steps: request.steps,
        guidance: request.guidance,
        true_cfg_scale: request.true_cfg_scale,
        size: request.size.unwrap_or(pipeline.native_size()),
        model: model.to_string_lossy().into_owned(),
        attention: pipeline.plan().to_string(),
        adapters: args.adapters.to_string(),
        number: index + 1,
        batch: request.batch,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_images_are_numbered() {
        let names = |pattern, batch| {
            let names = file_names(pattern, batch).unwrap();
            names.iter().map(|name| name.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names("out.png", 1), ["out.png"]);
        assert_eq!(names("out.png", 2), ["out-000.png", "out-001.png"]);
        assert_eq!(names("a/%03d.png", 2), ["a/000.png", "a/001.png"]);
        assert_eq!(names("x-%d.png", 1), ["x-0.png"]);
        assert!(file_names("x-%s.png", 1).is_err());
    }
}
