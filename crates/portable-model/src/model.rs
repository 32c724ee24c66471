//! [`PortableModel`]: a pipeline folder with a clearform.toml. Opening it checks the sizes of its files; [verifying] it
//! checks their hashes.
//!
//! [verifying]: PortableModel::verify

use crate::staging::extra_files;
use crate::{ModelRecord, PortableModelError, Result};
use clearform_attention::AttentionPlan;
use clearform_weights::{Checkpoint, digest};
use serde::Serialize;
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// An open portable model.
#[derive(Debug)]
pub struct PortableModel {
    folder: PathBuf,
    record: ModelRecord,
}

/// Key of a file's metadata: the attention plan of the transformer in it, in TOML.
pub const PLAN_METADATA: &str = "clearform.attention";

/// The attention plan that is recorded for the model at `path`, in its clearform.toml, or in the metadata of its single file
/// or the folder of a transformer; `None` if there is none. Opening a portable model checks the sizes of its files.
///
/// # Errors
/// As [`PortableModel::open`], or what the metadata holds is no plan.
pub fn recorded_plan(path: &Path) -> Result<Option<AttentionPlan>> {
    if PortableModel::is_portable_model(path) {
        return Ok(Some(PortableModel::open(path)?.record().plan()?));
    }
    if let Some(model) =
        path.parent().filter(|model| path.ends_with("transformer") && PortableModel::is_portable_model(model))
    {
        return recorded_plan(model);
    }
    let is_bare = path.join("config.json").is_file() && !path.join("model_index.json").exists();
    let is_file = path.extension().is_some_and(|extension| extension == "safetensors" || extension == "gguf");
    // A damaged file is reported where its tensors are read.
    let Some(file) = (is_bare || is_file).then(|| Checkpoint::open(path).ok()).flatten() else { return Ok(None) };
    let plan = file.metadata().get(PLAN_METADATA).map(|text| AttentionPlan::from_toml(text));
    plan.transpose().map_err(|error| PortableModelError::Invalid { path: path.to_owned(), reason: error.to_string() })
}

impl PortableModel {
    /// Whether `path` is a portable model.
    pub fn is_portable_model(path: &Path) -> bool {
        path.join(ModelRecord::FILE).is_file()
    }

    /// Opens the model in `folder` and compares the size of every file with the record, but for pages for people, which no
    /// command reads and an owner may edit.
    ///
    /// # Errors
    /// `folder` is not a portable model or has an unknown edition, or a file is missing or has another size.
    pub fn open(folder: &Path) -> Result<Self> {
        let model = Self { folder: folder.to_owned(), record: ModelRecord::read(folder)? };
        for file in model.record.file.iter().filter(|file| !is_page(&file.path)) {
            let found = std::fs::metadata(model.path_of(&file.path)?).map(|metadata| metadata.len()).ok();
            if found != Some(file.size) {
                let found = found.map_or("no file".to_owned(), |size| format!("{size} bytes"));
                return Err(model.invalid(format!(
                    "{:?}: expected {} bytes, found {found}; copy or convert the model again",
                    file.path, file.size
                )));
            }
        }
        Ok(model)
    }

    /// Its clearform.toml.
    pub fn record(&self) -> &ModelRecord {
        &self.record
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads every file in `folder` and compares it with the record. Files that differ are in the report.
    ///
    /// # Errors
    /// `folder` is not a portable model, its attention plan is none, or a file cannot be read.
    pub fn verify(folder: &Path) -> Result<VerifyReport> {
        let record = ModelRecord::read(folder)?;
        record.plan()?;
        // A link to a model is that model.
        let folder = &folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let model = Self { folder: folder.clone(), record };
        let mut report = VerifyReport::default();
        for file in &model.record.file {
            let path = model.path_of(&file.path)?;
            match std::fs::metadata(&path) {
                Err(_) => report.missing.push(file.path.clone()),
                Ok(metadata) if metadata.len() != file.size => report.changed.push(file.path.clone()),
                Ok(_) if digest(&path)?.sha256 != file.sha256 => report.changed.push(file.path.clone()),
                Ok(_) => report.unchanged += 1,
            }
        }
        report.extra = extra_files(folder, &model.record)?;
        Ok(report)
    }

    /// The path of a recorded file. A record is not trusted: its paths must not lead out of the model.
    fn path_of(&self, file: &str) -> Result<PathBuf> {
        let is_inside = Path::new(file).components().all(|component| matches!(component, Component::Normal(_)));
        match is_inside {
            true => Ok(self.folder.join(file)),
            false => Err(self.invalid(format!("recorded file {file:?} is outside the model"))),
        }
    }

    fn invalid(&self, reason: String) -> PortableModelError {
        PortableModelError::Invalid { path: self.folder.join(ModelRecord::FILE), reason }
    }
}

/// Whether a file of a model is a page for people: its card, or a report.
fn is_page(path: &str) -> bool {
    !path.contains('/') && [".md", ".html"].iter().any(|ending| path.ends_with(ending))
}

/// How a model's files compare with its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Number of files that match the record.
    pub unchanged: usize,
    /// Files with another size or hash.
    pub changed: Vec<String>,
    /// Files that are recorded but do not exist.
    pub missing: Vec<String>,
    /// Files that exist but are not recorded.
    pub extra: Vec<String>,
}

impl VerifyReport {
    /// Whether every file matches the record and there are no others.
    pub fn is_intact(&self) -> bool {
        self.changed.is_empty() && self.missing.is_empty() && self.extra.is_empty()
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, paths) in [("changed", &self.changed), ("missing", &self.missing), ("extra", &self.extra)] {
            paths.iter().try_for_each(|path| writeln!(f, "{what:<10} {path:?}"))?;
        }
        write!(f, "{} files match the record", self.unchanged)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::staging::{Overwrite, StagingDir};

    fn model(folder: &Path) -> PathBuf {
        let target = folder.join("model");
        let stage = StagingDir::begin(&target, Overwrite::Never).unwrap();
        std::fs::create_dir(stage.folder().join("vae")).unwrap();
        std::fs::write(stage.folder().join("vae/config.json"), "{}").unwrap();
        std::fs::write(stage.folder().join("README.md"), "read").unwrap();
        stage.finish(ModelRecord::new("flux", "dev", &AttentionPlan::full()).unwrap()).unwrap();
        target
    }

    #[test]
    fn a_finished_model_matches_its_record() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        assert!(!folder.path().join("model.work").exists());
        assert_eq!(PortableModel::open(&model).unwrap().record().file.len(), 2);
        let report = PortableModel::verify(&model).unwrap();
        assert!(report.is_intact() && report.unchanged == 2, "{report}");
        assert_eq!(recorded_plan(&model).unwrap(), Some(AttentionPlan::full()));
        assert_eq!(recorded_plan(folder.path()).unwrap(), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_model_is_verified_as_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(model(folder.path()), &link).unwrap();
        let report = PortableModel::verify(&link).unwrap();
        assert!(report.is_intact() && report.unchanged == 2, "{report}");
    }

    #[test]
    fn changes_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        std::fs::write(model.join("vae/config.json"), "[]").unwrap();
        std::fs::write(model.join("more"), "").unwrap();
        std::fs::remove_file(model.join("README.md")).unwrap();
        let report = PortableModel::verify(&model).unwrap();
        assert_eq!(report.changed, ["vae/config.json"]);
        assert_eq!(report.missing, ["README.md"]);
        assert_eq!(report.extra, ["more"]);
        // Pages for people are the owner's.
        assert!(PortableModel::open(&model).is_ok());
        std::fs::remove_file(model.join("vae/config.json")).unwrap();
        assert!(PortableModel::open(&model).unwrap_err().to_string().contains("vae/config.json"));
    }

    #[test]
    fn a_recorded_path_outside_the_model_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        let path = model.join(ModelRecord::FILE);
        let text = std::fs::read_to_string(&path).unwrap().replace("vae/config.json", "../secret");
        std::fs::write(&path, text).unwrap();
        let error = PortableModel::open(&model).unwrap_err().to_string();
        assert!(error.contains("recorded file \"../secret\" is outside the model"), "{error}");
    }

    #[test]
    fn an_existing_model_is_not_replaced_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        assert!(StagingDir::begin(&model, Overwrite::Never).unwrap_err().to_string().contains("--overwrite"));
        let stage = StagingDir::begin(&model, Overwrite::PortableModel).unwrap();
        let second = StagingDir::begin(&model, Overwrite::PortableModel).unwrap_err().to_string();
        assert!(second.contains("another process works on it"), "{second}");
        std::fs::write(stage.folder().join("new"), "new").unwrap();
        assert!(model.join("README.md").exists());
        stage.finish(ModelRecord::new("flux", "dev", &AttentionPlan::full()).unwrap()).unwrap();
        assert!(model.join("new").exists() && !model.join("README.md").exists());
        let error = StagingDir::begin(folder.path(), Overwrite::PortableModel).unwrap_err().to_string();
        assert!(error.contains("is not a portable model"), "{error}");
    }
}
