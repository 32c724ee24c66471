//! [`SampleSet`]: the training samples, which the teacher generates itself, in a folder.
//!
//! `set.json` contains the settings, `prompt-00000.safetensors` and so on the features of each prompt once,
//! `ids.safetensors` the positions of tokens, `batch-00000.safetensors` and so on the finished latents. Each file is
//! whole or absent, and each sample has a seed of its own, so generating a set can stop and resume at any file.

use crate::differences::{differences, read_back};
use crate::sample_files::{SampleFiles, SampleIndex, bad};
use crate::sample_reader::{SampleReader, Samples};
use crate::settings::at_least_one;
use crate::{ClassifierFree, DistillError, Result, SampleSettings};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, Denoiser, Prompt};
use clearform_sampling::{Guidance, SamplingError, Schedule, Start, StepAction, StepProgress, TorchGenerator, denoise};
use clearform_weights::{InMemoryTensors, write_atomically};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Prompts that are encoded together. Text encoders are loaded once for each such chunk, so larger is faster, but its
/// features are in memory together: 64 T5 prompts of 512 tokens take 0.5 GB in f32.
const PROMPTS_AT_ONCE: usize = 64;
const EDITION: u32 = 1;
/// Name of the file with the settings.
const FILE: &str = "set.json";

/// How latents are generated.
#[derive(Debug, Clone)]
pub struct SamplingSpec {
    /// Shape of one sample's latents as the transformer takes them, without the batch.
    pub shape: Vec<usize>,
    /// Grid, row and column of each image token, (image tokens, 3).
    pub image_ids: Option<Tensor>,
    /// The same for text tokens.
    pub text_ids: Option<Tensor>,
    /// Noise levels.
    pub schedule: Schedule,
    /// Dtype of the latents while they are denoised; they are stored in f32.
    pub dtype: DType,
    /// Device of the teacher.
    pub device: Device,
}

/// How far the generation of a set is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplesDone {
    /// Finished samples.
    pub done: usize,
    /// All samples.
    pub total: usize,
    /// The share that is done, with the part of the batch that is being denoised.
    pub fraction: f64,
}

/// The model that generates a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleTeacher {
    /// What users call it.
    #[serde(rename = "teacher")]
    pub name: String,
    /// Its [`weights_fingerprint`](crate::weights_fingerprint); empty in sets of earlier versions.
    #[serde(rename = "teacher_weights", default, skip_serializing_if = "String::is_empty")]
    pub weights: String,
    /// The same of its text encoders, which decide what a prompt asks for; empty without any.
    #[serde(rename = "teacher_encoders", default, skip_serializing_if = "String::is_empty")]
    pub encoders: String,
}

impl SampleTeacher {
    /// Whether the weights of both, or those of their text encoders, are known and differ.
    pub fn has_other_weights(&self, other: &Self) -> bool {
        let differ = |a: &String, b: &String| !a.is_empty() && !b.is_empty() && a != b;
        differ(&self.weights, &other.weights) || differ(&self.encoders, &other.encoders)
    }
}

/// A set of samples on disk.
#[derive(Debug)]
pub struct SampleSet {
    files: SampleFiles,
    /// The model that generates it, if that was recorded.
    teacher: Option<SampleTeacher>,
}

#[derive(Serialize, Deserialize)]
struct SampleManifest {
    edition: u32,
    #[serde(flatten)]
    teacher: Option<SampleTeacher>,
    #[serde(flatten)]
    settings: SampleSettings,
}

impl SampleSet {
    /// Creates a set in `folder`, or opens the one that exists if it was created with the same settings.
    ///
    /// # Errors
    /// [`DistillError::OtherSettings`] if it was created with other settings.
    pub fn create(folder: &Path, settings: SampleSettings) -> Result<Self> {
        Self::create_or_open(folder, settings, None)
    }

    /// As [`Self::create`], and records that `teacher` generates the set.
    ///
    /// # Errors
    /// [`DistillError::OtherSettings`] if it was created with other settings, [`DistillError::OtherTeacher`] if these
    /// are those of another model, [`DistillError::OtherWeights`] if it is incomplete and of other weights.
    pub fn create_for(folder: &Path, settings: SampleSettings, teacher: &SampleTeacher) -> Result<Self> {
        Self::create_or_open(folder, settings, Some(teacher.clone()))
    }

    fn create_or_open(folder: &Path, settings: SampleSettings, teacher: Option<SampleTeacher>) -> Result<Self> {
        check(&settings)?;
        let path = folder.join(FILE);
        if path.exists() {
            let set = Self::open(folder)?.require(&settings, teacher.as_ref())?;
            teacher.iter().try_for_each(|teacher| set.check_weights(teacher))?;
            return Ok(set);
        }
        std::fs::create_dir_all(folder).map_err(|source| DistillError::Io { path: folder.to_owned(), source })?;
        let manifest = SampleManifest { edition: EDITION, teacher: teacher.clone(), settings: settings.clone() };
        let manifest = serde_json::to_vec_pretty(&manifest).map_err(|error| bad(&path, error.to_string()))?;
        write_atomically(&path, &manifest)?;
        Ok(Self { files: SampleFiles { folder: folder.to_owned(), settings }, teacher })
    }

    /// The set itself, if it has these settings.
    fn require(self, settings: &SampleSettings, teacher: Option<&SampleTeacher>) -> Result<Self> {
        let folder = self.files.folder.clone();
        let path = folder.join(FILE);
        let settings = read_back(settings).map_err(|error| bad(&path, error.to_string()))?;
        let differing = differences(self.settings(), &settings);
        match (differing.as_str(), &self.teacher, teacher) {
            ("", ..) => Ok(self),
            (_, Some(recorded), Some(teacher)) if recorded.name != teacher.name => Err(DistillError::OtherTeacher {
                folder,
                recorded: recorded.name.clone(),
                teacher: teacher.name.clone(),
                differing,
            }),
            _ => Err(DistillError::OtherSettings { path, differing }),
        }
    }

    /// Refuses to let `teacher` generate the rest of a set that a model with other weights began.
    ///
    /// # Errors
    /// [`DistillError::OtherWeights`].
    pub fn check_weights(&self, teacher: &SampleTeacher) -> Result<()> {
        match &self.teacher {
            Some(recorded) if recorded.has_other_weights(teacher) && !self.is_complete() => {
                Err(DistillError::OtherWeights { folder: self.files.folder.clone(), recorded: recorded.name.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Opens a set, complete or not.
    ///
    /// # Errors
    /// There is none, or a newer version created it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = Self::file_in(folder);
        let text = std::fs::read(&path).map_err(|source| DistillError::Io { path: path.clone(), source })?;
        let manifest: SampleManifest = serde_json::from_slice(&text)
            .map_err(|error| bad(&path, format!("not a sample set that this version can read: {error}")))?;
        if manifest.edition != EDITION {
            let reason = format!("edition {}, this version reads {EDITION}; upgrade clearform", manifest.edition);
            return Err(bad(&path, reason));
        }
        check(&manifest.settings)?;
        let files = SampleFiles { folder: folder.to_owned(), settings: manifest.settings };
        Ok(Self { files, teacher: manifest.teacher })
    }

    /// Whether `folder` holds a set, complete or not.
    pub fn is_in(folder: &Path) -> bool {
        Self::file_in(folder).exists()
    }

    fn file_in(folder: &Path) -> PathBuf {
        folder.join(FILE)
    }

    /// The model that generates the set, if that was recorded.
    pub fn teacher(&self) -> Option<&SampleTeacher> {
        self.teacher.as_ref()
    }

    /// What the set contains once it is complete.
    pub fn settings(&self) -> &SampleSettings {
        &self.files.settings
    }

    /// The files of the set.
    pub(crate) fn files(&self) -> &SampleFiles {
        &self.files
    }

    /// Whether every file exists.
    pub fn is_complete(&self) -> bool {
        self.missing_prompts().is_empty() && self.files.ids_path().exists() && self.missing_batches().is_empty()
    }

    /// Refuses a complete set whose latents have another shape than `sample`, that of one sample. Reads headers only.
    ///
    /// # Errors
    /// A file cannot be read, or holds others.
    pub fn check_latents(&self, sample: &[usize]) -> Result<()> {
        self.files.check_latents(sample)
    }

    /// Encodes the prompts that are not encoded yet. `encode` returns conditions with a row for each prompt it is given.
    ///
    /// # Errors
    /// `encode` fails, or a file cannot be written.
    pub fn encode<E>(&self, encode: &mut dyn FnMut(&[Prompt]) -> std::result::Result<Conditions, E>) -> Result<()>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let prompts = self.files.prompts();
        // On resume the same chunks as without interruption, since the batch may change the last bits of an encoding.
        let chunks: BTreeSet<usize> =
            self.missing_prompts().into_iter().map(|prompt| prompt / PROMPTS_AT_ONCE).collect();
        for first in chunks.into_iter().map(|chunk| chunk * PROMPTS_AT_ONCE) {
            let last = (first + PROMPTS_AT_ONCE).min(prompts.len());
            let prompts = &prompts[first..last];
            let failed = |error: E| DistillError::Prompt { prompt: prompts[0].to_string(), source: error.into() };
            let encoded = encode(prompts).map_err(failed)?;
            for (row, index) in (first..last).enumerate() {
                self.save_prompt(index, &encoded, row)?;
            }
        }
        Ok(())
    }

    /// Generates the batches that are missing. `progress` gets the number of finished samples and of all samples, after
    /// each denoising step, and may cancel.
    ///
    /// # Errors
    /// A prompt is not encoded, or denoising fails; [`SamplingError::Cancelled`].
    pub fn generate(
        &self,
        teacher: &dyn Denoiser,
        sampling_spec: &SamplingSpec,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<()> {
        self.generate_watched(teacher, sampling_spec, &mut |samples| progress(samples.done, samples.total))
    }

    /// As [`Self::generate`], with the part of a batch that is denoised.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_watched(
        &self,
        teacher: &dyn Denoiser,
        sampling_spec: &SamplingSpec,
        progress: &mut dyn FnMut(SamplesDone) -> ControlFlow<()>,
    ) -> Result<()> {
        self.save_ids(sampling_spec)?;
        let missing = self.missing_batches();
        let total = self.files.settings.count;
        let mut done = total - missing.iter().map(|&batch| self.samples_of(batch).len()).sum::<usize>();
        let mut go_on = |done: usize, part: f64| {
            let fraction = (done as f64 + part) / total.max(1) as f64;
            match progress(SamplesDone { done, total, fraction }) {
                ControlFlow::Continue(()) => StepAction::Continue,
                ControlFlow::Break(()) => StepAction::Cancel,
            }
        };
        let _ = go_on(done, 0.0);
        for batch in missing {
            let samples = self.samples_of(batch).len();
            let part = |step: &StepProgress| samples as f64 * step.done as f64 / step.steps as f64;
            self.generate_batch(batch, teacher, sampling_spec, &mut |step| go_on(done, part(step)))?;
            done += samples;
            if let StepAction::Cancel = go_on(done, 0.0) {
                return Err(SamplingError::Cancelled.into());
            }
        }
        Ok(())
    }

    /// Reads samples by index.
    ///
    /// # Errors
    /// A file is missing or belongs to another set.
    pub fn read(&self, samples: &[usize], device: &Device) -> Result<Samples> {
        let indices: Vec<SampleIndex> = samples.iter().copied().map(SampleIndex::conditional).collect();
        SampleReader::new(&self.files).read(&indices, device)
    }

    /// Saves row `row` of `encoded` as prompt `index`.
    fn save_prompt(&self, index: usize, encoded: &Conditions, row: usize) -> Result<()> {
        // Guidance scale and ids are the same for all prompts; they come from the settings and `ids.safetensors`.
        let tensors = encoded.per_sample().filter(|(name, _)| *name != "guidance");
        let rows = tensors.map(|(name, tensor)| Ok((name.to_owned(), tensor.get(row)?.contiguous()?)));
        save(&self.files.prompt_path(index), rows.collect::<Result<InMemoryTensors>>()?)
    }

    fn generate_batch(
        &self,
        batch: usize,
        teacher: &dyn Denoiser,
        sampling_spec: &SamplingSpec,
        hook: &mut dyn FnMut(&StepProgress) -> StepAction,
    ) -> Result<()> {
        let samples = self.samples_of(batch);
        let latents = self.denoise(&samples, teacher, sampling_spec, hook)?;
        let prompts = samples.iter().map(|&sample| self.files.prompt_of(SampleIndex::conditional(sample)) as u32);
        let prompts = Tensor::from_iter(prompts, &Device::Cpu)?;
        let tensors = [("latents".to_owned(), latents), ("prompt".to_owned(), prompts)];
        save(&self.files.batch_path(batch), InMemoryTensors::from_iter(tensors))
    }

    /// What `denoiser` generates for some samples of the set, from their noise and prompts, without keeping it.
    ///
    /// # Shapes
    /// Returns (samples, ...) as the transformer takes them, f32, on the CPU.
    ///
    /// # Errors
    /// A prompt is not encoded, or denoising fails; [`SamplingError::Cancelled`].
    pub fn denoise(
        &self,
        samples: &[usize],
        denoiser: &dyn Denoiser,
        sampling_spec: &SamplingSpec,
        hook: &mut dyn FnMut(&StepProgress) -> StepAction,
    ) -> Result<Tensor> {
        let noise = self.noise(samples, sampling_spec)?;
        let guidance = self.guidance(samples, &sampling_spec.device)?;
        let latents = denoise(denoiser, Start::from_noise(noise), &sampling_spec.schedule, &guidance, hook)?;
        Ok(latents.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?)
    }

    fn guidance(&self, samples: &[usize], device: &Device) -> Result<Guidance> {
        let conditions = |unconditional: bool| {
            let prompt = |sample: &usize| self.files.prompt_of(SampleIndex { sample: *sample, unconditional });
            SampleReader::new(&self.files).conditions(&samples.iter().map(prompt).collect::<Vec<_>>(), device)
        };
        let positive = conditions(false)?;
        match &self.files.settings.classifier_free {
            None => Ok(Guidance::SingleEvaluation(positive)),
            Some(ClassifierFree { scale, channels, .. }) => {
                Ok(Guidance::classifier_free(positive, conditions(true)?, *scale, *channels)?)
            }
        }
    }

    /// Noise of `samples`. Each has a seed of its own, so that it does not depend on the batch it is generated in.
    fn noise(&self, samples: &[usize], sampling_spec: &SamplingSpec) -> Result<Tensor> {
        let noise_of = |&sample: &usize| {
            let mut generator = TorchGenerator::new(self.files.settings.seed + sample as u64);
            let noise = generator.randn(sampling_spec.shape.as_slice())?;
            Ok(noise.to_device(&sampling_spec.device)?.to_dtype(sampling_spec.dtype)?)
        };
        Ok(Tensor::stack(&samples.iter().map(noise_of).collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn save_ids(&self, sampling_spec: &SamplingSpec) -> Result<()> {
        let ids = [("image_ids", &sampling_spec.image_ids), ("text_ids", &sampling_spec.text_ids)];
        let ids = ids.into_iter().filter_map(|(name, ids)| Some((name.to_owned(), ids.clone()?)));
        save(&self.files.ids_path(), ids.collect())
    }

    fn missing_prompts(&self) -> Vec<usize> {
        let prompts = self.files.used_prompts() + usize::from(self.files.settings.classifier_free.is_some());
        (0..prompts).filter(|&prompt| !self.files.prompt_path(prompt).exists()).collect()
    }

    fn missing_batches(&self) -> Vec<usize> {
        let batches = self.files.settings.count.div_ceil(self.files.settings.batch);
        (0..batches).filter(|&batch| !self.files.batch_path(batch).exists()).collect()
    }

    fn samples_of(&self, batch: usize) -> Vec<usize> {
        let first = batch * self.files.settings.batch;
        (first..(first + self.files.settings.batch).min(self.files.settings.count)).collect()
    }
}

fn check(settings: &SampleSettings) -> Result<()> {
    at_least_one("prompts", settings.prompts.len())?;
    at_least_one("count", settings.count)?;
    at_least_one("batch", settings.batch)
}

fn save(path: &Path, tensors: InMemoryTensors) -> Result<()> {
    Ok(clearform_weights::save(path, &tensors, &BTreeMap::new())?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// set.json as earlier versions wrote it, for a model with and one without classifier-free guidance.
    const OLD: [&str; 2] = [
        r#"{
  "edition": 1,
  "prompts": [
    "cat",
    207
  ],
  "count": 7,
  "batch": 3,
  "size": [
    48,
    32
  ],
  "steps": 2,
  "guidance": 3.5,
  "seed": 5
}"#,
        r#"{
  "edition": 1,
  "prompts": [
    "cat",
    207
  ],
  "count": 7,
  "batch": 3,
  "size": [
    48,
    32
  ],
  "steps": 2,
  "guidance": null,
  "classifier_free": {
    "scale": 4.1,
    "without": 1000,
    "channels": 3
  },
  "seed": 5
}"#,
    ];

    fn settings(guidance: Option<f64>, classifier_free: Option<ClassifierFree>) -> SampleSettings {
        let prompts = vec![Prompt::Text("cat".to_owned()), Prompt::Class(207)];
        SampleSettings { prompts, count: 7, batch: 3, size: [48, 32], steps: 2, guidance, classifier_free, seed: 5 }
    }

    #[test]
    fn sets_of_earlier_versions_are_opened_and_resumed() {
        let guided = ClassifierFree { scale: 4.1, unconditional: Prompt::Class(1000), channels: Some(3) };
        for (text, settings) in OLD.into_iter().zip([settings(Some(3.5), None), settings(None, Some(guided))]) {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("set.json"), text).unwrap();
            assert_eq!(SampleSet::open(folder.path()).unwrap().settings(), &settings);
            SampleSet::create(folder.path(), settings.clone()).unwrap();
            // The format is unchanged.
            let anew = folder.path().join("anew");
            SampleSet::create(&anew, settings).unwrap();
            assert_eq!(std::fs::read_to_string(anew.join("set.json")).unwrap(), text);
        }
    }

    #[test]
    fn a_set_with_other_settings_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("set.json"), OLD[1]).unwrap();
        let create = |settings| SampleSet::create(folder.path(), settings).unwrap_err().to_string();
        // Dropping the guidance drops a key.
        let error = create(settings(None, None));
        assert!(
            error.contains("classifier_free: {\"scale\":4.1,\"without\":1000,\"channels\":3}, now null"),
            "{error}"
        );
        let other = ClassifierFree { scale: 4.2, unconditional: Prompt::Class(1000), channels: Some(3) };
        assert!(create(settings(None, Some(other))).contains("(classifier_free.scale: 4.1, now 4.2)"));
    }

    #[test]
    fn a_set_of_another_model_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let teacher = |name: &str| SampleTeacher {
            name: name.to_owned(),
            weights: format!("those of {name}"),
            encoders: String::new(),
        };
        let create = |guidance, name| SampleSet::create_for(folder.path(), settings(guidance, None), &teacher(name));
        assert_eq!(create(Some(3.5), "dev").unwrap().teacher(), Some(&teacher("dev")));
        assert_eq!(SampleSet::open(folder.path()).unwrap().teacher(), Some(&teacher("dev")));
        let error = create(None, "schnell").unwrap_err().to_string();
        let folder = folder.path().display();
        let drawn = format!("the samples in {folder} were drawn by another model, dev, and not by schnell");
        assert!(error.starts_with(&drawn) && error.ends_with(&format!("delete {folder} to draw them anew")), "{error}");
        let same = create(None, "dev").unwrap_err().to_string();
        assert!(same.contains("was created with other settings (guidance: 3.5, now null)"), "{same}");
        // The same settings, and a set that is incomplete.
        let replaced = create(Some(3.5), "schnell").unwrap_err().to_string();
        assert!(replaced.contains("were begun by dev with other weights"), "{replaced}");
        assert!(create(Some(3.5), "dev").is_ok());
    }
}
