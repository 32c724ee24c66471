//! [`Recipe`]: how a student is trained where the user says nothing, by the size of its model.

use crate::observer::{Observer, note};
use crate::{ClearformError, ComputeDevice, Result, TrainingOptions};
use clearform_attention::TokenGrid;
use clearform_distill::{Activations, DistillError, DistillSettings, LearningRate, LossSettings, Precision, SampleSet};
use clearform_layout::{Identified, SamplingDefaults};
use clearform_models::{ImageSize, Prompt, SeparateSamples};
use clearform_runtime::{Pipeline, TransformerCheckpoint};
use std::path::Path;

/// The settings of a distillation that depend on the model. docs/distillation.md has the study they come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Samples per step.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Samples that the teacher generates.
    pub sample_count: usize,
    /// Denoising steps per sample, or the variant's if they are fewer.
    pub sample_steps: usize,
    /// Weights of the losses, and the layers whose attention outputs are compared.
    pub loss: LossSettings,
}

/// Learning rate times width: what mini-dit (64 wide) and mini-flux (192) learn best with. Adam's steps change a wider
/// layer's output by more.
const CLASS_RATE: f64 = 4e-3 * 64.0;
const TEXT_RATE: f64 = 1e-3 * 192.0;

/// Below this width the rate does not rise any further.
const NARROW: usize = 64;

/// Samples of all steps together. They teach more in many small batches than in few large ones.
const TRAINED_SAMPLES: usize = 8000;
const BATCH: usize = 2;

/// A training that ends when its held-out error is flat has at most so many times the steps of the recipe.
const MOST_STEPS: usize = 4;

/// A training takes a year at most.
const MOST_SECONDS: f64 = 365.0 * 24.0 * 3600.0;

/// Steps between images of the live report, at least, by default.
const FEWEST_STEPS: usize = 20;

/// Samples are training data, of which the number counts more than fine detail.
const SAMPLE_STEPS: usize = 20;

/// The size of a model, by which its recipe is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ModelSize {
    /// Channels of a token.
    pub width: usize,
    /// Text tokens of a prompt; 0 for a model of classes.
    pub text_tokens: usize,
    /// Parameters.
    pub parameters: usize,
}

impl ModelSize {
    /// The size of a model of so many parameters, with as many text tokens as its variant usually has.
    pub fn new(identified: &Identified, parameters: usize) -> Self {
        Self {
            width: identified.size("width").unwrap_or(0),
            text_tokens: identified.variant.defaults.text_tokens,
            parameters,
        }
    }

    /// Whether its samples run separately. Then every activation can be kept: those of a sample are a few megabytes.
    pub fn is_small(self) -> bool {
        SeparateSamples::are_worth_it(self.parameters)
    }
}

impl Recipe {
    /// The recipe for a model. The student learns the teacher's predictions, with text also its attention outputs: that
    /// carries over to prompts that it was not trained on. Without text it must attend otherwise than its teacher, and the
    /// attention loss leaves a third more error. The denoising loss pulls any student away from its teacher.
    pub fn for_model(size: ModelSize) -> Self {
        let has_text = size.text_tokens > 0;
        let rate = if has_text { TEXT_RATE } else { CLASS_RATE };
        let attention = if has_text { 0.5 } else { 0.0 };
        // The teacher's outputs are kept for a step, which in a large model takes memory.
        let every = if size.is_small() { 1 } else { 4 };
        Self {
            steps: TRAINED_SAMPLES / BATCH,
            batch: BATCH,
            learning_rate: rate / size.width.max(NARROW) as f64,
            sample_count: if has_text { 128 } else { 256 },
            sample_steps: SAMPLE_STEPS,
            loss: LossSettings { denoising: 0.0, prediction: 1.0, attention, every, layers: None },
        }
    }

    /// The recipe with what the options say.
    fn with(self, options: &TrainingOptions) -> Self {
        let every = options.attention_every.unwrap_or(self.loss.every);
        let [denoising, prediction, attention] =
            options.losses.unwrap_or([self.loss.denoising, self.loss.prediction, self.loss.attention]);
        Self {
            steps: options.steps.unwrap_or(if options.until_flat { MOST_STEPS * self.steps } else { self.steps }),
            batch: options.batch.unwrap_or(self.batch),
            learning_rate: options.learning_rate.unwrap_or(self.learning_rate),
            sample_count: options.sample_count.unwrap_or(self.sample_count),
            sample_steps: options.sample_steps.unwrap_or(self.sample_steps),
            loss: LossSettings { denoising, prediction, attention, every, layers: self.loss.layers },
        }
    }

    fn settings(&self, options: &TrainingOptions) -> DistillSettings {
        // Short runs warm up for a ninth of their steps, so that most steps train at the full rate.
        let learning_rate =
            LearningRate { peak: self.learning_rate, warmup: (self.steps / 9).min(20), ..Default::default() };
        DistillSettings {
            steps: self.steps,
            batch: self.batch,
            until_flat: options.until_flat,
            accumulation: options.accumulate,
            learning_rate,
            loss: self.loss.clone(),
            seed: options.seed,
            ..Default::default()
        }
    }
}

/// Options with everything decided.
#[derive(Debug, Clone)]
pub struct ResolvedTraining {
    /// What the user asked for.
    pub options: TrainingOptions,
    /// What is done.
    pub recipe: Recipe,
    /// The model's size.
    pub model: ModelSize,
    /// Width and height of new samples, in pixels.
    pub size: ImageSize,
    /// Their image tokens.
    pub grid: TokenGrid,
}

impl ResolvedTraining {
    /// Decides what `options` leave open, for `transformer`. New samples are as `pipeline` generates them; without one
    /// those of an earlier run are used as they are.
    ///
    /// # Errors
    /// There are no samples of an earlier run.
    pub fn new(
        options: &TrainingOptions,
        transformer: &TransformerCheckpoint,
        pipeline: Option<&Pipeline>,
    ) -> Result<Self> {
        let mut model = ModelSize::new(transformer.identified(), transformer.parameters());
        if let Some(pipeline) = pipeline.filter(|_| model.text_tokens > 0 && model.is_small()) {
            // A small model may have been trained with fewer tokens than its family has, and encodes a prompt at once.
            let text = pipeline.encode(&[Prompt::Text(String::new())])?.text;
            model.text_tokens = text.map_or(Ok(0), |text| text.dim(1))?;
        }
        let mut recipe = Recipe::for_model(model).with(options);
        let mut size = pipeline.map_or(ImageSize { height: 0, width: 0 }, Pipeline::native_size);
        if let Some(edge) = options.sample_size {
            size = ImageSize { height: edge, width: edge };
        }
        if let Some(folder) = options.samples.as_ref().filter(|folder| SampleSet::is_in(folder)) {
            let set = SampleSet::open(folder)?;
            let [width, height] = set.settings().size;
            size = ImageSize { height, width };
            recipe.sample_count = set.settings().count;
        }
        let grid = token_grid(transformer, pipeline, size)?;
        Ok(Self { options: options.clone(), recipe, model, size, grid })
    }

    /// Says which options have no effect, as the samples in `folder` are used as they are.
    pub fn note_unused(&self, folder: &Path, observer: &mut dyn Observer) {
        let TrainingOptions { sample_count, sample_steps, sample_size, .. } = self.options;
        let given = [
            (self.options.prompts.is_some(), "--prompts"),
            (sample_count.is_some(), "--sample-count"),
            (sample_steps.is_some(), "--sample-steps"),
            (sample_size.is_some(), "--sample-size"),
        ];
        for (_, flag) in given.iter().filter(|(is_given, _)| *is_given) {
            note(
                observer,
                format_args!("{flag} has no effect: the samples in {} are used as they are", folder.display()),
            );
        }
    }

    /// Whether activations are kept rather than recomputed.
    pub fn keeps_activations(&self, device: ComputeDevice) -> bool {
        self.options.keep_activations || (self.model.is_small() && device == ComputeDevice::Cpu)
    }

    /// Steps between images of the student in the live report of a training of `steps`; 0 for none.
    pub fn images_every(&self, steps: usize) -> usize {
        let by_default = if self.model.is_small() { steps.div_ceil(5).max(FEWEST_STEPS) } else { 0 };
        self.options.images_every.unwrap_or(by_default)
    }

    /// Denoising steps of a sample, for a model that usually takes `usual`.
    pub fn sample_steps(&self, usual: usize) -> usize {
        self.options.sample_steps.unwrap_or(self.recipe.sample_steps.min(usual))
    }

    /// Evaluations of the teacher for all samples, those that are held out included; 0 if there are samples already.
    pub fn sampling_evaluations(&self, defaults: SamplingDefaults) -> f64 {
        if !self.options.generates_samples() {
            return 0.0;
        }
        let steps = self.sample_steps(defaults.steps);
        ((self.recipe.sample_count + self.options.held_out) * steps * defaults.evaluations) as f64
    }

    /// Samples of all training steps together.
    pub fn trained_samples(&self) -> f64 {
        (self.recipe.steps * self.recipe.batch * self.options.accumulate) as f64
    }

    /// The settings of the training loop.
    pub fn settings(&self, device: ComputeDevice) -> DistillSettings {
        let keep = self.keeps_activations(device);
        let usual = if device == ComputeDevice::Cpu { Precision::F32 } else { Precision::Bf16 };
        DistillSettings {
            precision: self.options.precision.unwrap_or(usual),
            activations: if keep { Activations::Keep } else { Activations::Recompute },
            ..self.recipe.settings(&self.options)
        }
    }
}

/// The image tokens of an image. The pipeline knows by how much its VAE reduces an image, the transformer alone what is
/// usual in its family.
///
/// # Errors
/// The size is too large, or none of the model's.
pub fn token_grid(
    transformer: &TransformerCheckpoint,
    pipeline: Option<&Pipeline>,
    size: ImageSize,
) -> Result<TokenGrid> {
    let usual = transformer.identified().pixels_per_token();
    let pixels = (size.height * size.width) as f64;
    let tokens = pipeline.map(|pipeline| Ok::<_, ClearformError>(pipeline.initial_latents(0, 1, size)?.image_tokens));
    let token = tokens.transpose()?.map_or(usual, |tokens| (pixels / tokens.max(1) as f64).sqrt().round() as usize);
    Ok(TokenGrid::new(size.height.div_ceil(token.max(1)), size.width.div_ceil(token.max(1)))?)
}

/// More samples than any distillation draws.
const MOST_SAMPLES: usize = 1_000_000;

/// Checks the settings of a training before anything is made for it.
///
/// # Errors
/// A setting is out of range.
pub fn check_training(options: &TrainingOptions) -> Result<()> {
    let recipe = Recipe::for_model(ModelSize::default()).with(options);
    let refused = |flag: &str, reason: String| Err(ClearformError::bad_option(format!("{flag}: {reason}")));
    let fewest = usize::from(options.generates_samples());
    for (flag, number, range) in [
        ("--sample-count", recipe.sample_count, fewest..=MOST_SAMPLES),
        ("--held-out", options.held_out, 0..=MOST_SAMPLES),
        ("--sample-steps", options.sample_steps.unwrap_or(1), 1..=usize::MAX),
        ("--checkpoint-every", options.checkpoint_every, 1..=usize::MAX),
    ] {
        if number < *range.start() {
            return refused(flag, format!("expected at least {}, found {number}", range.start()));
        }
        if number > *range.end() {
            return refused(flag, format!("expected at most {}, found {number}", range.end()));
        }
    }
    if options.until_flat && options.held_out == 0 {
        return refused("--steps auto", "needs samples that are held out, but --held-out is 0".to_owned());
    }
    if options.steps.is_some() && options.time.is_some() {
        return refused("--time", "excludes --steps; give one of them".to_owned());
    }
    if options.time.is_some_and(|time| !(time > 0.0 && time <= MOST_SECONDS)) {
        return refused("--time", "expected a number of seconds above 0, a year at most".to_owned());
    }
    match recipe.settings(options).check() {
        Err(DistillError::BadSetting { key, reason }) => refused(flag_of(key), reason),
        checked => Ok(checked?),
    }
}

/// The command line's option for a setting of the training loop.
fn flag_of(setting: &'static str) -> &'static str {
    match setting {
        "steps" => "--steps",
        "batch" => "--batch",
        "accumulation" => "--accumulate",
        "loss.every" => "--attention-every",
        "loss" => "--losses",
        "learning_rate.peak" => "--lr",
        other => other,
    }
}
