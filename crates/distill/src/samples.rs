//! [`SampleSet`]: what the teacher drew for itself, in a folder.
//!
//! `set.json` says what is drawn; `prompt-00000.safetensors` and so on hold each prompt's text features once,
//! `ids.safetensors` where the tokens lie, `batch-00000.safetensors` and so on the finished latents. Each file is whole
//! or absent, and sample n is drawn from its own seed, so making a set can stop and go on at any file.

use crate::{DistillError, Result};
use candle_core::{DType, Device, Tensor};
use clearform_models::{Conditions, Denoiser, Prompt};
use clearform_sampling::{Guidance, Schedule, TorchGenerator, denoise};
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource, write_atomically};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Prompts that are encoded at once: what they give must fit in memory.
const PROMPTS_AT_ONCE: usize = 64;
const EDITION: u32 = 1;

/// What a set holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleSettings {
    /// The subjects; sample n is of subject n modulo their count.
    pub prompts: Vec<Prompt>,
    /// Samples in all.
    pub count: usize,
    /// Samples drawn at once, which are one file.
    pub batch: usize,
    /// Pixels across and down.
    pub size: [usize; 2],
    /// Denoising steps.
    pub steps: usize,
    /// Embedded guidance scale, for models that have one.
    pub guidance: Option<f64>,
    /// Classifier-free guidance, for models that are drawn with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier_free: Option<ClassifierFree>,
    /// Seed of sample 0; each next has one more.
    pub seed: u64,
}

/// How samples are drawn with two evaluations a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierFree {
    /// How far to go from the second evaluation through the first.
    pub scale: f64,
    /// What the second is of.
    pub without: Prompt,
    /// Channels that are guided, from the first; all without it.
    pub channels: Option<usize>,
}

/// A sample, or what is left of it without its subject.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SampleIndex {
    /// Its number.
    pub sample: usize,
    /// Whether it is taken without its subject.
    pub unconditional: bool,
}

impl SampleIndex {
    /// A sample with its subject.
    pub fn of(sample: usize) -> Self {
        Self { sample, unconditional: false }
    }
}

/// What samples are drawn on.
#[derive(Debug, Clone)]
pub struct SamplingSpec {
    /// Extents of one sample's latents as the transformer takes them, without the batch.
    pub shape: Vec<usize>,
    /// Grid, row and column of each image token.
    pub image_ids: Option<Tensor>,
    /// The same for text.
    pub text_ids: Option<Tensor>,
    /// Noise levels.
    pub schedule: Schedule,
    /// Number format of the latents while they are drawn; they are kept in f32.
    pub dtype: DType,
    /// Where they are drawn.
    pub device: Device,
}

/// Samples read for training.
#[derive(Debug, Clone)]
pub struct Samples {
    /// Latents, f32, (batch, ...) as the transformer takes them.
    pub latents: Tensor,
    /// What they were drawn from.
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
    /// Begins a set in `folder`, or takes up one that was begun with the same settings.
    ///
    /// # Errors
    /// [`DistillError::OtherSettings`] if it was begun with others.
    pub fn create(folder: &Path, settings: SampleSettings) -> Result<Self> {
        check(&settings)?;
        let path = folder.join("set.json");
        if path.exists() {
            let found = Self::open(folder)?;
            let differing = differences(&found.settings, &settings);
            return if differing.is_empty() { Ok(found) } else { Err(DistillError::OtherSettings { path, differing }) };
        }
        std::fs::create_dir_all(folder).map_err(|source| DistillError::Io { path: folder.to_owned(), source })?;
        let recorded = serde_json::to_vec_pretty(&SampleManifest { edition: EDITION, settings: settings.clone() });
        write_atomically(&path, &recorded.map_err(|error| bad(&path, error.to_string()))?)?;
        Ok(Self { folder: folder.to_owned(), settings })
    }

    /// Opens a set, finished or not.
    ///
    /// # Errors
    /// There is none, or it was made by a newer version.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("set.json");
        let text = std::fs::read(&path).map_err(|source| DistillError::Io { path: path.clone(), source })?;
        let recorded: SampleManifest = serde_json::from_slice(&text)
            .map_err(|error| bad(&path, format!("not a sample set that this version can read: {error}")))?;
        if recorded.edition != EDITION {
            let reason = format!("edition {}, this version reads {EDITION}; upgrade clearform", recorded.edition);
            return Err(bad(&path, reason));
        }
        check(&recorded.settings)?;
        Ok(Self { folder: folder.to_owned(), settings: recorded.settings })
    }

    /// What the set holds when it is finished.
    pub fn settings(&self) -> &SampleSettings {
        &self.settings
    }

    /// Whether every file is there.
    pub fn is_complete(&self) -> bool {
        self.unencoded().is_empty() && self.ids_path().exists() && self.undrawn().is_empty()
    }

    /// Encodes the subjects that are not encoded yet. What `encode` gives has a row for each of them.
    ///
    /// # Errors
    /// What `encode` says, or a file that cannot be written.
    pub fn encode<E>(&self, encode: &mut dyn FnMut(&[Prompt]) -> std::result::Result<Conditions, E>) -> Result<()>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let prompts = self.prompts();
        // Always the same chunks: what is encoded together may change the last bits.
        let chunks: BTreeSet<usize> = self.unencoded().into_iter().map(|prompt| prompt / PROMPTS_AT_ONCE).collect();
        for first in chunks.into_iter().map(|chunk| chunk * PROMPTS_AT_ONCE) {
            let last = (first + PROMPTS_AT_ONCE).min(prompts.len());
            let prompts = &prompts[first..last];
            let refused = |error: E| DistillError::Prompt { prompt: prompts[0].to_string(), source: error.into() };
            let encoded = encode(prompts).map_err(refused)?;
            for (row, index) in (first..last).enumerate() {
                // Scale and places are the set's own.
                let parts = encoded.per_sample().filter(|(name, _)| *name != "guidance");
                let rows = parts.map(|(name, tensor)| Ok((name.to_owned(), tensor.get(row)?.contiguous()?)));
                save(&self.prompt_path(index), rows.collect::<Result<InMemoryTensors>>()?)?;
            }
        }
        Ok(())
    }

    /// Draws the batches that are not drawn yet; `progress` is told how many samples are there of all.
    ///
    /// # Errors
    /// A prompt that is not encoded, or what sampling says.
    pub fn draw(
        &self,
        teacher: &dyn Denoiser,
        sampling_spec: &SamplingSpec,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<()> {
        self.save_ids(sampling_spec)?;
        let undrawn = self.undrawn();
        let mut done = self.settings.count - undrawn.iter().map(|&batch| self.members(batch).len()).sum::<usize>();
        progress(done, self.settings.count);
        for batch in undrawn {
            let members = self.members(batch);
            let noise = self.noise(&members, sampling_spec)?;
            let guidance = self.guidance(&members, &sampling_spec.device)?;
            let latents = denoise(teacher, &noise, &sampling_spec.schedule, &guidance, &mut |_| ())?;
            let prompts: Vec<u32> =
                members.iter().map(|&member| self.subject_of(SampleIndex::of(member)) as u32).collect();
            let latents = latents.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?;
            let prompts = Tensor::new(prompts, &Device::Cpu)?;
            let tensors = [("latents".to_owned(), latents), ("prompt".to_owned(), prompts)];
            save(&self.batch_path(batch), InMemoryTensors::from_iter(tensors))?;
            done += members.len();
            progress(done, self.settings.count);
        }
        Ok(())
    }

    /// Reads samples by number.
    ///
    /// # Errors
    /// A file that is missing or not of this set.
    pub fn read(&self, members: &[usize], device: &Device) -> Result<Samples> {
        self.read_members(&members.iter().copied().map(SampleIndex::of).collect::<Vec<_>>(), device)
    }

    /// As [`Self::read`], some without their subjects.
    pub(crate) fn read_members(&self, members: &[SampleIndex], device: &Device) -> Result<Samples> {
        let rows = members.iter().map(|member| self.latents(member.sample)).collect::<Result<Vec<_>>>()?;
        let latents = Tensor::stack(&rows, 0)?.to_device(device)?;
        let prompts: Vec<usize> = members.iter().map(|member| self.subject_of(*member)).collect();
        Ok(Samples { latents, conditions: self.conditions(&prompts, device)? })
    }

    fn guidance(&self, members: &[usize], device: &Device) -> Result<Guidance> {
        let conditions = |unconditional: bool| {
            let prompt = |sample: &usize| self.subject_of(SampleIndex { sample: *sample, unconditional });
            self.conditions(&members.iter().map(prompt).collect::<Vec<_>>(), device)
        };
        let positive = conditions(false)?;
        match &self.settings.classifier_free {
            None => Ok(Guidance::Embedded(positive)),
            Some(ClassifierFree { scale, channels, .. }) => {
                Ok(Guidance::classifier_free(positive, conditions(true)?, *scale, *channels)?)
            }
        }
    }

    fn latents(&self, member: usize) -> Result<Tensor> {
        let path = self.batch_path(member / self.settings.batch);
        let row = member % self.settings.batch;
        let file = Checkpoint::open(&path)?;
        let info = file.info("latents").filter(|info| info.shape.first().is_some_and(|&rows| rows > row));
        let info = info.ok_or_else(|| bad(&path, format!("sample {member} is not in it; delete it and resume")))?;
        let shape = &info.shape[1..];
        let size = shape.iter().product::<usize>() * size_of::<f32>();
        let bytes = file.read_range("latents", row * size..(row + 1) * size)?;
        Ok(Tensor::from_raw_buffer(&bytes, DType::F32, shape, &Device::Cpu)?)
    }

    fn conditions(&self, prompts: &[usize], device: &Device) -> Result<Conditions> {
        let mut parts: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for &prompt in prompts {
            let file = Checkpoint::open(self.prompt_path(prompt))?;
            for info in file.tensors() {
                let tensor = file.tensor(&info.name)?;
                parts.entry(info.name).or_default().push(tensor);
            }
        }
        let ids = Checkpoint::open(self.ids_path())?;
        let id = |name: &str| -> Result<Option<Tensor>> {
            ids.info(name).map(|_| Ok(ids.tensor(name)?.to_device(device)?)).transpose()
        };
        let scale = |scale: f64| Tensor::new(vec![scale as f32; prompts.len()], device);
        let framed = Conditions {
            guidance: self.settings.guidance.map(scale).transpose()?,
            image_ids: id("image_ids")?,
            text_ids: id("text_ids")?,
            ..Conditions::default()
        };
        framed.map_samples(|name, own| match parts.remove(name) {
            Some(rows) => Ok(Some(Tensor::stack(&rows, 0)?.to_device(device)?)),
            None => Ok(own.clone()),
        })
    }

    fn noise(&self, members: &[usize], sampling_spec: &SamplingSpec) -> Result<Tensor> {
        let one = |&member: &usize| {
            let noise =
                TorchGenerator::new(self.settings.seed + member as u64).randn(sampling_spec.shape.as_slice())?;
            Ok(noise.to_device(&sampling_spec.device)?.to_dtype(sampling_spec.dtype)?)
        };
        Ok(Tensor::stack(&members.iter().map(one).collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn save_ids(&self, sampling_spec: &SamplingSpec) -> Result<()> {
        let ids = [("image_ids", &sampling_spec.image_ids), ("text_ids", &sampling_spec.text_ids)];
        let ids = ids.into_iter().filter_map(|(name, ids)| Some((name.to_owned(), ids.clone()?)));
        save(&self.ids_path(), ids.collect())
    }

    fn unencoded(&self) -> Vec<usize> {
        let prompts = self.used_prompts() + usize::from(self.settings.classifier_free.is_some());
        (0..prompts).filter(|&prompt| !self.prompt_path(prompt).exists()).collect()
    }

    /// Everything that is encoded: the subjects that samples are of, and last what stands for none.
    fn prompts(&self) -> Vec<Prompt> {
        let without = self.settings.classifier_free.iter().map(|guidance| guidance.without.clone());
        self.settings.prompts[..self.used_prompts()].iter().cloned().chain(without).collect()
    }

    fn used_prompts(&self) -> usize {
        self.settings.prompts.len().min(self.settings.count)
    }

    fn undrawn(&self) -> Vec<usize> {
        let batches = self.settings.count.div_ceil(self.settings.batch);
        (0..batches).filter(|&batch| !self.batch_path(batch).exists()).collect()
    }

    fn members(&self, batch: usize) -> Vec<usize> {
        let first = batch * self.settings.batch;
        (first..(first + self.settings.batch).min(self.settings.count)).collect()
    }

    /// The number of a member's subject among [`Self::subjects`].
    fn subject_of(&self, member: SampleIndex) -> usize {
        if member.unconditional { self.used_prompts() } else { member.sample % self.settings.prompts.len() }
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
    for (key, count) in [("prompts", settings.prompts.len()), ("count", settings.count), ("batch", settings.batch)] {
        if count == 0 {
            return Err(DistillError::BadSetting { key, reason: "expected at least 1, found 0".to_owned() });
        }
    }
    Ok(())
}

/// Keys whose values differ, "key: then, now"; empty if none does.
pub(crate) fn differences<T: Serialize>(then: &T, now: &T) -> String {
    let fields =
        |value: &T| serde_json::to_value(value).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default();
    let (then, now) = (fields(then), fields(now));
    let differ = now.iter().filter(|(key, value)| then.get(*key) != Some(value));
    let lines = differ.map(|(key, value)| match then.get(key) {
        Some(before) if before.to_string().len() + value.to_string().len() < 100 => {
            format!("{key}: {before}, now {value}")
        }
        _ => format!("{key}: another"),
    });
    lines.collect::<Vec<_>>().join("; ")
}

fn save(path: &Path, tensors: InMemoryTensors) -> Result<()> {
    Ok(clearform_weights::save(path, &tensors, &BTreeMap::new())?)
}

fn bad(path: &Path, reason: String) -> DistillError {
    DistillError::BadFile { path: path.to_owned(), reason }
}
