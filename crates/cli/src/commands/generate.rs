//! `clearform generate`: generates images from a prompt or a class.

use crate::args::GenerateArgs;
use crate::image_names::image_names;
use crate::output::{CommandOutcome, Output};
use crate::progress::ProgressBars;
use clearform::{
    AttentionPlan, ClearformError, ControlNetReport, GenerateOptions, GenerationParameters, Observer, Progress, Prompt,
    generate, parse_plan, prepare_image, read_parameters,
};
use clearform_plugin_host::AdapterReport;
use serde::Serialize;
use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Generates the images and writes them as their names say.
pub fn run(args: &GenerateArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let recorded = args.from_metadata.as_deref().map(read_parameters).transpose()?;
    check_order(args)?;
    if args.prompt.is_none() && args.class.is_none() && recorded.is_none() {
        anyhow::bail!(
            "what to generate: pass a prompt, --class N for a class-conditional model, or --from-metadata FILE"
        );
    }
    let options = options(args, recorded.as_ref())?;
    output.note_seed(args.seed.unwrap_or_default());
    for text in recorded.iter().flat_map(|recorded| not_taken(recorded, args, &options)) {
        output.note(text);
    }
    // A link whose file is missing is taken as well.
    let is_taken = |path: &Path| path.symlink_metadata().is_ok();
    let names = image_names(&args.output, options.batch, |path| !args.overwrite && is_taken(path))?;
    let _folders = names.iter().map(|name| prepare_image(name)).collect::<clearform::Result<Vec<_>>>()?;
    let is_other = names.len() == 1 && names[0] != Path::new(&args.output) && is_taken(Path::new(&args.output));
    let name = is_other.then(|| format!("{} exists, so the image is {}", args.output, names[0].display()));
    let generated = generate(&options, &mut NamedImage { bars: ProgressBars::default(), name })?;
    let another = || {
        let names =
            image_names(&args.output, 1, is_taken).map_err(|error| ClearformError::BadOption(error.to_string()))?;
        output.note(format_args!("a file has appeared meanwhile, so the image is {}", names[0].display()));
        Ok(names[0].clone())
    };
    let images =
        if args.overwrite { generated.save(&names).map(|()| names)? } else { generated.save_new(&names, another)? };
    output.result(&SavedImages {
        images,
        attention: generated.attention,
        seed: options.seed,
        adapters: generated.adapters,
        controlnets: generated.controlnets,
    })?;
    Ok(CommandOutcome::Complete)
}

/// Refuses a prompt in the place of the model.
fn check_order(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = args.prompt.as_ref().filter(|prompt| Path::new(prompt).exists() && !args.model.exists());
    match model {
        Some(model) => anyhow::bail!(
            "{}: no such model, but {model} exists; the model comes before the prompt: clearform generate MODEL \"PROMPT\"",
            args.model.display()
        ),
        None => Ok(()),
    }
}

/// Says how the image is named once work begins: until then the model or a setting may be refused.
struct NamedImage {
    bars: ProgressBars,
    name: Option<String>,
}

impl Observer for NamedImage {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        if let Some(name) = self.name.take() {
            self.bars.note(&name);
        }
        self.bars.progress(progress)
    }

    fn note(&mut self, message: &str) {
        self.bars.note(message);
    }
}

/// What was given, and for the rest what `recorded` says.
fn options(args: &GenerateArgs, recorded: Option<&GenerationParameters>) -> anyhow::Result<GenerateOptions> {
    let negative = recorded.map(|recorded| recorded.negative_prompt.clone()).filter(|prompt| !prompt.is_empty());
    let seed = args.seed.map(|seed| seed.number).or(recorded.map(|recorded| recorded.seed));
    Ok(GenerateOptions {
        negative_prompt: args.negative_prompt.clone().or(negative),
        reading: (&args.reading).into(),
        components: args.components.clone(),
        component_files: (&args.component_files).into(),
        attention: match &args.attention {
            Some(text) => Some(parse_plan(text)?),
            None => recorded.and_then(recorded_plan),
        },
        width: args.width.or(recorded.map(|recorded| recorded.size.width)),
        height: args.height.or(recorded.map(|recorded| recorded.size.height)),
        resolution_binning: !args.no_resolution_binning,
        steps: args.steps.or(recorded.map(|recorded| recorded.steps)),
        guidance: args.guidance.or(recorded.and_then(|recorded| recorded.guidance)),
        true_cfg_scale: args.true_cfg_scale.or(recorded.and_then(|recorded| recorded.true_cfg_scale)).unwrap_or(1.0),
        guided_channels: args.guided_channels,
        vae_tiling: (&args.vae).into(),
        vae_precision: args.vae.vae_precision,
        seed: seed.unwrap_or_default(),
        batch: args.batch.map(|batch| batch as usize).or(recorded.map(|recorded| recorded.batch)).unwrap_or(1),
        adapters: args.adapters.options()?,
        control_images: args.control_image.clone(),
        control_mask: args.control_mask.clone(),
        device: args.running.device,
        dtype: args.dtype.map(Into::into),
        memory: (&args.memory).into(),
        ..GenerateOptions::new(&args.model, prompt(args, recorded))
    })
}

fn prompt(args: &GenerateArgs, recorded: Option<&GenerationParameters>) -> Prompt {
    let recorded = recorded.map(|recorded| recorded.prompt.clone()).unwrap_or_default();
    match (args.class, &args.prompt) {
        (Some(class), _) => Prompt::Class(class),
        (None, Some(prompt)) => Prompt::Text(prompt.clone()),
        // As a class is recorded.
        (None, None) => match recorded.strip_prefix("class ").and_then(|class| class.parse().ok()) {
            Some(class) => Prompt::Class(class),
            None => Prompt::Text(recorded),
        },
    }
}

/// The recorded plan; a plan of several policies is recorded by a summary, which cannot be read back.
fn recorded_plan(recorded: &GenerationParameters) -> Option<AttentionPlan> {
    recorded.attention.parse().ok()
}

/// What is recorded in an image and not taken from it.
fn not_taken(recorded: &GenerationParameters, args: &GenerateArgs, options: &GenerateOptions) -> Vec<String> {
    let name = args.model.file_name().unwrap_or(args.model.as_os_str()).to_string_lossy();
    let mut notes = Vec::new();
    if !recorded.model.is_empty() && recorded.model != name {
        notes.push(format!("the image was made with the model {}", recorded.model));
    }
    let adapters = options.adapters.to_string();
    if !recorded.adapters.is_empty() && recorded.adapters != adapters {
        let given = if adapters.is_empty() { "none is given" } else { &format!("{adapters} is given") };
        notes.push(format!("the image was made with {}; {given}", recorded.adapters));
    }
    // A device that cannot be opened is reported where it is used.
    let computation = options.device.open().map(|device| options.computation(&device)).unwrap_or_default();
    if recorded.computation != computation {
        let named = |settings: &str| if settings.is_empty() { "the defaults".to_owned() } else { settings.to_owned() };
        let [was, is] = [&recorded.computation, &computation].map(|settings| named(settings));
        notes.push(format!("the image was computed with {was}, and this one is with {is}: pixels may differ a little"));
    }
    if !recorded.attention.is_empty() && args.attention.is_none() && recorded_plan(recorded).is_none() {
        notes.push(format!("the image was made with attention {}, and the model's own is used", recorded.attention));
    }
    notes
}

#[derive(Debug, Serialize)]
struct SavedImages {
    #[serde(rename = "pictures")]
    images: Vec<PathBuf>,
    attention: String,
    seed: u64,
    /// How many tensors of each weight adapter were applied.
    adapters: Vec<AdapterReport>,
    /// The ControlNets.
    controlnets: Vec<ControlNetReport>,
}

impl fmt::Display for SavedImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.images.iter().map(|path| path.display().to_string()).collect();
        f.write_str(&lines.join("\n"))
    }
}
