//! Options that several functions share. All are serde values with the defaults of the command line.

use crate::Result;
use candle_core::{DType, Device};
use clearform_distill::{Precision, SampleSet};
use clearform_models::FamilyRegistry;
use clearform_runtime::MemoryOptions;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// How a source is read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// A diffusers config.json, for a single file whose tensors do not determine every size.
    pub config: Option<PathBuf>,
    /// Reads the source as this family, instead of detecting it.
    pub family: Option<String>,
    /// Reads the source as this variant, instead of detecting it.
    pub variant: Option<String>,
    /// An additional manifest of families, layouts and variants.
    pub manifest: Option<PathBuf>,
    /// Continues although tensors of the source are not understood.
    pub allow_unmatched: bool,
    /// The families that can be run, for programs that bring their own.
    #[serde(skip)]
    pub families: FamilyRegistry,
}

/// A device to compute on. Written as `cpu` or `cuda:N`; `cuda` is `cuda:0`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ComputeDevice {
    /// The CPU.
    #[default]
    Cpu,
    /// The NVIDIA GPU with this index, in a build with the feature `cuda`.
    Cuda(usize),
}

/// A dtype to compute or store in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatDtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
}

/// How a student is distilled. What is `None` is chosen for the model, by [`Recipe`](crate::Recipe).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingOptions {
    /// A file of prompts to generate samples from, or class indices, one per line, with comments in lines that begin
    /// with `#`. `None`: built-in prompts, or evenly spread classes.
    pub prompts: Option<PathBuf>,
    /// Folder of the samples: those of an earlier run, or new ones if it does not exist. `None` keeps them only until
    /// the model is written.
    pub samples: Option<PathBuf>,
    /// Number of samples to generate.
    pub sample_count: Option<usize>,
    /// Number of samples that are not trained on and on which the student is judged; 0 for no verdict.
    pub held_out: usize,
    /// Denoising steps per sample.
    pub sample_steps: Option<usize>,
    /// Width and height of the samples, in pixels; `None` is the model's native size.
    pub sample_size: Option<usize>,
    /// Optimizer steps.
    pub steps: Option<usize>,
    /// Ends the training when the error on held-out samples is flat. Steps or time are then the most that it may take.
    pub until_flat: bool,
    /// Time to train in seconds, instead of a number of steps: as many steps as fit, by the time of the first ones.
    pub time: Option<f64>,
    /// Samples per batch.
    pub batch: Option<usize>,
    /// Batches whose gradients are accumulated for one optimizer step.
    pub accumulate: usize,
    /// Peak learning rate.
    pub learning_rate: Option<f64>,
    /// Weights of the losses against the target, the teacher's prediction and its attention outputs (CLEAR, equation 6).
    pub losses: Option<[f64; 3]>,
    /// Applies the attention loss to every Nth block (FLUX: every Nth single-stream block).
    pub attention_every: Option<usize>,
    /// Dtype of activations during training; `None`: f32 on a CPU, bf16 on a GPU. Trained parameters are f32 in any case.
    pub precision: Option<Precision>,
    /// Keeps every block's activations instead of recomputing them: faster, but needs more memory. Small models always
    /// do.
    pub keep_activations: bool,
    /// Optimizer steps between checkpoints.
    pub checkpoint_every: usize,
    /// Optimizer steps between images of the student in the live report; 0 for none. `None`: a fifth of the steps in a
    /// small model, else none.
    pub images_every: Option<usize>,
    /// How much memory samples and training may take.
    pub memory: MemoryOptions,
    /// Seed of samples, noise and timesteps.
    pub seed: u64,
    /// Resumes an interrupted run.
    pub resume: bool,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        Self {
            prompts: None,
            samples: None,
            sample_count: None,
            held_out: 16,
            sample_steps: None,
            sample_size: None,
            steps: None,
            until_flat: false,
            time: None,
            batch: None,
            accumulate: 1,
            learning_rate: None,
            losses: None,
            attention_every: None,
            precision: None,
            keep_activations: false,
            checkpoint_every: 50,
            images_every: None,
            memory: MemoryOptions::default(),
            seed: 0,
            resume: false,
        }
    }
}

impl TrainingOptions {
    /// Whether samples are generated, which needs the whole pipeline: there are none from an earlier run.
    pub fn generates_samples(&self) -> bool {
        self.samples.as_ref().is_none_or(|folder| !SampleSet::is_in(folder))
    }
}

impl ComputeDevice {
    /// Opens the device.
    ///
    /// # Errors
    /// A GPU in a build without the feature `cuda`, or one that does not exist.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(index) => open_gpu(index),
        }
    }
}

#[cfg(feature = "cuda")]
fn open_gpu(index: usize) -> Result<Device> {
    use crate::error::WithContext as _;
    clearform_ops::cuda::device(index).context(format_args!("--device cuda:{index}"))
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(index: usize) -> Result<Device> {
    Err(crate::ClearformError::bad_option(format!(
        "--device cuda:{index}: this build has no CUDA support; rebuild with --features cuda"
    )))
}

impl fmt::Display for FloatDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(DType::from(*self).as_str())
    }
}

impl FromStr for ComputeDevice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let cuda = || text.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda);
        let device = match text {
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => cuda(),
        };
        device.ok_or_else(|| "expected cpu, cuda or cuda:N".to_owned())
    }
}

impl TryFrom<String> for ComputeDevice {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<ComputeDevice> for String {
    fn from(device: ComputeDevice) -> Self {
        device.to_string()
    }
}

impl fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl From<FloatDtype> for DType {
    fn from(dtype: FloatDtype) -> Self {
        match dtype {
            FloatDtype::F32 => Self::F32,
            FloatDtype::Bf16 => Self::BF16,
            FloatDtype::F16 => Self::F16,
        }
    }
}
