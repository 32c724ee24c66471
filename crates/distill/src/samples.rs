//! [`SampleSet`]: the training samples, which the teacher generates itself, in a folder.
//!
//! `set.json` contains the settings, `prompt-00000.safetensors` and so on the features of each prompt once,
//! `ids.safetensors` the positions of tokens, `batch-00000.safetensors` and so on the finished latents. Each file is
//! whole or absent, and each sample has a seed of its own, so generating a set can stop and resume at any file.

use crate::differences::{differences, read_back};
use crate::settings::at_least_one;
use crate::{DistillError, Result};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, Denoiser, Prompt};
use clearform_sampling::{Guidance, SamplingError, Schedule, Start, StepAction, StepProgress, TorchGenerator, denoise};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource, write_atomically};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Prompts that are encoded together. Text encoders are loaded once for each such chunk, so larger is faster, but its
/// features are in memory together: 64 T5 prompts of 512 tokens take 0.5 GB in f32.
const PROMPTS_AT_ONCE: usize = 64;
const EDITION: u32 = 1;

/// What a set contains and how it is generated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleSettings {
    /// The prompts; sample n has prompt n modulo their count.
    pub prompts: Vec<Prompt>,
    /// Samples in all.
    pub count: usize,
    /// Samples that are generated together and share a file.
    pub batch: usize,
    /// Width and height in pixels.
    pub size: [usize; 2],
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale, for models that have one.
    pub guidance: Option<f64>,
    /// Classifier-free guidance, for models that use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier_free: Option<ClassifierFree>,
    /// Seed of sample 0; sample n has `seed + n`.
    pub seed: u64,
}

/// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): two evaluations a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierFree {
    /// Guidance scale; 1 is the conditional prediction alone.
    pub scale: f64,
    /// The unconditional (negative) prompt.
    #[serde(rename = "without")]
    pub unconditional: Prompt,
    /// How many channels are guided, counted from the first; `None` guides all.
    pub channels: Option<usize>,
}

/// A sample of a set, with its own prompt or the unconditional one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SampleIndex {
    /// Its index in the set.
    pub sample: usize,
    /// Whether the unconditional prompt replaces its own.
    pub unconditional: bool,
}

impl SampleIndex {
    /// A sample with its own prompt.
    pub fn conditional(sample: usize) -> Self {
        Self { sample, unconditional: false }
    }
}

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

/// Samples read for training.
#[derive(Debug, Clone)]
pub struct Samples {
    /// Latents, f32, (batch, ...) as the transformer takes them.
    pub latents: Tensor,
    /// The encoded prompts they were generated from.
    pub conditions: Conditions,
}

/// A set of samples on disk.
#[derive(Debug)]
pub struct SampleSet {
    folder: PathBuf,
    settings: SampleSettings,
}

#[derive(Serialize, Deserialize)]
struct SampleManifest {
    edition: u32,
    #[serde(flatten)]
    settings: SampleSettings,
}

impl SampleSet {
    /// Creates a set in `folder`, or opens the one that exists if it was created with the same settings.
    ///
    /// # Errors
    /// [`DistillError::OtherSettings`] if it was created with other settings.
    pub fn create(folder: &Path, settings: SampleSettings) -> Result<Self> {
        check(&settings)?;
        let path = folder.join("set.json");
        if path.exists() {
            let found = Self::open(folder)?;
            let settings = read_back(&settings).map_err(|error| bad(&path, error.to_string()))?;
            let differing = differences(&found.settings, &settings);
            return if differing.is_empty() { Ok(found) } else { Err(DistillError::OtherSettings { path, differing }) };
        }
        std::fs::create_dir_all(folder).map_err(|source| DistillError::Io { path: folder.to_owned(), source })?;
        let manifest = serde_json::to_vec_pretty(&SampleManifest { edition: EDITION, settings: settings.clone() });
        write_atomically(&path, &manifest.map_err(|error| bad(&path, error.to_string()))?)?;
        Ok(Self { folder: folder.to_owned(), settings })
    }

    /// Opens a set, complete or not.
    ///
    /// # Errors
    /// There is none, or a newer version created it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("set.json");
        let text = std::fs::read(&path).map_err(|source| DistillError::Io { path: path.clone(), source })?;
        let manifest: SampleManifest = serde_json::from_slice(&text)
            .map_err(|error| bad(&path, format!("not a sample set that this version can read: {error}")))?;
        if manifest.edition != EDITION {
            let reason = format!("edition {}, this version reads {EDITION}; upgrade clearform", manifest.edition);
            return Err(bad(&path, reason));
        }
        check(&manifest.settings)?;
        Ok(Self { folder: folder.to_owned(), settings: manifest.settings })
    }

    /// What the set contains once it is complete.
    pub fn settings(&self) -> &SampleSettings {
        &self.settings
    }

    /// Whether every file exists.
    pub fn is_complete(&self) -> bool {
        self.missing_prompts().is_empty() && self.ids_path().exists() && self.missing_batches().is_empty()
    }

    /// Encodes the prompts that are not encoded yet. `encode` returns conditions with a row for each prompt it is given.
    ///
    /// # Errors
    /// `encode` fails, or a file cannot be written.
    pub fn encode<E>(&self, encode: &mut dyn FnMut(&[Prompt]) -> std::result::Result<Conditions, E>) -> Result<()>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let prompts = self.prompts();
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
        self.save_ids(sampling_spec)?;
        let missing = self.missing_batches();
        let mut done = self.settings.count - missing.iter().map(|&batch| self.samples_of(batch).len()).sum::<usize>();
        let mut go_on = |done| match progress(done, self.settings.count) {
            ControlFlow::Continue(()) => StepAction::Continue,
            ControlFlow::Break(()) => StepAction::Cancel,
        };
        let _ = go_on(done);
        for batch in missing {
            self.generate_batch(batch, teacher, sampling_spec, &mut |_| go_on(done))?;
            done += self.samples_of(batch).len();
            if let StepAction::Cancel = go_on(done) {
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
        self.read_indices(&samples.iter().copied().map(SampleIndex::conditional).collect::<Vec<_>>(), device)
    }

    /// As [`Self::read`], where some samples may be unconditional.
    pub(crate) fn read_indices(&self, indices: &[SampleIndex], device: &Device) -> Result<Samples> {
        let rows = indices.iter().map(|index| self.latents(index.sample)).collect::<Result<Vec<_>>>()?;
        let latents = Tensor::stack(&rows, 0)?.to_device(device)?;
        let prompts: Vec<usize> = indices.iter().map(|index| self.prompt_of(*index)).collect();
        Ok(Samples { latents, conditions: self.conditions(&prompts, device)? })
    }

    /// Saves row `row` of `encoded` as prompt `index`.
    fn save_prompt(&self, index: usize, encoded: &Conditions, row: usize) -> Result<()> {
        // Guidance scale and ids are the same for all prompts; they come from the settings and `ids.safetensors`.
        let tensors = encoded.per_sample().filter(|(name, _)| *name != "guidance");
        let rows = tensors.map(|(name, tensor)| Ok((name.to_owned(), tensor.get(row)?.contiguous()?)));
        save(&self.prompt_path(index), rows.collect::<Result<InMemoryTensors>>()?)
    }

    fn generate_batch(
        &self,
        batch: usize,
        teacher: &dyn Denoiser,
        sampling_spec: &SamplingSpec,
        hook: &mut dyn FnMut(&StepProgress) -> StepAction,
    ) -> Result<()> {
        let samples = self.samples_of(batch);
        let noise = self.noise(&samples, sampling_spec)?;
        let guidance = self.guidance(&samples, &sampling_spec.device)?;
        let start = Start::from_noise(noise);
        let latents = denoise(teacher, start, &sampling_spec.schedule, &guidance, hook)?;
        let latents = latents.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?;
        let prompts = samples.iter().map(|&sample| self.prompt_of(SampleIndex::conditional(sample)) as u32);
        let prompts = Tensor::from_iter(prompts, &Device::Cpu)?;
        let tensors = [("latents".to_owned(), latents), ("prompt".to_owned(), prompts)];
        save(&self.batch_path(batch), InMemoryTensors::from_iter(tensors))
    }

    fn guidance(&self, samples: &[usize], device: &Device) -> Result<Guidance> {
        let conditions = |unconditional: bool| {
            let prompt = |sample: &usize| self.prompt_of(SampleIndex { sample: *sample, unconditional });
            self.conditions(&samples.iter().map(prompt).collect::<Vec<_>>(), device)
        };
        let positive = conditions(false)?;
        match &self.settings.classifier_free {
            None => Ok(Guidance::SingleEvaluation(positive)),
            Some(ClassifierFree { scale, channels, .. }) => {
                Ok(Guidance::classifier_free(positive, conditions(true)?, *scale, *channels)?)
            }
        }
    }

    /// The latents of one sample. Only its bytes are read: a batch of large images may take hundreds of megabytes.
    fn latents(&self, sample: usize) -> Result<Tensor> {
        let path = self.batch_path(sample / self.settings.batch);
        let row = sample % self.settings.batch;
        let file = Checkpoint::open(&path)?;
        let info = file.info("latents").filter(|info| info.shape.first().is_some_and(|&rows| rows > row));
        let info = info.ok_or_else(|| {
            bad(&path, format!("does not contain sample {sample}; delete this file and rerun with --resume"))
        })?;
        let shape = &info.shape[1..];
        let size = shape.iter().product::<usize>() * size_of::<f32>();
        let bytes = file.read_range("latents", row * size..(row + 1) * size)?;
        Ok(Tensor::from_raw_buffer(&bytes, DType::F32, shape, &Device::Cpu)?)
    }

    fn conditions(&self, prompts: &[usize], device: &Device) -> Result<Conditions> {
        let mut features = self.features(prompts)?;
        let ids = Checkpoint::open(self.ids_path())?;
        let read_ids = |name: &str| -> Result<Option<Tensor>> {
            ids.info(name).map(|_| Ok(ids.tensor(name)?.to_device(device)?)).transpose()
        };
        let scale = |scale: f64| Tensor::new(vec![scale as f32; prompts.len()], device);
        let shared = Conditions {
            guidance: self.settings.guidance.map(scale).transpose()?,
            image_ids: read_ids("image_ids")?,
            text_ids: read_ids("text_ids")?,
            ..Conditions::default()
        };
        shared.map_samples(|name, value| match features.remove(name) {
            Some(rows) => Ok(Some(Tensor::stack(&rows, 0)?.to_device(device)?)),
            None => Ok(value.clone()),
        })
    }

    /// The stored tensors of `prompts` by name, one for each prompt.
    fn features(&self, prompts: &[usize]) -> Result<BTreeMap<String, Vec<Tensor>>> {
        let mut features: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for &prompt in prompts {
            let file = Checkpoint::open(self.prompt_path(prompt))?;
            for info in file.tensors() {
                let tensor = file.tensor(&info.name)?;
                features.entry(info.name).or_default().push(tensor);
            }
        }
        Ok(features)
    }

    /// Noise of `samples`. Each has a seed of its own, so that it does not depend on the batch it is generated in.
    fn noise(&self, samples: &[usize], sampling_spec: &SamplingSpec) -> Result<Tensor> {
        let noise_of = |&sample: &usize| {
            let mut generator = TorchGenerator::new(self.settings.seed + sample as u64);
            let noise = generator.randn(sampling_spec.shape.as_slice())?;
            Ok(noise.to_device(&sampling_spec.device)?.to_dtype(sampling_spec.dtype)?)
        };
        Ok(Tensor::stack(&samples.iter().map(noise_of).collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn save_ids(&self, sampling_spec: &SamplingSpec) -> Result<()> {
        let ids = [("image_ids", &sampling_spec.image_ids), ("text_ids", &sampling_spec.text_ids)];
        let ids = ids.into_iter().filter_map(|(name, ids)| Some((name.to_owned(), ids.clone()?)));
        save(&self.ids_path(), ids.collect())
    }

    fn missing_prompts(&self) -> Vec<usize> {
        let prompts = self.used_prompts() + usize::from(self.settings.classifier_free.is_some());
        (0..prompts).filter(|&prompt| !self.prompt_path(prompt).exists()).collect()
    }

    /// All prompts that are encoded: those of samples, and last the unconditional one if there is one.
    fn prompts(&self) -> Vec<Prompt> {
        let unconditional = self.settings.classifier_free.iter().map(|guidance| guidance.unconditional.clone());
        self.settings.prompts[..self.used_prompts()].iter().cloned().chain(unconditional).collect()
    }

    /// With fewer samples than prompts, the last prompts are not used.
    fn used_prompts(&self) -> usize {
        self.settings.prompts.len().min(self.settings.count)
    }

    fn missing_batches(&self) -> Vec<usize> {
        let batches = self.settings.count.div_ceil(self.settings.batch);
        (0..batches).filter(|&batch| !self.batch_path(batch).exists()).collect()
    }

    fn samples_of(&self, batch: usize) -> Vec<usize> {
        let first = batch * self.settings.batch;
        (first..(first + self.settings.batch).min(self.settings.count)).collect()
    }

    /// The index of a sample's prompt in [`Self::prompts`].
    fn prompt_of(&self, index: SampleIndex) -> usize {
        if index.unconditional { self.used_prompts() } else { index.sample % self.settings.prompts.len() }
    }

    fn prompt_path(&self, prompt: usize) -> PathBuf {
        self.folder.join(format!("prompt-{prompt:05}.safetensors"))
    }

    fn batch_path(&self, batch: usize) -> PathBuf {
        self.folder.join(format!("batch-{batch:05}.safetensors"))
    }

    fn ids_path(&self) -> PathBuf {
        self.folder.join("ids.safetensors")
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

fn bad(path: &Path, reason: String) -> DistillError {
    DistillError::BadFile { path: path.to_owned(), reason }
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
}
