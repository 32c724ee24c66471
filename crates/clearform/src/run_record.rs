//! The options of a run that may be interrupted, kept in its work folder: resuming needs none of them again.

use crate::error::WithContext as _;
use crate::observer::{Observer, note};
use crate::{ClearformError, Result};
use clearform_portable_model::StagingDir;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

const FILE: &str = "options.json";

/// The key of the command that began a run.
const COMMAND: &str = "command";

/// What a resumed run may change, or is always told: it does not change the result.
const FREE: [&str; 8] =
    ["output", "resume", "device", "copy_mode", "checkpoint_every", "images_every", "memory", "keep_activations"];

/// Models that a run is about. They may have moved since it was begun.
const MODELS: [&str; 3] = ["source", "model", "teacher"];

/// What either may allow, the run that is resumed or the one that resumes it.
const OVERWRITE: &str = "overwrite";

/// The options of a run under way. Dropped while there is no work to resume, it takes them away.
#[must_use]
pub struct KeptOptions {
    work: PathBuf,
}

/// Keeps the options of `command` in the folder `work`, unless there is work of unknown options there.
///
/// # Errors
/// The file cannot be written.
pub fn keep(command: &str, options: &impl Serialize, work: &Path) -> Result<KeptOptions> {
    let kept = KeptOptions { work: work.to_owned() };
    if !work.join(FILE).exists() && !kept.is_alone() {
        return Ok(kept);
    }
    let mut recorded = serde_json::to_value(options)?;
    recorded[COMMAND] = command.into();
    clearform_weights::write_atomically(work.join(FILE), &serde_json::to_vec_pretty(&recorded)?)?;
    Ok(kept)
}

impl KeptOptions {
    /// Whether there is no work beside them.
    fn is_alone(&self) -> bool {
        let mut names = std::fs::read_dir(&self.work).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.all(|name| name == FILE || StagingDir::is_scaffold(&name))
    }
}

impl Drop for KeptOptions {
    fn drop(&mut self) {
        if self.is_alone() {
            let _ = std::fs::remove_file(self.work.join(FILE));
            StagingDir::remove_empty(&self.work);
        }
    }
}

/// The options with which the interrupted run in `work` goes on: those that it was begun with, except for what it may
/// change. `None` if there is no such run. `usual` are the options of a user who says nothing.
///
/// # Errors
/// `given` states another value of an option that must stay, another command than `command` began the run, or the kept
/// options cannot be read.
pub fn resumed<T: Serialize + DeserializeOwned>(command: &str, given: &T, usual: &T, work: &Path) -> Result<Option<T>> {
    let path = work.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let kept: Value = serde_json::from_slice(&std::fs::read(&path).context(path.display())?).map_err(|error| {
        let path = path.display();
        ClearformError::bad_option(format!("{path}: is damaged: {error}; delete the folder to start over"))
    })?;
    if let Some(other) = kept[COMMAND].as_str().filter(|other| *other != command) {
        return Err(ClearformError::bad_option(format!(
            "{}: contains an interrupted run of `clearform {other}`; resume it with that command, choose another -o, or \
             delete the folder to start over",
            work.display()
        )));
    }
    let merged = merge("", kept, serde_json::to_value(given)?, &serde_json::to_value(usual)?);
    let merged = merged.map_err(|reason| {
        let path = path.display();
        ClearformError::bad_option(format!(
            "{path}: {reason}; leave the option out, or delete the folder to start over"
        ))
    })?;
    Ok(Some(serde_json::from_value(merged).context(path.display())?))
}

/// Says which options a run in `work` goes on with, where it should resume one and its own are `given`.
pub fn say<T: PartialEq>(resumed: Option<&T>, given: &T, work: &Path, observer: &mut dyn Observer) {
    match resumed {
        None if work.exists() => note(
            observer,
            format_args!(
                "{} lacks {FILE}: what is there goes on if these options are those it was begun with",
                work.display()
            ),
        ),
        None => note(observer, "there is no interrupted run to resume: a new one begins"),
        Some(resumed) if resumed != given => note(observer, "the run goes on with the options that it was begun with"),
        Some(_) => {}
    }
}

/// The value of option `key` to go on with.
fn merge(key: &str, kept: Value, given: Value, usual: &Value) -> std::result::Result<Value, String> {
    match (kept, given) {
        (Value::Object(mut kept), Value::Object(given)) => {
            let mut merged = Map::new();
            for (key, given) in given {
                let value = match kept.remove(&key) {
                    Some(kept) => merge(&key, kept, given, &usual[&key])?,
                    None => given,
                };
                merged.insert(key, value);
            }
            Ok(Value::Object(merged))
        }
        (_, given) if FREE.contains(&key) => Ok(given),
        (kept, given) if MODELS.contains(&key) && !are_two_places(&kept, &given) => Ok(given),
        (kept, given) if key == OVERWRITE => Ok(if given == *usual { kept } else { given }),
        (kept, given) if (given == *usual && !MODELS.contains(&key)) || given == kept => Ok(kept),
        (kept, given) => Err(format!("the run was begun with {key} {kept}, found {given}")),
    }
}

/// Whether both paths lead somewhere, and not to the same place.
fn are_two_places(kept: &Value, given: &Value) -> bool {
    let place = |path: &Value| std::fs::canonicalize(path.as_str()?).ok();
    matches!((place(kept), place(given)), (Some(kept), Some(given)) if kept != given)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{ConvertOptions, TrainingOptions};
    use clearform_portable_model::Overwrite;

    fn options(attention: &str, training: TrainingOptions) -> ConvertOptions {
        ConvertOptions {
            attention: attention.parse().unwrap(),
            training: Some(training),
            ..ConvertOptions::new("a", "b")
        }
    }

    #[test]
    fn a_resumed_run_knows_its_settings() {
        let folder = tempfile::tempdir().unwrap();
        let usual = ConvertOptions::new("a", "b");
        assert!(resumed("convert", &usual, &usual, folder.path()).unwrap().is_none());
        let begun =
            TrainingOptions { steps: Some(7), seed: 3, learning_rate: Some(3e-3), ..TrainingOptions::default() };
        let _kept = keep("convert", &options("clear:r=4,d=2", begun.clone()), folder.path()).unwrap();
        let resume = TrainingOptions { resume: true, checkpoint_every: 5, ..TrainingOptions::default() };
        let goes_on = resumed("convert", &options("clear:r=16", resume), &usual, folder.path()).unwrap().unwrap();
        let wanted = TrainingOptions { resume: true, checkpoint_every: 5, ..begun };
        assert_eq!(goes_on, options("clear:r=4,d=2", wanted));
    }

    #[test]
    fn what_may_be_replaced_stays_allowed() {
        let usual = ConvertOptions::new("a", "b");
        let replacing = ConvertOptions { overwrite: Overwrite::PortableModel, ..usual.clone() };
        for (begun, given) in [(&replacing, &usual), (&usual, &replacing)] {
            let folder = tempfile::tempdir().unwrap();
            let _kept = keep("convert", begun, folder.path()).unwrap();
            let goes_on = resumed("convert", given, &usual, folder.path()).unwrap().unwrap();
            assert_eq!(goes_on.overwrite, Overwrite::PortableModel);
        }
    }

    /// A model may have moved since, but must not be another one.
    #[test]
    fn another_source_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
        std::fs::create_dir(&first).unwrap();
        let work = folder.path().join("work");
        std::fs::create_dir(&work).unwrap();
        let of = |source: &Path| ConvertOptions::new(source, "b");
        let _kept = keep("convert", &of(&first), &work).unwrap();
        let go_on = |source: &Path| resumed("convert", &of(source), &of(source), &work);
        assert_eq!(go_on(&second).unwrap(), Some(of(&second)));
        std::fs::create_dir(&second).unwrap();
        let error = go_on(&second).unwrap_err().to_string();
        assert!(error.contains("the run was begun with source"), "{error}");
        assert!(go_on(&first.join(".")).is_ok());
    }

    #[test]
    fn other_settings_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let usual = ConvertOptions::new("a", "b");
        let steps = |steps| TrainingOptions { steps: Some(steps), ..TrainingOptions::default() };
        let _kept = keep("convert", &options("clear:r=4", steps(7)), folder.path()).unwrap();
        for (given, says) in [
            (options("clear:r=8", steps(7)), "begun with attention \"clear:r=4\", found \"clear:r=8\""),
            (options("clear:r=4", steps(8)), "begun with steps 7, found 8"),
        ] {
            let error = resumed("convert", &given, &usual, folder.path()).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("options.json"), "{error}");
        }
        let error = resumed("distill", &usual, &usual, folder.path()).unwrap_err().to_string();
        assert!(error.contains("an interrupted run of `clearform convert`"), "{error}");
    }
}
