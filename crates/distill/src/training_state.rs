//! [`TrainingState`]: everything that training resumes from, in one file, so that a single rename commits all of it.

use crate::differences::{differences, read_back};
use crate::loss_log::{from_lines, to_lines};
use crate::sample_files::{bad, open};
use crate::{DistillError, DistillSettings, LossEntry, OptimizerState, Result, SampleSettings};
use candle_core::{Device, Tensor};
use clearform_sampling::TorchGenerator;
use clearform_weights::{Checkpoint, InMemoryTensors, TensorSource, content_hash};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

/// Key of [`StateMetadata`] in the metadata of the safetensors file.
const STATE: &str = "clearform.training";
/// Key of [`ResumeRequirements`].
const REQUIREMENTS: &str = "clearform.settings";
/// Key of the [`content_hash`] of the tensors; absent in states of earlier versions.
const CONTENT: &str = "clearform.content_sha256";
/// Name of the tensor with the losses of all steps, as bytes of JSON lines; absent in states of earlier versions.
const LOSSES: &str = "losses";
/// The file in the same folder that states of earlier versions have their losses from.
pub(crate) const LOSS_FILE: &str = "losses.jsonl";
const EDITION: u32 = 1;

/// The state of a training run after some step.
#[derive(Debug)]
pub(crate) struct TrainingState {
    pub metadata: StateMetadata,
    pub requirements: ResumeRequirements,
    /// The trained parameters.
    pub masters: BTreeMap<String, Tensor>,
    /// Their moving average; empty if there is none.
    pub average: BTreeMap<String, Tensor>,
    pub optimizer: OptimizerState,
    /// The losses of all steps.
    pub losses: Vec<LossEntry>,
}

/// The state besides tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StateMetadata {
    pub edition: u32,
    /// Steps done.
    pub step: usize,
    /// Seconds of training, over all runs.
    pub seconds: f64,
    /// The step after which the held-out error was flat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flat_at: Option<usize>,
    /// State of the random generator that draws batches.
    pub generator: TorchGenerator,
}

/// What must be the same on resume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ResumeRequirements {
    pub settings: DistillSettings,
    pub samples: SampleSettings,
    /// What tells teacher, start of the student and attention from others; empty in states of earlier versions.
    #[serde(default)]
    pub models: String,
}

impl StateMetadata {
    /// The state before the first step.
    pub(crate) fn new(seed: u64) -> Self {
        Self { edition: EDITION, step: 0, seconds: 0.0, flat_at: None, generator: TorchGenerator::new(seed) }
    }
}

impl TrainingState {
    /// Writes the state to `path`, whole or not at all.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let groups = [
            ("master", &self.masters),
            ("average", &self.average),
            ("first", &self.optimizer.first),
            ("second", &self.optimizer.second),
        ];
        let mut all = InMemoryTensors::default();
        for (group, tensors) in groups {
            tensors.iter().for_each(|(name, tensor)| all.insert(format!("{group}/{name}"), tensor.clone()));
        }
        let losses = to_lines(&self.losses).map_err(|error| bad(path, error.to_string()))?;
        all.insert(LOSSES.to_owned(), Tensor::new(losses.as_bytes(), &Device::Cpu)?);
        let metadata = BTreeMap::from([
            (STATE.to_owned(), to_json(&self.metadata, path)?),
            (REQUIREMENTS.to_owned(), to_json(&self.requirements, path)?),
            (CONTENT.to_owned(), hash_of_all(&all)?),
        ]);
        Ok(clearform_weights::save(path, &all, &metadata)?)
    }

    /// The settings of the state at `path`.
    ///
    /// # Errors
    /// A file that is not a training state.
    pub(crate) fn recorded_settings(path: &Path) -> Result<DistillSettings> {
        let file = open(path)?;
        let found =
            file.metadata().get(REQUIREMENTS).and_then(|text| serde_json::from_str::<ResumeRequirements>(text).ok());
        let requirements = found.ok_or_else(|| bad(path, "not a training state of clearform".to_owned()))?;
        Ok(requirements.settings)
    }

    /// Reads the state at `path` to `device`.
    ///
    /// # Errors
    /// [`DistillError::OtherSettings`] if its requirements are not `requirements`; a file that is not a training state.
    pub(crate) fn load(path: &Path, requirements: ResumeRequirements, device: &Device) -> Result<Self> {
        let file = open(path)?;
        let metadata = read_metadata(path, file.metadata().get(STATE))?;
        check_requirements(path, file.metadata().get(REQUIREMENTS), &requirements)?;
        check_content(path, &file)?;
        let group = |prefix| read_group(&file, prefix, device);
        let optimizer = OptimizerState { steps: metadata.step, first: group("first/")?, second: group("second/")? };
        let losses = read_losses(&file, path, metadata.step)?;
        Ok(Self { metadata, requirements, masters: group("master/")?, average: group("average/")?, optimizer, losses })
    }
}

fn hash_of_all(source: &dyn TensorSource) -> Result<String> {
    let tensors = source.tensors();
    let mut names: Vec<&str> = tensors.iter().map(|info| info.name.as_str()).collect();
    names.sort_unstable();
    Ok(content_hash(source, names)?)
}

/// Refuses tensors that have changed since they were written.
fn check_content(path: &Path, file: &Checkpoint) -> Result<()> {
    match file.metadata().get(CONTENT) {
        Some(recorded) if *recorded != hash_of_all(file)? => Err(bad(
            path,
            "its tensors have changed since they were written; delete this file and rerun with --resume, which trains \
             from the first step on"
                .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// Compares values, not texts: earlier versions wrote some keys under other names.
fn check_requirements(path: &Path, text: Option<&String>, now: &ResumeRequirements) -> Result<()> {
    let now = read_back(now).map_err(|error| bad(path, error.to_string()))?;
    let found = text.and_then(|text| serde_json::from_str::<ResumeRequirements>(text).ok());
    let differing = match found {
        Some(found) if found.allows(&now) => return Ok(()),
        Some(found) => found.differences(&now),
        None => "all".to_owned(),
    };
    Err(DistillError::OtherSettings { path: path.to_owned(), differing })
}

impl ResumeRequirements {
    /// Whether a training that was begun with these may go on with `now`.
    fn allows(&self, now: &Self) -> bool {
        let Self { settings, samples, .. } = self;
        (settings, samples) == (&now.settings, &now.samples) && self.has_models_of(now)
    }

    fn has_models_of(&self, now: &Self) -> bool {
        self.models.is_empty() || self.models == now.models
    }

    fn differences(&self, now: &Self) -> String {
        let models = match self.has_models_of(now) {
            true => String::new(),
            false => "another teacher, another student to start from, or other attention".to_owned(),
        };
        let lists = [models, differences(&self.settings, &now.settings), differences(&self.samples, &now.samples)];
        lists.into_iter().filter(|list| !list.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

fn read_metadata(path: &Path, text: Option<&String>) -> Result<StateMetadata> {
    let text = text.ok_or_else(|| bad(path, "not a training state of clearform".to_owned()))?;
    let metadata: StateMetadata = serde_json::from_str(text)
        .map_err(|error| bad(path, format!("a training state that this version cannot read: {error}")))?;
    match metadata.edition {
        EDITION => Ok(metadata),
        other => Err(bad(path, format!("edition {other}, this version reads {EDITION}; upgrade clearform"))),
    }
}

fn to_json<T: Serialize>(value: &T, path: &Path) -> Result<String> {
    serde_json::to_string(value).map_err(|error| bad(path, error.to_string()))
}

/// The losses of the steps up to `step`: from the state, or for one of an earlier version from the file beside it, if there is
/// one.
fn read_losses(state: &Checkpoint, path: &Path, step: usize) -> Result<Vec<LossEntry>> {
    if state.tensors().iter().any(|info| info.name == LOSSES) {
        let text = String::from_utf8_lossy(&state.tensor(LOSSES)?.to_vec1::<u8>()?).into_owned();
        return Ok(from_lines(&text, step));
    }
    let path = path.with_file_name(LOSS_FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(from_lines(&text, step)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(DistillError::Io { path, source }),
    }
}

fn read_group(source: &dyn TensorSource, prefix: &str, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let names = source.tensors().into_iter().map(|info| info.name);
    let stripped = names.filter_map(|name| Some((name.strip_prefix(prefix)?.to_owned(), name)));
    stripped.map(|(short, name)| Ok((short, source.tensor(&name)?.to_device(device)?))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Decay, LearningRate, LossSettings};
    use clearform_models::Prompt;

    /// The requirements as the version before the key `denoising` wrote them.
    const OLD: &str = concat!(
        r#"{"settings":{"steps":6,"batch":2,"accumulation":2,"optimizer":{"adam_w":{"beta1":0.9,"beta2":0.99,"#,
        r#""epsilon":1e-8,"weight_decay":0.0}},"learning_rate":{"peak":0.002,"warmup":2,"decay":{"cosine":"#,
        r#"{"floor":0.02}}},"clip":1.0,"ema":0.9,"timesteps":{"logit_normal":{"mean":0.0,"deviation":1.0}},"#,
        r#""loss":{"flow":0.7,"prediction":0.5,"attention":0.5,"every":2,"layers":null},"precision":"f32","#,
        r#""activations":"recompute","seed":3},"samples":{"prompts":["cat",7],"count":7,"batch":3,"size":[48,32],"#,
        r#""steps":2,"guidance":null,"classifier_free":{"scale":3.0,"without":"","channels":null},"seed":5}}"#,
    );

    fn requirements() -> ResumeRequirements {
        let settings = DistillSettings {
            steps: 6,
            batch: 2,
            accumulation: 2,
            ema: Some(0.9),
            timesteps: crate::Timesteps::LogitNormal { mean: 0.0, deviation: 1.0 },
            learning_rate: LearningRate { peak: 2e-3, warmup: 2, decay: Decay::Cosine { floor: 0.02 } },
            loss: LossSettings { denoising: 0.7, every: 2, ..LossSettings::default() },
            seed: 3,
            ..DistillSettings::default()
        };
        let unconditional = Prompt::Text(String::new());
        let samples = SampleSettings {
            prompts: vec![Prompt::Text("cat".to_owned()), Prompt::Class(7)],
            count: 7,
            batch: 3,
            size: [48, 32],
            steps: 2,
            guidance: None,
            classifier_free: Some(crate::ClassifierFree { scale: 3.0, unconditional, channels: None }),
            seed: 5,
        };
        ResumeRequirements { settings, samples, models: "abc".to_owned() }
    }

    /// A training state whose metadata are `state` and `requirements`, with one tensor in each group.
    fn write_state(path: &Path, state: &str, requirements: &str) {
        let tensor = |value: f32| Tensor::new(&[value], &Device::Cpu).unwrap();
        let groups = [("master/a", 1.0), ("average/a", 2.0), ("first/a", 3.0), ("second/a", 4.0)];
        let tensors: InMemoryTensors =
            groups.into_iter().map(|(name, value)| (name.to_owned(), tensor(value))).collect();
        let metadata =
            [("clearform.training", state), ("clearform.settings", requirements)].map(|(k, v)| (k.into(), v.into()));
        clearform_weights::save(path, &tensors, &BTreeMap::from(metadata)).unwrap();
    }

    fn old_state() -> String {
        let words = vec!["7"; 624].join(",");
        format!(r#"{{"edition":1,"step":4,"seconds":12.5,"generator":{{"words":[{words}],"used":600,"spare":null}}}}"#)
    }

    #[test]
    fn a_training_state_of_an_earlier_version_is_resumed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("training.safetensors");
        write_state(&path, &old_state(), OLD);
        let state = TrainingState::load(&path, requirements(), &Device::Cpu).unwrap();
        assert_eq!((state.metadata.step, state.metadata.seconds, state.optimizer.steps), (4, 12.5, 4));
        let value = |tensors: &BTreeMap<String, Tensor>| tensors["a"].to_vec1::<f32>().unwrap()[0];
        let optimizer = &state.optimizer;
        let found = [&state.masters, &state.average, &optimizer.first, &optimizer.second].map(value);
        assert_eq!(found, [1.0, 2.0, 3.0, 4.0]);

        // Saved again it bears the new key and is still read.
        state.save(&path).unwrap();
        let written = Checkpoint::open(&path).unwrap().metadata()["clearform.settings"].clone();
        let renamed = OLD.replace("flow", "denoising");
        assert_eq!(written, format!(r#"{},"models":"abc"}}"#, &renamed[..renamed.len() - 1]));
        assert_eq!(TrainingState::load(&path, requirements(), &Device::Cpu).unwrap().metadata.step, 4);

        // It is that of these models alone.
        let others = ResumeRequirements { models: "def".to_owned(), ..requirements() };
        let error = TrainingState::load(&path, others, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("another teacher"), "{error}");
    }

    #[test]
    fn a_state_whose_tensors_changed_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("training.safetensors");
        write_state(&path, &old_state(), OLD);
        TrainingState::load(&path, requirements(), &Device::Cpu).unwrap().save(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = TrainingState::load(&path, requirements(), &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("have changed") && error.contains("delete this file"), "{error}");
    }

    #[test]
    fn other_settings_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("training.safetensors");
        let differing = |old: &str, new: &str| {
            write_state(&path, &old_state(), &OLD.replacen(old, new, 1));
            TrainingState::load(&path, requirements(), &Device::Cpu).unwrap_err().to_string()
        };
        let error = differing("\"flow\":0.7", "\"flow\":0.8");
        assert!(error.contains("(loss.denoising: 0.8, now 0.7)") && error.contains("start over"), "{error}");
        let error = differing("\"scale\":3.0", "\"scale\":4.0");
        assert!(error.contains("(classifier_free.scale: 4.0, now 3.0)"), "{error}");
        let error = differing("\"settings\"", "\"other\"");
        assert!(error.contains("(all)"), "{error}");
        // A key that has a value in the file alone.
        write_state(&path, &old_state(), OLD);
        let mut plain = requirements();
        plain.samples.classifier_free = None;
        let error = TrainingState::load(&path, plain, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("classifier_free") && error.contains("now null"), "{error}");
    }
}
