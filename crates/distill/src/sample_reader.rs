//! [`SampleReader`]: reads the samples of a set for training.

use crate::Result;
use crate::sample_files::{SampleFiles, SampleIndex, bad, open};
use candle_core::{DType, Device, Tensor};
use clearform_models::Conditions;
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource, is_finite};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Samples read for training.
#[derive(Debug, Clone)]
pub struct Samples {
    /// Latents, f32, (batch, ...) as the transformer takes them.
    pub latents: Tensor,
    /// The encoded prompts they were generated from.
    pub conditions: Conditions,
}

/// Reads samples. It holds the files of a set in memory up to [`CAPACITY`], so that a training step opens no file; of a
/// larger set the rest is read when it is drawn.
#[derive(Debug)]
pub(crate) struct SampleReader<'a> {
    files: &'a SampleFiles,
    held: BTreeMap<PathBuf, InMemoryTensors>,
    /// Bytes of files that may still be held.
    room: u64,
}

/// Bytes of files that are held: 1 GiB, which is 1000 images of 1024 px with FLUX's VAE without their prompts, or 250
/// prompts of T5-XXL.
const CAPACITY: u64 = 1 << 30;

impl<'a> SampleReader<'a> {
    /// A reader that holds nothing.
    pub fn new(files: &'a SampleFiles) -> Self {
        Self { files, held: BTreeMap::new(), room: 0 }
    }

    /// A reader that holds as many files as it may.
    ///
    /// # Errors
    /// A file of the set is missing or damaged.
    pub fn holding(files: &'a SampleFiles) -> Result<Self> {
        let mut reader = Self { room: CAPACITY, ..Self::new(files) };
        for path in files.files() {
            reader.hold(path)?;
        }
        Ok(reader)
    }

    fn hold(&mut self, path: PathBuf) -> Result<()> {
        let file = open(&path)?;
        let size: u64 = file.tensors().iter().map(|info| info.byte_count()).sum();
        if size <= self.room {
            let held = load(&path, &file)?;
            self.held.insert(path, held);
            self.room -= size;
        }
        Ok(())
    }

    /// Reads samples by index.
    ///
    /// # Errors
    /// A file is missing or belongs to another set.
    pub fn read(&self, indices: &[SampleIndex], device: &Device) -> Result<Samples> {
        let rows = indices.iter().map(|index| self.latents(index.sample)).collect::<Result<Vec<_>>>()?;
        let latents = Tensor::stack(&rows, 0)?.to_device(device)?;
        let prompts: Vec<usize> = indices.iter().map(|index| self.files.prompt_of(*index)).collect();
        Ok(Samples { latents, conditions: self.conditions(&prompts, device)? })
    }

    /// The conditions of prompts, which are counted as in [`SampleFiles::prompts`].
    ///
    /// # Errors
    /// A file is missing.
    pub fn conditions(&self, prompts: &[usize], device: &Device) -> Result<Conditions> {
        let mut features = self.features(prompts)?;
        let ids = self.tensors(&self.files.ids_path())?;
        let of_ids = |name: &str| -> Result<Option<Tensor>> {
            ids.get(name).map(|tensor| Ok(tensor.to_device(device)?)).transpose()
        };
        let scale = |scale: f64| Tensor::new(vec![scale as f32; prompts.len()], device);
        let shared = Conditions {
            guidance: self.files.settings.guidance.map(scale).transpose()?,
            image_ids: of_ids("image_ids")?,
            text_ids: of_ids("text_ids")?,
            ..Conditions::default()
        };
        shared.map_samples(|name, value| match features.remove(name) {
            Some(rows) => Ok(Some(Tensor::stack(&rows, 0)?.to_device(device)?)),
            None => Ok(value.clone()),
        })
    }

    /// The latents of one sample. From a file that is not held only its bytes are read: a batch of large images may take
    /// hundreds of megabytes.
    fn latents(&self, sample: usize) -> Result<Tensor> {
        let (path, row) = self.files.place_of(sample);
        let lacks =
            || bad(&path, format!("does not contain sample {sample}; delete this file and rerun with --resume"));
        if let Some(held) = self.held.get(&path) {
            return held.tensor("latents")?.get(row).map_err(|_| lacks());
        }
        let file = open(&path)?;
        let info = file.info("latents").filter(|info| info.shape.first().is_some_and(|&rows| rows > row));
        let info = info.ok_or_else(lacks)?;
        let shape = &info.shape[1..];
        let size = shape.iter().product::<usize>() * size_of::<f32>();
        let bytes = file.read_range("latents", row * size..(row + 1) * size)?;
        let latents = Tensor::from_raw_buffer(&bytes, DType::F32, shape, &Device::Cpu)?;
        check_finite(&path, "latents", &latents)?;
        Ok(latents)
    }

    /// The stored tensors of `prompts` by name, one for each prompt.
    fn features(&self, prompts: &[usize]) -> Result<BTreeMap<String, Vec<Tensor>>> {
        let mut features: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for &prompt in prompts {
            for (name, tensor) in self.tensors(&self.files.prompt_path(prompt))? {
                features.entry(name).or_default().push(tensor);
            }
        }
        Ok(features)
    }

    /// All tensors of a file.
    fn tensors(&self, path: &Path) -> Result<BTreeMap<String, Tensor>> {
        let tensors = match self.held.get(path) {
            Some(held) => held.clone(),
            None => load(path, &open(path)?)?,
        };
        Ok(tensors.iter().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect())
    }
}

/// All tensors of `file`, which is that at `path`.
fn load(path: &Path, file: &Checkpoint) -> Result<InMemoryTensors> {
    let tensors = InMemoryTensors::load(file, None, &Device::Cpu)?;
    tensors.iter().try_for_each(|(name, tensor)| check_finite(path, name, tensor))?;
    Ok(tensors)
}

/// Refuses a tensor that would make every loss NaN.
fn check_finite(path: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    match is_finite(tensor)? {
        true => Ok(()),
        false => Err(bad(
            path,
            format!("tensor {name:?} contains NaN or infinity; delete this file and rerun with --resume"),
        )),
    }
}
