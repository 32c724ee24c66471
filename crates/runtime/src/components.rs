//! [`Components`]: finds the components of a pipeline, in folders or in the transformer's single-file checkpoint, and reads
//! their configs and weights the same way from both.

use crate::files::{read, read_json, read_text, transformer_path};
use crate::{ReadOptions, Result, RuntimeError, TransformerCheckpoint};
use clearform_layout::{Dequantized, EmbeddedComponent, LayoutError, Manifests, OpenComponent};
use clearform_portable_model::ComponentData;
use clearform_weights::{Checkpoint, TensorSource};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folders and files that are searched for components, in this order: the model's folder, the transformer's
/// single-file checkpoint, the folder of `--components`.
#[derive(Debug, Clone)]
pub struct Components {
    model: PathBuf,
    extra: Option<PathBuf>,
    file: Option<SingleFile>,
}

/// A checkpoint that contains other components beside its transformer.
#[derive(Debug, Clone)]
struct SingleFile {
    checkpoint: Arc<Checkpoint>,
    components: Vec<EmbeddedComponent>,
    allow_unmatched: bool,
}

const CONFIG: &str = "config.json";

impl Components {
    /// Searches `model` and then `extra`. Either may be a pipeline folder or any folder that contains components; `model`
    /// may also be a transformer alone, a folder or a file.
    pub fn new(model: &Path, extra: Option<&Path>) -> Self {
        Self { model: model.to_owned(), extra: extra.map(Path::to_owned), file: None }
    }

    /// Adds the components in the file of `transformer`, which is read as `reading` says. The tensors of each are checked
    /// against the rules of its class.
    ///
    /// # Errors
    /// Tensors of a component are missing, have a wrong shape or are unknown.
    pub fn with_embedded(mut self, transformer: &TransformerCheckpoint, reading: &ReadOptions) -> Result<Self> {
        let checkpoint = transformer.checkpoint();
        self.file = Some(SingleFile {
            checkpoint: checkpoint.clone(),
            components: transformer.identified().components_in(checkpoint.as_ref()),
            allow_unmatched: reading.allow_unmatched,
        });
        self.open_embedded()?;
        Ok(self)
    }

    /// The components that are taken from the transformer's file.
    ///
    /// # Errors
    /// Tensors of a component are missing, have a wrong shape or are unknown.
    pub fn open_embedded(&self) -> Result<Vec<ComponentData>> {
        let names = self.file.iter().flat_map(|file| &file.components).map(|component| component.name.as_str());
        let found = names.filter_map(|name| self.find_embedded(name));
        found.map(|(file, component)| self.open(file, component)).collect()
    }

    /// Whether component `name` exists.
    pub fn has(&self, name: &str) -> bool {
        self.find_embedded(name).is_some() || self.folder(name).is_ok()
    }

    /// The config.json of component `name`.
    ///
    /// # Errors
    /// The component is missing or damaged.
    pub fn config(&self, name: &str) -> Result<Value> {
        match self.find_embedded(name) {
            Some((file, component)) => Ok(self.open(file, component)?.config),
            None => self.json(name, CONFIG),
        }
    }

    /// The tensors of component `name`, under the names of its class; fp8 weights are dequantized.
    ///
    /// # Errors
    /// The component is missing or damaged.
    pub fn weights(&self, name: &str) -> Result<Box<dyn TensorSource>> {
        if let Some((file, component)) = self.find_embedded(name) {
            return Ok(self.open(file, component)?.tensors);
        }
        let folder = self.folder(name)?;
        let manifests = Manifests::embedded()?;
        let weights = Dequantized::open(&folder, &manifests)?;
        manifests.accept(&weights).map_err(|error| bad_component(&folder, &error))?;
        Ok(Box::new(weights))
    }

    /// The folder of component `name`.
    ///
    /// # Errors
    /// [`RuntimeError::MissingComponent`], whose message names the option that adds a folder.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let found = self.roots().map(|root| root.join(name)).find(|folder| folder.is_dir());
        found.ok_or_else(|| self.missing_component(name))
    }

    /// The transformer: its folder in the pipeline, or the model itself if that is a transformer alone.
    pub fn transformer_path(&self) -> PathBuf {
        transformer_path(&self.model)
    }

    /// The components in `names` that do not exist.
    pub fn missing<'a>(&self, names: &'a [String]) -> Vec<&'a str> {
        names.iter().map(String::as_str).filter(|name| !self.has(name)).collect()
    }

    /// Checks that all components in `names` exist.
    ///
    /// # Errors
    /// [`RuntimeError::MissingComponent`] for the first that does not.
    pub fn require(&self, names: &[String]) -> Result<()> {
        self.missing(names).first().map_or(Ok(()), |name| Err(self.missing_component(name)))
    }

    /// A JSON file in the folder of component `name`.
    ///
    /// # Errors
    /// The component or the file is missing, or the file is not JSON.
    pub fn json(&self, name: &str, file: &str) -> Result<Value> {
        read_json(&self.folder(name)?.join(file))
    }

    /// A text file in the folder of component `name`.
    ///
    /// # Errors
    /// The component or the file is missing, or the file is not UTF-8.
    pub fn text(&self, name: &str, file: &str) -> Result<String> {
        read_text(&self.folder(name)?.join(file))
    }

    /// The bytes of a file in the folder of component `name`; `None` if the file does not exist.
    ///
    /// # Errors
    /// The component is missing, or the file cannot be read.
    pub fn bytes(&self, name: &str, file: &str) -> Result<Option<Vec<u8>>> {
        let path = self.folder(name)?.join(file);
        path.exists().then(|| read(&path)).transpose()
    }

    /// Component `name` in the transformer's file, unless the model's own folder contains it.
    fn find_embedded(&self, name: &str) -> Option<(&SingleFile, &EmbeddedComponent)> {
        let file = self.file.as_ref().filter(|_| !self.model.join(name).is_dir())?;
        file.components.iter().find(|component| component.name == name).map(|component| (file, component))
    }

    fn open(&self, file: &SingleFile, embedded: &EmbeddedComponent) -> Result<ComponentData> {
        let config = self.config_beside_file(&embedded.name)?;
        let opened = embedded.open(file.checkpoint.clone(), config.as_ref());
        let checked = opened.and_then(|OpenComponent { config, tensors }| {
            let tensors =
                if file.allow_unmatched { tensors.require_sufficient()? } else { tensors.require_complete()? };
            let load_report = tensors.load_report().clone();
            Ok(ComponentData { name: embedded.name.clone(), config, tensors: Box::new(tensors), load_report })
        });
        checked.map_err(|error| {
            let reason = format!("{}, the tensors under {:?}: {error}", embedded.name, embedded.prefix);
            RuntimeError::BadComponent { path: file.checkpoint.path().to_owned(), reason }
        })
    }

    /// The config.json of an embedded component, if a folder with its name exists. It may have settings that the tensors do
    /// not show.
    fn config_beside_file(&self, name: &str) -> Result<Option<Value>> {
        let exists = self.folder(name).is_ok_and(|folder| folder.join(CONFIG).exists());
        exists.then(|| self.json(name, CONFIG)).transpose()
    }

    fn roots(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.model.as_path()).chain(self.extra.as_deref())
    }

    fn missing_component(&self, name: &str) -> RuntimeError {
        let searched = self.roots().map(|root| root.display().to_string()).collect::<Vec<_>>().join(" and ");
        RuntimeError::MissingComponent { name: name.to_owned(), searched }
    }
}

fn bad_component(path: &Path, error: &LayoutError) -> RuntimeError {
    RuntimeError::BadComponent { path: path.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_model_takes_precedence_over_the_extra_folder() {
        let model = tempfile::tempdir().unwrap();
        let extra = tempfile::tempdir().unwrap();
        fs::create_dir(model.path().join("vae")).unwrap();
        let names = ["scheduler", "tokenizer", "vae"].map(str::to_owned);
        for name in &names {
            fs::create_dir(extra.path().join(name)).unwrap();
        }
        let alone = Components::new(model.path(), None);
        assert_eq!(alone.missing(&names), ["scheduler", "tokenizer"]);
        let error = alone.require(&names).unwrap_err().to_string();
        assert!(error.starts_with("scheduler is missing") && error.contains("pass --components DIR"), "{error}");
        let both = Components::new(model.path(), Some(extra.path()));
        assert!(both.require(&names).is_ok());
        assert_eq!(both.folder("vae").unwrap(), model.path().join("vae"));
        assert_eq!(both.folder("tokenizer").unwrap(), extra.path().join("tokenizer"));
    }

    #[test]
    fn a_transformer_alone_is_a_model() {
        let model = tempfile::tempdir().unwrap();
        let components = Components::new(model.path(), None);
        assert_eq!(components.transformer_path(), model.path());
        fs::create_dir(model.path().join("transformer")).unwrap();
        assert_eq!(components.transformer_path(), model.path().join("transformer"));
    }

    #[test]
    fn a_file_that_is_not_json_is_named() {
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
