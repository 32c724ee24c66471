//! [`TrainingState`]: everything that training continues from, in one file, so that one rename commits it all.

use crate::samples::differences;
use crate::{DistillError, DistillSettings, OptimizerState, Result, SampleSettings};
use candle_core::{Device, Tensor};
use clearform_sampling::TorchGenerator;
use clearform_weights::{InMemoryTensors, TensorSource};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

const RECORD: &str = "clearform.training";
const BEGUN: &str = "clearform.settings";
const EDITION: u32 = 1;

/// Where training stands.
#[derive(Debug)]
pub(crate) struct TrainingState {
    pub record: StateMetadata,
    pub begun: ResumeRequirements,
    pub masters: BTreeMap<String, Tensor>,
    pub average: BTreeMap<String, Tensor>,
    pub optimizer: OptimizerState,
}

/// What is not a tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StateMetadata {
    pub edition: u32,
    pub step: usize,
    pub seconds: f64,
    pub generator: TorchGenerator,
}

/// What must be the same on resume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ResumeRequirements {
    pub settings: DistillSettings,
    pub samples: SampleSettings,
}

impl StateMetadata {
    pub(crate) fn new(seed: u64) -> Self {
        Self { edition: EDITION, step: 0, seconds: 0.0, generator: TorchGenerator::new(seed) }
    }
}

impl TrainingState {
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let groups = [
            ("master", &self.masters),
            ("average", &self.average),
            ("first", &self.optimizer.first),
            ("second", &self.optimizer.second),
        ];
        let name = |group: &str, (name, tensor): (&String, &Tensor)| (format!("{group}/{name}"), tensor.clone());
        let tensors: InMemoryTensors = groups
            .into_iter()
            .flat_map(|(group, tensors)| tensors.iter().map(move |models| name(group, models)))
            .collect();
        let metadata = [(RECORD.to_owned(), json(&self.record, path)?), (BEGUN.to_owned(), json(&self.begun, path)?)];
        Ok(clearform_weights::save(path, &tensors, &BTreeMap::from(metadata))?)
    }

    /// Reads a state that was begun as `begun` says, to `device`.
    pub(crate) fn load(path: &Path, begun: ResumeRequirements, device: &Device) -> Result<Self> {
        let file = clearform_weights::Checkpoint::open(path)?;
        let record = record(path, file.metadata().get(RECORD))?;
        let found = file.metadata().get(BEGUN).map_or("", String::as_str);
        // As text: a number read back from text may differ in its last bit from the one that was written.
        if found != json(&begun, path)? {
            let differing = serde_json::from_str(found)
                .map_or("all".to_owned(), |found: ResumeRequirements| found.differences(&begun));
            return Err(DistillError::OtherSettings { path: path.to_owned(), differing });
        }
        let group = |prefix| group(&file, prefix, device);
        let (first, second) = (group("first/")?, group("second/")?);
        let optimizer = OptimizerState { steps: record.step, first, second };
        Ok(Self { record, begun, masters: group("master/")?, average: group("average/")?, optimizer })
    }
}

impl ResumeRequirements {
    fn differences(&self, now: &Self) -> String {
        let parts = [differences(&self.settings, &now.settings), differences(&self.samples, &now.samples)];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

fn record(path: &Path, text: Option<&String>) -> Result<StateMetadata> {
    let text = text.ok_or_else(|| bad(path, "not a checkpoint of clearform's training".to_owned()))?;
    let record: StateMetadata = serde_json::from_str(text)
        .map_err(|error| bad(path, format!("a checkpoint that this version cannot read: {error}")))?;
    match record.edition {
        EDITION => Ok(record),
        other => Err(bad(path, format!("edition {other}, this version reads {EDITION}; upgrade clearform"))),
    }
}

fn json<T: Serialize>(value: &T, path: &Path) -> Result<String> {
    serde_json::to_string(value).map_err(|error| bad(path, error.to_string()))
}

fn group(source: &dyn TensorSource, prefix: &str, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let names = source.tensors().into_iter().map(|info| info.name);
    let stripped = names.filter_map(|name| Some((name.strip_prefix(prefix)?.to_owned(), name)));
    stripped.map(|(short, name)| Ok((short, source.tensor(&name)?.to_device(device)?))).collect()
}

fn bad(path: &Path, reason: String) -> DistillError {
    DistillError::BadFile { path: path.to_owned(), reason }
}
