//! [`TrainingSamples`]: what the teacher generates for a training and for its verdict.

use crate::evaluation::prompts_or_classes;
use crate::observer::{Observer, Progress, Stage, note};
use crate::prompt_notes::{foreign_syntax_notes, note_truncated, texts};
use crate::recipe::ResolvedTraining;
use crate::{ClearformError, Result, TrainingOptions};
use candle_core::Tensor;
use clearform_distill::{
    ClassifierFree, Precision, SampleSet, SampleSettings, SampleTeacher, SamplesDone, SamplingSpec, weights_fingerprint,
};
use clearform_models::{BatchSpec, GuidanceKind, ImageSize, Prompt};
use clearform_portable_model::{StagingDir, surrounding_model};
use clearform_runtime::{Pipeline, default_dtype};
use clearform_weights::ProductPrecision;
use std::collections::BTreeSet;
use std::path::Path;

/// Image tokens of a batch of samples: 16 images of 256 px or one of 1024 px with FLUX's VAE. A larger batch would take
/// more memory and be no faster.
const BATCH_TOKENS: usize = 4096;

/// Prompts for samples where the user gives none.
const DEFAULT_PROMPTS: &str = include_str!("prompts.txt");

/// Of this many prompts or more, every [`HELD_OUT_STRIDE`]th is held out; of fewer, training needs all.
const ENOUGH_PROMPTS: usize = 16;
const HELD_OUT_STRIDE: usize = 8;

/// Added to the seed of samples that are held out, so that their noise is not that of a training sample.
const HELD_OUT_SEED: u64 = 1_000_000;

/// The samples of a training, and those on which the student is judged.
pub struct TrainingSamples {
    /// Trained on.
    pub samples: SampleSet,
    /// Not trained on; `None` if none were asked for or none can be generated.
    pub held_out: Option<HeldOutSamples>,
}

/// Samples that are not trained on, and what a student generates its own with.
pub struct HeldOutSamples {
    /// The samples.
    pub set: SampleSet,
    /// How they were generated.
    pub sampling_spec: SamplingSpec,
    /// The teacher's pipeline.
    pub pipeline: Pipeline,
}

/// Refuses a folder of samples that would be taken away with the work on `output`, or that holds something else.
///
/// # Errors
/// It lies in `output` or its work folder or in a portable model, or has other files.
pub fn check_samples_folder(training: &TrainingOptions, output: &Path) -> Result<()> {
    let Some(folder) = &training.samples else { return Ok(()) };
    let refused = |reason: String| {
        Err(ClearformError::bad_option(format!("--samples {}: {reason}; choose another folder", folder.display())))
    };
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for taken in [output.to_owned(), StagingDir::work_of(output)] {
        if absolute(folder).starts_with(absolute(&taken)) {
            return refused(format!("is in {}, whose files do not stay", taken.display()));
        }
    }
    if let Some(model) = surrounding_model(&folder.join("samples")) {
        return refused(format!("is in the portable model {}, whose files are recorded", model.display()));
    }
    if folder.is_file() {
        return refused("is a file".to_owned());
    }
    let is_empty = std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
    if !is_empty && !SampleSet::is_in(folder) {
        return refused("holds other files".to_owned());
    }
    Ok(())
}

impl TrainingSamples {
    /// Opens the samples of an earlier run, or generates them in `work`. A `pipeline` is needed to generate.
    ///
    /// # Errors
    /// As [`prepare_samples`] and [`open_samples`].
    pub fn gather(
        pipeline: Option<Pipeline>,
        training: &ResolvedTraining,
        work: &Path,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        let folder = training.options.samples.clone().unwrap_or_else(|| work.join("samples"));
        // Those of an earlier run may have been interrupted.
        let are_complete =
            training.options.samples.is_some() && SampleSet::is_in(&folder) && SampleSet::open(&folder)?.is_complete();
        if are_complete {
            training.note_unused(&folder, observer);
        }
        let named = |pipeline: Pipeline| Ok::<_, ClearformError>((sample_teacher(&pipeline)?, pipeline));
        let pipeline = pipeline.map(named).transpose()?;
        let samples = match &pipeline {
            Some((teacher, pipeline)) if !are_complete => {
                generate_samples(pipeline, teacher, training, &folder, observer)?
            }
            _ => open_samples(&folder)?,
        };
        if let Some((teacher, pipeline)) = &pipeline {
            check_fit(&samples, pipeline, &folder)?;
            note_teacher(&samples, teacher, &folder, observer);
        }
        let folder = folder.join(format!("held-out-{}", training.options.held_out));
        let held_out = match pipeline {
            _ if training.options.held_out == 0 => None,
            Some((teacher, pipeline)) if !pipeline.takes_control() => {
                Some(HeldOutSamples::prepare(pipeline, &teacher, training, &samples, &folder, observer)?)
            }
            _ => {
                note(observer, "no verdict: the pipeline cannot generate samples to hold out");
                None
            }
        };
        Ok(Self { samples, held_out })
    }
}

impl HeldOutSamples {
    fn prepare(
        pipeline: Pipeline,
        teacher: &SampleTeacher,
        training: &ResolvedTraining,
        samples: &SampleSet,
        folder: &Path,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        // The student is judged beside its own teacher, also where another drew the samples that it is trained on.
        let is_of_others = |recorded: &SampleTeacher| recorded.has_other_weights(teacher);
        let folder = match SampleSet::open(folder).ok().and_then(|set| set.teacher().map(is_of_others)) {
            Some(true) => &folder.with_added_extension(short_name(teacher)),
            _ => folder,
        };
        // Those of an earlier run stay what they are, whatever prompts this one has.
        let set = match SampleSet::open(folder) {
            Ok(set) => set,
            Err(_) => SampleSet::create_for(folder, held_out_settings(&pipeline, training, samples)?, teacher)?,
        };
        set.check_weights(teacher)?;
        // The student is measured against them.
        let text_ids = fill(&pipeline, &set, ProductPrecision::Full, observer)?;
        let sampling_spec = sampling_spec(&pipeline, set.settings(), text_ids)?;
        Ok(Self { set, sampling_spec, pipeline })
    }

    /// Width and height of the samples.
    pub fn size(&self) -> ImageSize {
        let [width, height] = self.set.settings().size;
        ImageSize { height, width }
    }
}

/// Samples like those of `samples`, of prompts that they do not have if there are any, and with other noise.
fn held_out_settings(pipeline: &Pipeline, training: &ResolvedTraining, samples: &SampleSet) -> Result<SampleSettings> {
    let trained = samples.settings();
    let (_, held_out) = prompts(pipeline, training)?;
    let unseen: Vec<Prompt> = held_out.iter().filter(|prompt| !trained.prompts.contains(prompt)).cloned().collect();
    let prompts = if unseen.is_empty() { held_out } else { unseen };
    let (count, seed) = (training.options.held_out, trained.seed + HELD_OUT_SEED);
    Ok(SampleSettings { prompts, count, seed, ..trained.clone() })
}

/// The samples in `folder`; those that are missing there are generated.
///
/// # Errors
/// If the folder holds samples of other settings, or the transformer needs a control image.
pub fn prepare_samples(
    pipeline: &Pipeline,
    options: &TrainingOptions,
    folder: &Path,
    observer: &mut dyn Observer,
) -> Result<SampleSet> {
    let training = ResolvedTraining::new(options, pipeline.transformer(), Some(pipeline))?;
    generate_samples(pipeline, &sample_teacher(pipeline)?, &training, folder, observer)
}

fn generate_samples(
    pipeline: &Pipeline,
    teacher: &SampleTeacher,
    training: &ResolvedTraining,
    folder: &Path,
    observer: &mut dyn Observer,
) -> Result<SampleSet> {
    let settings = sample_settings(pipeline, training, observer)?;
    let set = SampleSet::create_for(folder, settings, teacher)?;
    if set.is_complete() {
        return Ok(set);
    }
    if pipeline.takes_control() {
        let reason =
            "the transformer needs a control image, but samples are generated from prompts alone; pass --samples";
        return Err(ClearformError::bad_option(reason));
    }
    let products = training.options.precision.map_or(ProductPrecision::Full, Precision::products);
    fill(pipeline, &set, products, observer)?;
    Ok(set)
}

/// The model of `pipeline`, which users call by the last part of its path.
fn sample_teacher(pipeline: &Pipeline) -> Result<SampleTeacher> {
    let path = pipeline.transformer().checkpoint().path();
    let model = if path.ends_with("transformer") { path.parent().unwrap_or(path) } else { path };
    let model = model.canonicalize().unwrap_or_else(|_| model.to_owned());
    let name = model.file_name().unwrap_or(model.as_os_str()).to_string_lossy().into_owned();
    let weights = weights_fingerprint(&pipeline.transformer().source())?;
    let encoders = pipeline.text_encoders()?;
    let encoders = encoders.iter().map(|encoder| weights_fingerprint(encoder.as_ref()));
    let encoders = encoders.collect::<clearform_distill::Result<Vec<_>>>()?.join("-");
    Ok(SampleTeacher { name, weights, encoders })
}

/// Refuses samples of classes for a model of text and the reverse, of classes that it does not have, and of other latents.
fn check_fit(samples: &SampleSet, pipeline: &Pipeline, folder: &Path) -> Result<()> {
    let SampleSettings { prompts, size: [width, height], .. } = samples.settings();
    let refused = |reason: String| {
        let folder = folder.display();
        Err(ClearformError::bad_option(format!("{folder}: {reason}: another model drew them; choose another folder")))
    };
    let are_classes = matches!(prompts.first(), Some(Prompt::Class(_)));
    if are_classes != pipeline.class_count().is_some() {
        let [found, expected] = if are_classes { ["classes", "prompts"] } else { ["prompts", "classes"] };
        return refused(format!("its samples are of {found}, and this model takes {expected}"));
    }
    let is_beyond = |prompt: &&Prompt| matches!((prompt, pipeline.class_count()), (Prompt::Class(class), Some(count)) if *class >= count);
    if let Some(class) = prompts.iter().find(is_beyond) {
        let last = pipeline.class_count().unwrap_or_default().saturating_sub(1);
        return refused(format!("it has samples of {class}, and this model has 0 to {last}"));
    }
    let latents = pipeline.initial_latents(0, 1, ImageSize { height: *height, width: *width })?;
    Ok(samples.check_latents(&latents.tensor.dims()[1..])?)
}

/// A few letters that tell models with these weights and text encoders from others.
fn short_name(teacher: &SampleTeacher) -> String {
    let start = |hash: &str| hash.chars().take(8).collect::<String>();
    [&teacher.weights, &teacher.encoders].map(|hash| start(hash)).join("-")
}

fn note_teacher(samples: &SampleSet, teacher: &SampleTeacher, folder: &Path, observer: &mut dyn Observer) {
    let Some(recorded) = samples.teacher() else { return };
    let weights = match recorded.has_other_weights(teacher) {
        true => " with other weights or text encoders; the student is judged on samples of its own teacher",
        false => "",
    };
    if recorded.name != teacher.name || !weights.is_empty() {
        note(observer, format_args!("the samples in {} were drawn by {}{weights}", folder.display(), recorded.name));
    }
}

/// Generates what is missing in `set`. Returns the position ids of the text tokens, if the model takes them.
fn fill(
    pipeline: &Pipeline,
    set: &SampleSet,
    products: ProductPrecision,
    observer: &mut dyn Observer,
) -> Result<Option<Tensor>> {
    let text_ids = encode_prompts(pipeline, set, observer)?;
    if !set.is_complete() {
        let teacher = pipeline.load_teacher(products)?;
        let spec = sampling_spec(pipeline, set.settings(), text_ids.clone())?;
        let mut watch = |SamplesDone { done, total, fraction }| {
            observer.progress(&Progress { fraction, ..Progress::new(Stage::Samples, done, total) })
        };
        let generated = set.generate_watched(teacher.as_ref(), &spec, &mut watch);
        generated.map_err(|error| ClearformError::from(error).or_damage(|| pipeline.damage()))?;
    }
    Ok(text_ids)
}

/// Encodes the prompts of `set` into its folder. Returns the position ids of the text tokens, if the model takes them.
fn encode_prompts(pipeline: &Pipeline, set: &SampleSet, observer: &mut dyn Observer) -> Result<Option<Tensor>> {
    let mut text_ids = None;
    let mut too_long = Vec::new();
    let [width, height] = set.settings().size;
    set.encode(&mut |prompts| {
        let (encoded, truncated) = pipeline.encode_and_count(prompts)?;
        too_long.extend(truncated);
        text_ids = Some(encoded.text_ids.clone());
        let batch_spec = BatchSpec { size: ImageSize { height, width }, batch: prompts.len(), guidance: 0.0 };
        pipeline.add_size_conditions(&encoded, batch_spec)
    })?;
    note_truncated(&too_long, set.settings().prompts.len().min(set.settings().count), observer);
    match text_ids {
        Some(text_ids) => Ok(text_ids),
        // All prompts were encoded by an earlier run.
        None => Ok(pipeline.encode(&set.settings().prompts[..1])?.text_ids),
    }
}

/// Opens samples from an earlier run.
///
/// # Errors
/// If some of them are missing.
pub fn open_samples(folder: &Path) -> Result<SampleSet> {
    let set = SampleSet::open(folder)?;
    if !set.is_complete() {
        let reason = format!("{}: the samples are incomplete; rerun the command that generated them", folder.display());
        return Err(ClearformError::bad_option(reason));
    }
    Ok(set)
}

/// How the samples of `training` are generated. Reads the prompts; generates nothing.
///
/// # Errors
/// The prompts cannot be read, or are none for the model.
pub fn sample_settings(
    pipeline: &Pipeline,
    training: &ResolvedTraining,
    observer: &mut dyn Observer,
) -> Result<SampleSettings> {
    let defaults = pipeline.transformer().identified().variant.defaults;
    let (prompts, held_out) = prompts(pipeline, training)?;
    let unseen = held_out.iter().filter(|prompt| !prompts.contains(prompt)).cloned();
    let all: Vec<Prompt> = prompts.iter().cloned().chain(unseen).collect();
    foreign_syntax_notes(&texts(&all)).iter().for_each(|text| note(observer, text));
    let are_unseen = !prompts.contains(&held_out[0]);
    if training.options.prompts.is_some() && are_unseen {
        note(observer, format_args!("{} of {} prompts are held out for the verdict", held_out.len(), all.len()));
    } else if training.options.held_out > 0 && !are_unseen && matches!(all[0], Prompt::Text(_)) {
        note(
            observer,
            format_args!(
                "{} prompts are too few to hold some out: the verdict is on prompts that are trained on, with other noise",
                all.len()
            ),
        );
    }
    let size = training.size;
    let latents = pipeline.initial_latents(0, 1, size)?;
    let embeds_guidance = pipeline.embeds_guidance()?;
    let scale = defaults.guidance;
    let classifier_free = match pipeline.guidance_kind().clone() {
        guidance_kind if !guidance_kind.guides(scale) => None,
        GuidanceKind::ClassifierFree { unconditional, channels } => {
            Some(ClassifierFree { scale, unconditional, channels })
        }
        GuidanceKind::Embedded => None,
    };
    Ok(SampleSettings {
        prompts,
        count: training.recipe.sample_count,
        batch: (BATCH_TOKENS / latents.image_tokens).max(1),
        size: [size.width, size.height],
        steps: training.sample_steps(defaults.steps),
        guidance: embeds_guidance.then_some(defaults.guidance),
        classifier_free,
        seed: training.options.seed,
    })
}

/// The prompts to train on, and those to judge on. A class-conditional model is judged on the classes that it is trained
/// on, with other noise, and so is a model with few prompts.
fn prompts(pipeline: &Pipeline, training: &ResolvedTraining) -> Result<(Vec<Prompt>, Vec<Prompt>)> {
    let path = training.options.prompts.as_deref();
    let mut all = prompts_or_classes(pipeline, path, DEFAULT_PROMPTS, training.recipe.sample_count)?;
    // A text that is given twice would be trained on and held out. Classes may be repeated to be drawn more often.
    let mut known = BTreeSet::new();
    all.retain(|prompt| matches!(prompt, Prompt::Class(_)) || known.insert(prompt.to_string()));
    Ok(split_prompts(all, training.options.held_out))
}

fn split_prompts(all: Vec<Prompt>, held_out: usize) -> (Vec<Prompt>, Vec<Prompt>) {
    if held_out == 0 || all.len() < ENOUGH_PROMPTS || matches!(all[0], Prompt::Class(_)) {
        return (all.clone(), all);
    }
    let is_held_out =
        |index: usize| index % HELD_OUT_STRIDE == HELD_OUT_STRIDE / 2 && index / HELD_OUT_STRIDE < held_out;
    let (held_out, trained): (Vec<_>, Vec<_>) = all.into_iter().enumerate().partition(|(index, _)| is_held_out(*index));
    let prompts = |numbered: Vec<(usize, Prompt)>| numbered.into_iter().map(|(_, prompt)| prompt).collect();
    (prompts(trained), prompts(held_out))
}

/// Samples are generated in f32 on a CPU, and in bf16 on a GPU, whose attention kernels take 16-bit values.
fn sampling_spec(pipeline: &Pipeline, settings: &SampleSettings, text_ids: Option<Tensor>) -> Result<SamplingSpec> {
    let [width, height] = settings.size;
    let latents = pipeline.initial_latents(0, 1, ImageSize { height, width })?;
    let device = latents.tensor.device().clone();
    Ok(SamplingSpec {
        shape: latents.tensor.dims()[1..].to_vec(),
        schedule: pipeline.schedule(settings.steps, &latents)?,
        image_ids: latents.image_ids,
        text_ids,
        dtype: default_dtype(&device),
        device,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_eighth_of_many_prompts_is_held_out() {
        let texts = |range: std::ops::Range<usize>| range.map(|n| Prompt::Text(n.to_string())).collect::<Vec<_>>();
        let text = |n: usize| Prompt::Text(n.to_string());
        let (trained, held_out) = split_prompts(texts(0..20), 16);
        assert_eq!((trained.len(), held_out), (18, vec![text(4), text(12)]));
        let (trained, held_out) = split_prompts(texts(0..200), 16);
        assert_eq!((trained.len(), held_out.len()), (184, 16));
        assert!(trained.iter().all(|prompt| !held_out.contains(prompt)));
        for (prompts, count) in [(texts(0..15), 16), (texts(0..200), 0), (vec![Prompt::Class(7); 20], 16)] {
            assert_eq!(split_prompts(prompts.clone(), count), (prompts.clone(), prompts));
        }
    }
}
