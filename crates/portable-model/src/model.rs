//! [`PortableModel`]: a folder in diffusers' form with a clearform.toml beside. Opening it checks sizes; [verifying]
//! it checks hashes.
//!
//! [verifying]: PortableModel::verify

use crate::staging::paths_of;
use crate::{ModelRecord, PortableModelError, Result};
use clearform_attention::AttentionPlan;
use clearform_weights::digest;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// A portable model that is open.
#[derive(Debug)]
pub struct PortableModel {
    folder: PathBuf,
    record: ModelRecord,
}

/// The plan that is recorded for the model at `path`; none where it is no portable model. A portable model is opened for
/// it, which holds its files' sizes against the record.
///
/// # Errors
/// As [`PortableModel::open`].
pub fn recorded_plan(path: &Path) -> Result<Option<AttentionPlan>> {
    match PortableModel::recognise(path) {
        true => Ok(Some(PortableModel::open(path)?.record().plan()?)),
        false => Ok(None),
    }
}

impl PortableModel {
    /// Whether `path` is one.
    pub fn recognise(path: &Path) -> bool {
        path.join(ModelRecord::FILE).is_file()
    }

    /// Opens the model in `folder` and holds every file's size against the record.
    ///
    /// # Errors
    /// No portable model, an edition that is unknown, or a file that is missing or of another size.
    pub fn open(folder: &Path) -> Result<Self> {
        let model = Self { folder: folder.to_owned(), record: ModelRecord::read(folder)? };
        for file in &model.record.file {
            let found = std::fs::metadata(model.inside(&file.path)?).map(|metadata| metadata.len()).ok();
            if found != Some(file.size) {
                let found = found.map_or("nothing".to_owned(), |size| format!("{size} bytes"));
                return Err(model.bad(format!(
                    "{:?}: expected {} bytes, found {found}; copy the model again, or make it again",
                    file.path, file.size
                )));
            }
        }
        Ok(model)
    }

    /// What clearform.toml says.
    pub fn record(&self) -> &ModelRecord {
        &self.record
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads every file in `folder` and holds it against the record.
    ///
    /// # Errors
    /// No portable model, or the system refused; what is wrong with files is in the report.
    pub fn verify(folder: &Path) -> Result<VerifyReport> {
        let model = Self { folder: folder.to_owned(), record: ModelRecord::read(folder)? };
        let mut report = VerifyReport::default();
        for file in &model.record.file {
            let path = model.inside(&file.path)?;
            match std::fs::metadata(&path) {
                Err(_) => report.missing.push(file.path.clone()),
                Ok(metadata) if metadata.len() != file.size => report.changed.push(file.path.clone()),
                Ok(_) if digest(&path)?.sha256 != file.sha256 => report.changed.push(file.path.clone()),
                Ok(_) => report.unchanged += 1,
            }
        }
        let known: BTreeSet<&str> = model.record.file.iter().map(|file| file.path.as_str()).collect();
        report.extra = paths_of(folder)?.into_iter().filter(|path| !known.contains(path.as_str())).collect();
        Ok(report)
    }

    /// A recorded path; records come from others, so a path may not lead out of the model.
    fn inside(&self, path: &str) -> Result<PathBuf> {
        let plain = Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if plain {
            Ok(self.folder.join(path))
        } else {
            Err(self.bad(format!("recorded file {path:?} lies outside the model")))
        }
    }

    fn bad(&self, reason: String) -> PortableModelError {
        PortableModelError::Invalid { path: self.folder.join(ModelRecord::FILE), reason }
    }
}

/// How a model's files compare with its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Files that are as recorded.
    pub unchanged: usize,
    /// Files of another size or hash.
    pub changed: Vec<String>,
    /// Files that are not there.
    pub missing: Vec<String>,
    /// Files that are not recorded.
    pub extra: Vec<String>,
}

impl VerifyReport {
    /// Whether everything is as recorded.
    pub fn holds(&self) -> bool {
        self.changed.is_empty() && self.missing.is_empty() && self.extra.is_empty()
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, paths) in [("changed", &self.changed), ("missing", &self.missing), ("extra", &self.extra)] {
            paths.iter().try_for_each(|path| writeln!(f, "{what:<10} {path:?}"))?;
        }
        write!(f, "{} files are as recorded", self.unchanged)
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
    fn a_model_is_as_it_was_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        assert!(!folder.path().join("model.work").exists());
        assert_eq!(PortableModel::open(&model).unwrap().record().file.len(), 2);
        let report = PortableModel::verify(&model).unwrap();
        assert!(report.holds() && report.unchanged == 2, "{report}");
        assert_eq!(recorded_plan(&model).unwrap(), Some(AttentionPlan::full()));
        assert_eq!(recorded_plan(folder.path()).unwrap(), None);
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
        assert!(PortableModel::open(&model).unwrap_err().to_string().contains("README.md"));
    }

    #[test]
    fn a_record_cannot_lead_outside() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        let path = model.join(ModelRecord::FILE);
        let text = std::fs::read_to_string(&path).unwrap().replace("vae/config.json", "../secret");
        std::fs::write(&path, text).unwrap();
        assert!(PortableModel::open(&model).unwrap_err().to_string().contains("outside"));
    }

    #[test]
    fn what_stands_is_not_replaced_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        let model = model(folder.path());
        assert!(StagingDir::begin(&model, Overwrite::Never).unwrap_err().to_string().contains("--overwrite"));
        let stage = StagingDir::begin(&model, Overwrite::PortableModel).unwrap();
        assert!(StagingDir::begin(&model, Overwrite::PortableModel).unwrap_err().to_string().contains("--resume"));
        std::fs::write(stage.folder().join("new"), "new").unwrap();
        assert!(model.join("README.md").exists());
        stage.finish(ModelRecord::new("flux", "dev", &AttentionPlan::full()).unwrap()).unwrap();
        assert!(model.join("new").exists() && !model.join("README.md").exists());
        assert!(
            StagingDir::begin(folder.path(), Overwrite::PortableModel)
                .unwrap_err()
                .to_string()
                .contains("no portable model")
        );
    }
}
