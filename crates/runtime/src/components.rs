//! [`Components`]: finds the components of a pipeline, in folders, in files of their own or in the transformer's
//! single-file checkpoint, and reads their configs and weights the same way from all.

use crate::component_files::ComponentFiles;
use crate::files::{read, read_json, read_text, transformer_path};
use crate::{ReadOptions, Result, RuntimeError, TransformerCheckpoint};
use candle_core::DType;
use clearform_layout::{Dequantized, EmbeddedComponent, Identified, LayoutError, Manifests, OpenComponent};
use clearform_portable_model::ComponentData;
use clearform_sampling::Scheduler;
use clearform_weights::{Checkpoint, TensorSource, held_bytes, hub_snapshot};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The folders and files that are searched for components, in this order: files of their own, the model's folder, the
/// transformer's single-file checkpoint, the folder of `--components`.
#[derive(Debug, Clone)]
pub struct Components {
    model: PathBuf,
    extra: Option<PathBuf>,
    own_paths: ComponentFiles,
    own_files: Vec<SingleFile>,
    file: Option<SingleFile>,
    /// What the user should know of the components, once the family is known.
    pub(crate) notes: Vec<String>,
    /// The options that take files, by component; known once the family is.
    options: BTreeMap<String, String>,
    /// The weights in folders that were opened, of which copies of this share each.
    opened: Arc<Mutex<BTreeMap<PathBuf, FolderWeights>>>,
}

/// The weights in the folder of a component. They are not read.
type FolderWeights = Arc<Dequantized<Arc<Checkpoint>>>;

/// A checkpoint that contains components.
#[derive(Debug, Clone)]
struct SingleFile {
    checkpoint: Arc<Checkpoint>,
    components: Vec<EmbeddedComponent>,
    allow_unmatched: bool,
}

const CONFIG: &str = "config.json";
pub(crate) const VAE: &str = "vae";
/// How the names of components without tensors begin.
const WITHOUT_WEIGHTS: [&str; 2] = ["tokenizer", "scheduler"];

impl Components {
    /// Searches `model` and then `extra`. Either may be a pipeline folder or any folder that contains components; `model`
    /// may also be a transformer alone, a folder or a file.
    pub fn new(model: &Path, extra: Option<&Path>) -> Self {
        Self {
            model: model.to_owned(),
            extra: extra.map(Path::to_owned),
            own_paths: ComponentFiles::default(),
            own_files: Vec::new(),
            file: None,
            notes: Vec::new(),
            options: BTreeMap::new(),
            opened: Arc::default(),
        }
    }

    /// Takes these components from files of their own. They are opened by [`Self::with_embedded`], since the family
    /// decides which component each is.
    #[must_use]
    pub fn with_files(mut self, files: &ComponentFiles) -> Self {
        self.own_paths = files.clone();
        self
    }

    /// Adds the components in the file of `transformer`, which is read as `reading` says, and those in files of their
    /// own. The tensors of each are checked against the rules of its class.
    ///
    /// # Errors
    /// The extra components are no folder; a file has another component or is one that the family does not have; tensors
    /// of a component are missing, have a wrong shape or are unknown.
    pub fn with_embedded(mut self, transformer: &TransformerCheckpoint, reading: &ReadOptions) -> Result<Self> {
        if let Some(extra) = self.extra.as_deref().filter(|extra| !extra.is_dir()) {
            return Err(RuntimeError::BadSetting(format!(
                "components {}: expected a folder, such as a pipeline in the format of diffusers; files of one component \
                 each have options of their own",
                extra.display()
            )));
        }
        let checkpoint = transformer.checkpoint();
        let identified = transformer.identified();
        self.file = Some(SingleFile {
            checkpoint: checkpoint.clone(),
            components: identified.components_in(checkpoint.as_ref()),
            allow_unmatched: reading.allow_unmatched,
        });
        let options = identified.component_files().into_iter();
        self.options = options.map(|(called, name)| (name.to_owned(), option_of(called))).collect();
        let own_files =
            self.own_paths.given().map(|(called, path)| SingleFile::open(called, path, identified, reading));
        self.own_files = own_files.collect::<Result<_>>()?;
        self.open_embedded()?;
        Ok(self)
    }

    /// What the user should know of the components: tensors that are not used.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The components that are taken from files: the transformer's or their own.
    ///
    /// # Errors
    /// Tensors of a component are missing, have a wrong shape or are unknown.
    pub fn open_embedded(&self) -> Result<Vec<ComponentData>> {
        let files = self.own_files.iter().chain(&self.file);
        let names: BTreeSet<&str> =
            files.flat_map(|file| &file.components).map(|component| component.name.as_str()).collect();
        let found = names.into_iter().filter_map(|name| self.find_embedded(name));
        found.map(|(file, component)| self.open(file, component)).collect()
    }

    /// The components that are taken from files of their own, with their files.
    pub fn in_own_files(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.own_files.iter().flat_map(|file| {
            let paths = file.checkpoint.files().iter().map(|stored| stored.path.as_path());
            let names = file.components.iter().map(|component| component.name.as_str());
            names.flat_map(move |name| paths.clone().map(move |path| (name, path)))
        })
    }

    /// Checks that the weights of all components in `names` that exist can be computed with. Only headers are read.
    ///
    /// # Errors
    /// A component is damaged, incomplete, or stored in a form that is not read, such as that of a quantised model.
    pub fn check_weights<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> Result<()> {
        let mut names = names.into_iter().filter(|name| has_weights(name) && self.has(name));
        names.try_for_each(|name| self.weights(name).map(drop))
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
        Ok(Box::new(self.open_folder(self.folder(name)?)?))
    }

    /// The weights in the folder of a component, which is opened at the first call.
    fn open_folder(&self, folder: PathBuf) -> Result<FolderWeights> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weights) = opened.get(&folder) {
            return Ok(weights.clone());
        }
        let manifests = Manifests::embedded()?;
        let weights = Arc::new(Dequantized::open(&folder, &manifests)?);
        weights.accept(&manifests).map_err(|error| bad_component(&folder, &error))?;
        opened.insert(folder, weights.clone());
        Ok(weights)
    }

    /// The folder of component `name` and its weights; `None` if it has none or they are in a single file.
    pub(crate) fn in_folder(&self, name: &str) -> Result<Option<(PathBuf, FolderWeights)>> {
        if !has_weights(name) || self.find_embedded(name).is_some() {
            return Ok(None);
        }
        let Ok(folder) = self.folder(name) else { return Ok(None) };
        Ok(Some((folder.clone(), self.open_folder(folder)?)))
    }

    /// The file or folder of the weights of component `name`; `None` if it is missing or has none.
    pub(crate) fn place(&self, name: &str) -> Option<PathBuf> {
        let file = self.find_embedded(name).map(|(file, _)| file.checkpoint.path().to_owned());
        file.or_else(|| self.folder(name).ok()).filter(|_| has_weights(name))
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

    /// The folder of extra components, if none of `names` is taken from it.
    pub fn unused_folder<'a>(&self, mut names: impl Iterator<Item = &'a String>) -> Option<&Path> {
        let extra = self.extra.as_deref()?;
        let is_used = names.any(|name| self.folder(name).is_ok_and(|folder| folder.starts_with(extra)));
        (!is_used).then_some(extra)
    }

    /// What is said of the folder of further components if nothing in `names` is taken from it.
    pub fn unused_note<'a>(&self, names: impl Iterator<Item = &'a String>) -> Option<String> {
        let folder = self.unused_folder(names)?.display();
        Some(format!("--components {folder} has no effect: nothing is taken from it"))
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

    /// The scheduler of a model `identified`; `None` if it has none.
    ///
    /// # Errors
    /// Its scheduler_config.json is missing or damaged, or is that of a scheduler that is not supported.
    pub fn scheduler(&self, identified: &Identified) -> Result<Option<Scheduler>> {
        const NAME: &str = "scheduler";
        let has_one = identified.all_components().any(|component| component == NAME);
        let Some(folder) = self.folder(NAME).ok().filter(|_| has_one) else { return Ok(None) };
        let path = folder.join("scheduler_config.json");
        let scheduler = Scheduler::parse(&read_text(&path)?);
        scheduler.map(Some).map_err(|error| RuntimeError::BadComponent { path, reason: error.to_string() })
    }

    /// The bytes of a file in the folder of component `name`; `None` if the file does not exist.
    ///
    /// # Errors
    /// The component is missing, or the file cannot be read.
    pub fn bytes(&self, name: &str, file: &str) -> Result<Option<Vec<u8>>> {
        let path = self.folder(name)?.join(file);
        path.exists().then(|| read(&path)).transpose()
    }

    /// For each component in folders or in `file`, which is that of the transformer `identified`, the bytes that its
    /// weights take in memory, or why they cannot be used. What only a config.json tells, which may be elsewhere, is
    /// not asked for.
    pub fn weight_bytes(
        &self,
        identified: &Identified,
        file: &Arc<Checkpoint>,
    ) -> BTreeMap<String, std::result::Result<u64, String>> {
        let embedded = identified.components_in(file.as_ref()).into_iter().filter_map(|component| {
            let opened = component.open(file.clone(), None).and_then(|opened| opened.tensors.require_complete());
            let bytes = match opened {
                Ok(tensors) => Ok(bytes_in_memory(&component.name, &tensors)),
                Err(LayoutError::Ambiguous { .. }) => return None,
                Err(error) => Err(error.to_string()),
            };
            Some((component.name, bytes))
        });
        let in_folders = identified.all_components().filter(|name| has_weights(name) && self.has(name)).map(|name| {
            let bytes = self.weights(name).map(|weights| bytes_in_memory(name, weights.as_ref()));
            (name.clone(), bytes.map_err(|error| error.to_string()))
        });
        embedded.chain(in_folders).collect()
    }

    /// As [`Self::check_weights`], for all folders of the model that have a config.json, the transformer's among them.
    ///
    /// # Errors
    /// As [`Self::check_weights`], or the model's folder cannot be read.
    pub fn check_all_weights(&self) -> Result<()> {
        let io = |source| RuntimeError::Io { path: self.model.clone(), source };
        let entries = std::fs::read_dir(&self.model).map_err(io)?.collect::<std::io::Result<Vec<_>>>().map_err(io)?;
        let has_config = |entry: &std::fs::DirEntry| entry.path().join(CONFIG).exists();
        let names =
            entries.iter().filter(|entry| has_config(entry)).filter_map(|entry| entry.file_name().into_string().ok());
        self.check_weights(&names.collect::<BTreeSet<_>>())
    }

    /// Component `name` in a file of its own, or in the transformer's file, unless the model's own folder contains it.
    fn find_embedded(&self, name: &str) -> Option<(&SingleFile, &EmbeddedComponent)> {
        let embedding = self.file.as_ref().filter(|_| !self.model.join(name).is_dir());
        let mut files = self.own_files.iter().chain(embedding);
        files.find_map(|file| Some((file, file.components.iter().find(|component| component.name == name)?)))
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
        let searched = self.roots().map(describe_root).collect::<Vec<_>>().join(" and ");
        let option = self.options.get(name).map(|option| format!(", or its file with {option}")).unwrap_or_default();
        RuntimeError::MissingComponent { name: name.to_owned(), searched, option }
    }
}

impl SingleFile {
    /// Opens the file of one component, which users call `called`.
    fn open(called: &str, path: &Path, identified: &Identified, reading: &ReadOptions) -> Result<Self> {
        let checkpoint = Arc::new(Checkpoint::open(path)?);
        let component = identified.component_in_own_file(called, checkpoint.as_ref());
        let component = component.map_err(|error| RuntimeError::BadComponent {
            path: path.to_owned(),
            reason: format!(
                "given with {}: {}",
                option_of(called),
                half_vae(&error, &checkpoint).unwrap_or_else(|| error.to_string())
            ),
        })?;
        Ok(Self { checkpoint, components: vec![component], allow_unmatched: reading.allow_unmatched })
    }
}

/// What is missing of a file that is known as a VAE and is none for want of one half.
fn half_vae(error: &LayoutError, file: &Checkpoint) -> Option<String> {
    if !matches!(error, LayoutError::Unsupported { name, .. } if name == "a VAE") {
        return None;
    }
    let has = |half: &str| file.tensors().iter().any(|info| info.name.contains(half));
    let missing = match (has("encoder."), has("decoder.")) {
        (false, true) => "encoder",
        (true, false) => "decoder",
        _ => return None,
    };
    Some(format!("a VAE without its {missing}, expected both halves; pass the whole VAE"))
}

/// The command's option for a file that users call `called`.
fn option_of(called: &str) -> String {
    format!("--{}", called.replace('_', "-"))
}

/// Whether component `name` has tensors.
fn has_weights(name: &str) -> bool {
    !WITHOUT_WEIGHTS.iter().any(|start| name.starts_with(start))
}

/// What the weights of component `name` take while it runs: those of the VAE in f32, others as they are stored.
fn bytes_in_memory(name: &str, weights: &dyn TensorSource) -> u64 {
    let dtype = (name == VAE).then_some(DType::F32);
    weights.tensors().iter().map(|info| held_bytes(weights, info, dtype)).sum()
}

/// A folder that was searched. The root of a hub cache contains none itself.
fn describe_root(root: &Path) -> String {
    match hub_snapshot(root) {
        None => root.display().to_string(),
        Some(snapshot) => format!("{} (the root of a hub cache: pass {})", root.display(), snapshot.display()),
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
        assert_eq!(both.unused_folder(names.iter()), None);
        assert_eq!(both.unused_folder(names[2..].iter()), Some(extra.path()));
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
