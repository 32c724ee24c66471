//! [`Components`]: where the parts of a pipeline lie. It opens none of them but reads their small JSON files.

use crate::{Result, RuntimeError};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The folders that parts are looked for in: the model's own first, then that of `--components`.
#[derive(Debug, Clone)]
pub struct Components {
    model: PathBuf,
    roots: Vec<PathBuf>,
}

impl Components {
    /// Looks in `model` and, for what it lacks, in `extra`. Either may be a folder with a `model_index.json`, or any
    /// folder with parts in it; `model` may also be a transformer alone, folder or file.
    pub fn new(model: &Path, extra: Option<&Path>) -> Self {
        let roots = std::iter::once(model).chain(extra).map(Path::to_owned).collect();
        Self { model: model.to_owned(), roots }
    }

    /// The folder of part `name`.
    ///
    /// # Errors
    /// [`RuntimeError::MissingComponent`], which says how to give it.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let found = self.roots.iter().map(|root| root.join(name)).find(|folder| folder.is_dir());
        found.ok_or_else(|| RuntimeError::MissingComponent { name: name.to_owned(), looked: self.looked() })
    }

    /// The transformer: its folder in the model's, or the model itself if that is a transformer alone.
    pub fn transformer(&self) -> PathBuf {
        let folder = self.model.join("transformer");
        if folder.is_dir() { folder } else { self.model.clone() }
    }

    /// Those of `names` that are nowhere.
    pub fn missing<'a>(&self, names: &'a [String]) -> Vec<&'a str> {
        names.iter().map(String::as_str).filter(|name| self.folder(name).is_err()).collect()
    }

    /// All parts called `names` are there.
    ///
    /// # Errors
    /// [`RuntimeError::MissingComponent`] for the first that is not.
    pub fn complete(&self, names: &[String]) -> Result<()> {
        names.iter().try_for_each(|name| self.folder(name).map(drop))
    }

    /// A small JSON file of part `name`.
    ///
    /// # Errors
    /// The part or the file is missing, or the file is no JSON.
    pub fn json(&self, name: &str, file: &str) -> Result<Value> {
        let path = self.folder(name)?.join(file);
        serde_json::from_slice(&read(&path)?).map_err(|error| RuntimeError::BadComponent {
            reason: format!("expected JSON: {error}. Copy the file again from where the model came from"),
            path,
        })
    }

    /// A small text file of part `name`.
    ///
    /// # Errors
    /// The part or the file is missing, or the file is no text.
    pub fn text(&self, name: &str, file: &str) -> Result<String> {
        let path = self.folder(name)?.join(file);
        String::from_utf8(read(&path)?).map_err(|error| RuntimeError::BadComponent {
            reason: format!("expected text: {error}. Copy the file again from where the model came from"),
            path,
        })
    }

    /// The bytes of a file of part `name`; none if there is no such file.
    ///
    /// # Errors
    /// The part is missing, or the system refuses.
    pub fn bytes(&self, name: &str, file: &str) -> Result<Option<Vec<u8>>> {
        let path = self.folder(name)?.join(file);
        path.exists().then(|| read(&path)).transpose()
    }

    fn looked(&self) -> String {
        self.roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(" and ")
    }
}

/// Files of vocabularies and configs are a few MB; what claims to be more is not one of them.
const LARGEST: u64 = 256 << 20;

fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |source| RuntimeError::Io { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > LARGEST {
        let reason = format!("expected a small file, found {size} bytes");
        return Err(RuntimeError::BadComponent { path: path.to_owned(), reason });
    }
    std::fs::read(path).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn parts_come_from_the_model_first_and_then_from_elsewhere() {
        let (model, extra) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(model.path().join("vae")).unwrap();
        let names = ["scheduler", "tokenizer", "vae"].map(str::to_owned);
        for name in &names {
            fs::create_dir(extra.path().join(name)).unwrap();
        }
        let alone = Components::new(model.path(), None);
        assert_eq!(alone.missing(&names), ["scheduler", "tokenizer"]);
        let error = alone.complete(&names).unwrap_err().to_string();
        assert!(error.starts_with("scheduler is missing") && error.contains("--components DIR"), "{error}");
        let both = Components::new(model.path(), Some(extra.path()));
        assert!(both.complete(&names).is_ok());
        assert_eq!(both.folder("vae").unwrap(), model.path().join("vae"));
        assert_eq!(both.folder("tokenizer").unwrap(), extra.path().join("tokenizer"));
    }

    #[test]
    fn a_transformer_alone_is_a_model() {
        let model = tempfile::tempdir().unwrap();
        assert_eq!(Components::new(model.path(), None).transformer(), model.path());
        fs::create_dir(model.path().join("transformer")).unwrap();
        assert_eq!(Components::new(model.path(), None).transformer(), model.path().join("transformer"));
    }

    #[test]
    fn json_that_is_none_is_named() {
        let model = tempfile::tempdir().unwrap();
        fs::create_dir(model.path().join("vae")).unwrap();
        fs::write(model.path().join("vae/config.json"), "<html>").unwrap();
        let components = Components::new(model.path(), None);
        assert!(
            components.json("vae", "config.json").unwrap_err().to_string().contains("vae/config.json: expected JSON")
        );
        assert!(matches!(components.json("vae", "none.json"), Err(RuntimeError::Io { .. })));
        assert!(components.bytes("vae", "none.json").unwrap().is_none());
    }
}
