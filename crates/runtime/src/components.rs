//! [`Components`]: where the parts of a pipeline lie, in folders or in the transformer's own file. Whoever asks for a
//! part's config or weights does not learn which.

use crate::{ReadOptions, Result, RuntimeError, Transformer};
use clearform_layout::{Dequantized, EmbeddedComponent, LayoutError, Manifests};
use clearform_portable_model::ComponentData;
use clearform_weights::{Checkpoint, TensorSource};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The places that parts are looked for in: the model's own folder first, then the transformer's file, then the folder of
/// `--components`.
#[derive(Debug, Clone)]
pub struct Components {
    model: PathBuf,
    extra: Option<PathBuf>,
    file: Option<AllInOne>,
}

/// A file that holds parts of a pipeline beside its transformer.
#[derive(Debug, Clone)]
struct AllInOne {
    path: PathBuf,
    parts: Vec<EmbeddedComponent>,
    allow_unmatched: bool,
}

const CONFIG: &str = "config.json";

impl Components {
    /// Looks in `model` and, for what it lacks, in `extra`. Either may be a folder with a `model_index.json`, or any
    /// folder with parts in it; `model` may also be a transformer alone, folder or file.
    pub fn new(model: &Path, extra: Option<&Path>) -> Self {
        Self { model: model.to_owned(), extra: extra.map(Path::to_owned), file: None }
    }

    /// The same, with the parts that lie in the file of the transformer, which is read as `reading` says. Each is held
    /// against the rules of its kind.
    ///
    /// # Errors
    /// Tensors of a part are missing, misshapen or not understood.
    pub fn with_embedded(mut self, transformer: &Transformer, reading: &ReadOptions) -> Result<Self> {
        let checkpoint = transformer.checkpoint();
        self.file = Some(AllInOne {
            path: checkpoint.path().to_owned(),
            parts: transformer.identified().components_in(checkpoint),
            allow_unmatched: reading.allow_unmatched,
        });
        self.embedded()?;
        Ok(self)
    }

    /// The parts that are taken from the transformer's file.
    ///
    /// # Errors
    /// One is not as it should be.
    pub fn embedded(&self) -> Result<Vec<ComponentData>> {
        let names = self.file.iter().flat_map(|file| &file.parts).map(|part| part.name.as_str());
        names.filter_map(|name| self.find_embedded(name)).map(|(file, part)| self.open(file, part)).collect()
    }

    /// Whether the part `name` is anywhere.
    pub fn has(&self, name: &str) -> bool {
        self.find_embedded(name).is_some() || self.folder(name).is_ok()
    }

    /// The config.json of part `name`.
    ///
    /// # Errors
    /// The part is missing or not as it should be.
    pub fn config(&self, name: &str) -> Result<Value> {
        match self.find_embedded(name) {
            Some((file, part)) => Ok(self.open(file, part)?.config),
            None => self.json(name, CONFIG),
        }
    }

    /// The tensors of part `name` under the names that its class has, fp8 weights times their scales.
    ///
    /// # Errors
    /// The part is missing or not as it should be.
    pub fn weights(&self, name: &str) -> Result<Box<dyn TensorSource>> {
        if let Some((file, part)) = self.find_embedded(name) {
            return Ok(self.open(file, part)?.tensors);
        }
        let (folder, manifests) = (self.folder(name)?, Manifests::embedded()?);
        let weights = Dequantized::open(&folder, &manifests)?;
        manifests.accept(&weights).map_err(|error| bad(&folder, &error))?;
        Ok(Box::new(weights))
    }

    /// The folder of part `name`.
    ///
    /// # Errors
    /// [`RuntimeError::MissingComponent`], which says how to give it.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let found = self.roots().map(|root| root.join(name)).find(|folder| folder.is_dir());
        found.ok_or_else(|| self.missing_component(name))
    }

    /// The transformer: its folder in the model's, or the model itself if that is a transformer alone.
    pub fn transformer(&self) -> PathBuf {
        let folder = self.model.join("transformer");
        if folder.is_dir() { folder } else { self.model.clone() }
    }

    /// Those of `names` that are nowhere.
    pub fn missing<'a>(&self, names: &'a [String]) -> Vec<&'a str> {
        names.iter().map(String::as_str).filter(|name| !self.has(name)).collect()
    }

    /// All parts called `names` are there.
    ///
    /// # Errors
    /// [`RuntimeError::MissingComponent`] for the first that is not.
    pub fn complete(&self, names: &[String]) -> Result<()> {
        self.missing(names).first().map_or(Ok(()), |name| Err(self.missing_component(name)))
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

    /// The part `name` in the transformer's file, unless the model's own folder has it.
    fn find_embedded(&self, name: &str) -> Option<(&AllInOne, &EmbeddedComponent)> {
        let file = self.file.as_ref().filter(|_| !self.model.join(name).is_dir())?;
        file.parts.iter().find(|part| part.name == name).map(|part| (file, part))
    }

    fn open(&self, file: &AllInOne, inside: &EmbeddedComponent) -> Result<ComponentData> {
        let usual = self.published_config(&inside.name)?;
        let part = inside.open(Checkpoint::open(&file.path)?, usual.as_ref());
        let whole = part.and_then(|clearform_layout::OpenComponent { config, tensors }| {
            let tensors = if file.allow_unmatched { tensors.sufficient()? } else { tensors.complete()? };
            let (name, load_report) = (inside.name.clone(), tensors.load_report().clone());
            Ok(ComponentData { name, config, tensors: Box::new(tensors), load_report: load_report })
        });
        whole.map_err(|error| {
            let reason = format!("{}, the tensors under {:?}: {error}", inside.name, inside.prefix);
            RuntimeError::BadComponent { path: file.path.clone(), reason }
        })
    }

    /// A config.json that lies in a folder of the part's name, of the same model or of one like it.
    fn published_config(&self, name: &str) -> Result<Option<Value>> {
        let exists = self.folder(name).is_ok_and(|folder| folder.join(CONFIG).exists());
        exists.then(|| self.json(name, CONFIG)).transpose()
    }

    fn roots(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.model.as_path()).chain(self.extra.as_deref())
    }

    fn missing_component(&self, name: &str) -> RuntimeError {
        let looked = self.roots().map(|root| root.display().to_string()).collect::<Vec<_>>().join(" and ");
        RuntimeError::MissingComponent { name: name.to_owned(), looked }
    }
}

fn bad(path: &Path, error: &LayoutError) -> RuntimeError {
    RuntimeError::BadComponent { path: path.to_owned(), reason: error.to_string() }
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
