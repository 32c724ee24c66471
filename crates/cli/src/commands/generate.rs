//! `clearform generate`: from a prompt or a class to pictures.

use crate::adapters;
use crate::args::Generate;
use crate::opening::{plainly, plan, reading};
use crate::output::{Outcome, Output};
use anyhow::bail;
use clearform_layout::Defaults;
use clearform_models::Subject;
use clearform_plugin_host::AdapterReport;
use clearform_runtime::png::{self, Parameters};
use clearform_runtime::{Options, Pipeline, Request, Size, Stage};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

pub fn run(args: &Generate, output: &Output) -> anyhow::Result<Outcome> {
    let names = file_names(&args.output, args.batch)?;
    let options = Options {
        plan: args.running.attention.as_deref().map(plan).transpose()?,
        dtype: args.running.dtype.map(crate::args::Dtype::computed),
        reading: reading(&args.reading)?,
        guided_channels: args.guided_channels,
        adapters: adapters::open_all(&args.adapters)?,
        ..plainly(args.components.as_deref(), args.running.device)?
    };
    let pipeline = Pipeline::open(&args.model, options)?;
    pipeline.notes().iter().for_each(|note| output.note(note));
    adapters::tell(pipeline.adapter_reports(), pipeline.branches(), output);
    let request = request(args, &pipeline)?;
    let pictures = draw(&pipeline, &request, output)?;
    for (index, (name, picture)) in names.iter().zip(&pictures).enumerate() {
        png::save(name, picture, &parameters(args, &request, &pipeline, index))?;
    }
    let (attention, adapters) = (pipeline.plan().to_string(), pipeline.adapter_reports().to_vec());
    output.result(&Saved { pictures: names, attention, seed: args.seed, adapters })?;
    Ok(Outcome::Whole)
}

/// One name a picture: `out-%03d.png` numbers them, and a plain name gets a number where there are several.
fn file_names(pattern: &str, batch: usize) -> anyhow::Result<Vec<PathBuf>> {
    let (before, after, digits) = match pattern.split_once("%0").or_else(|| pattern.split_once('%')) {
        Some((before, rest)) => match rest.split_once('d') {
            Some((digits, after)) if digits.is_empty() || digits.parse::<usize>().is_ok() => {
                (before, after, digits.parse().unwrap_or(1))
            }
            _ => bail!("-o {pattern:?}: expected a number's place such as %03d"),
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

fn request(args: &Generate, pipeline: &Pipeline) -> anyhow::Result<Request> {
    let own = pipeline.own_size();
    let Defaults { steps, guidance, .. } = pipeline.transformer().identified().variant.defaults;
    let size = Size { height: args.height.unwrap_or(own.height), width: args.width.unwrap_or(own.width) };
    Ok(Request {
        subject: args.class.map(Subject::Class).unwrap_or(Subject::Prompt(args.prompt.clone().unwrap_or_default())),
        negative: args.negative_prompt.clone().map(Subject::Prompt),
        size: Some(size),
        steps: args.steps.unwrap_or(steps),
        guidance: args.guidance.unwrap_or(guidance),
        true_cfg_scale: args.true_cfg_scale,
        seed: args.seed,
        batch: args.batch,
        control_images: adapters::control_images(&args.control_image)?,
    })
}

fn draw(pipeline: &Pipeline, request: &Request, output: &Output) -> anyhow::Result<Vec<clearform_runtime::RgbImage>> {
    let bar = output.progress("drawing", request.steps);
    let pictures = pipeline.generate(request, &mut |stage| match stage {
        Stage::Encoding => bar.set_message("reading the prompt"),
        Stage::Loading => bar.set_message("loading the transformer"),
        Stage::Step(step) => {
            bar.set_message("");
            bar.set_position(step.done as u64);
        }
        Stage::Decoding => bar.set_message("decoding"),
    })?;
    bar.finish_and_clear();
    Ok(pictures)
}

fn parameters(args: &Generate, request: &Request, pipeline: &Pipeline, index: usize) -> Parameters {
    let model = args.model.file_name().unwrap_or(args.model.as_os_str());
    Parameters {
        prompt: request.subject.to_string(),
        negative_prompt: args.negative_prompt.clone().unwrap_or_default(),
        seed: request.seed,
        steps: request.steps,
        guidance: request.guidance,
        true_cfg_scale: request.true_cfg_scale,
        size: request.size.unwrap_or(pipeline.own_size()),
        model: model.to_string_lossy().into_owned(),
        attention: pipeline.plan().to_string(),
        adapters: args.adapters.to_string(),
        number: index + 1,
        batch: request.batch,
    }
}

#[derive(Debug, Serialize)]
struct Saved {
    pictures: Vec<PathBuf>,
    attention: String,
    seed: u64,
    /// What became of each weight adapter's tensors.
    adapters: Vec<AdapterReport>,
}

impl fmt::Display for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, picture) in self.pictures.iter().enumerate() {
            write!(f, "{}{}", if index > 0 { "\n" } else { "" }, picture.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_numbered_where_there_are_several() {
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
