//! [`PluginRegistry`]: the plugins at hand, and the choice of the one that opens an adapter. It loads none.

use crate::{Description, PluginError, Result};
use clearform_weights::{Checkpoint, TensorSource};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// A library with a description.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    /// Where it lies.
    pub path: PathBuf,
    /// What it says of itself.
    pub description: Description,
}

/// The plugins in some folders.
#[derive(Debug, Clone, Default)]
pub struct PluginRegistry {
    plugins: Vec<Plugin>,
    /// Libraries that have a description, but a broken one.
    broken: Vec<(PathBuf, String)>,
    off: bool,
}

/// Which plugin shall open an adapter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginChoice {
    /// One of this interface.
    pub interface: Option<&'static str>,
    /// The one of this id.
    pub id: Option<String>,
}

impl PluginRegistry {
    /// The shelf of one who wants no plugins.
    pub fn off() -> Self {
        Self { off: true, ..Self::default() }
    }

    /// The plugins in `folders`, of two with the same id the first.
    ///
    /// # Errors
    /// A folder cannot be read, or lies inside a model: what comes with a model is never loaded.
    pub fn look(folders: &[PathBuf]) -> Result<Self> {
        let mut registry = Self::default();
        for folder in folders {
            outside_models(folder)?;
            for path in libraries(folder)? {
                registry.put(path)?;
            }
        }
        registry.plugins.sort_by(|a, b| a.description.id.cmp(&b.description.id));
        Ok(registry)
    }

    /// Every plugin, sorted by id.
    pub fn plugins(&self) -> &[Plugin] {
        &self.plugins
    }

    /// Libraries whose description cannot be read, with reasons.
    pub fn broken(&self) -> &[(PathBuf, String)] {
        &self.broken
    }

    /// The plugin that opens `adapter`.
    ///
    /// # Errors
    /// None does, or several do: the error lists them.
    pub fn choose(&self, adapter: &Checkpoint, choice: &PluginChoice) -> Result<&Plugin> {
        let refuse = |reason: String| Err(PluginError::NoPlugin { adapter: adapter.path().to_owned(), reason });
        if self.off {
            return refuse("plugins are turned off (--no-plugins), and this needs one".to_owned());
        }
        let infos = adapter.tensors();
        let names: BTreeSet<&str> = infos.iter().map(|info| info.name.as_str()).collect();
        let fits = |plugin: &&Plugin| match &choice.id {
            Some(id) => plugin.description.id == *id,
            None => plugin.description.claims(&names, adapter.metadata()),
        };
        let right = |plugin: &&Plugin| choice.interface.is_none_or(|wanted| plugin.description.interface == wanted);
        let fitting: Vec<&Plugin> = self.plugins.iter().filter(fits).collect();
        match fitting.iter().copied().filter(right).collect::<Vec<_>>()[..] {
            [one] => Ok(one),
            [] => refuse(self.nothing_fits(&fitting, choice, &names)),
            ref several => {
                let ids: Vec<&str> = several.iter().map(|plugin| plugin.description.id.as_str()).collect();
                refuse(format!("several plugins open it: {}; choose one with ,plugin=ID", ids.join(", ")))
            }
        }
    }

    fn nothing_fits(&self, other_interface: &[&Plugin], choice: &PluginChoice, names: &BTreeSet<&str>) -> String {
        if let [plugin, ..] = other_interface {
            let Description { id, interface, .. } = &plugin.description;
            return format!(
                "the plugin {id:?} opens it, but is of the interface {interface:?}: give it with --adapter"
            );
        }
        let known: Vec<&str> = self.plugins.iter().map(|plugin| plugin.description.id.as_str()).collect();
        let known = if known.is_empty() {
            "no plugin is there: `cargo build --release` puts them beside the program, --plugin-dir names another folder"
                .to_owned()
        } else {
            format!("the plugins are {}", known.join(", "))
        };
        match &choice.id {
            Some(id) => format!("there is no plugin {id:?}; {known}"),
            None => {
                let first: Vec<&&str> = names.iter().take(3).collect();
                format!("no plugin knows a file with tensors such as {first:?}; {known}")
            }
        }
    }

    fn put(&mut self, path: PathBuf) -> Result<()> {
        outside_models(&path)?;
        let bytes = std::fs::read(&path).map_err(|source| PluginError::Io { path: path.clone(), source })?;
        match Description::find(&bytes) {
            None => {}
            Some(Err(reason)) => self.broken.push((path, reason)),
            Some(Ok(description)) if self.plugins.iter().any(|known| known.description.id == description.id) => {}
            Some(Ok(description)) => self.plugins.push(Plugin { path, description }),
        }
        Ok(())
    }
}

/// The library at `path`, which may lie anywhere but inside a model.
///
/// # Errors
/// It is no plugin, or lies inside a model.
pub fn plugin_at(path: &Path) -> Result<Plugin> {
    let bad = |reason: String| PluginError::BadPlugin { path: path.to_owned(), reason };
    outside_models(path)?;
    let bytes = std::fs::read(path).map_err(|source| PluginError::Io { path: path.to_owned(), source })?;
    let description =
        Description::find(&bytes).ok_or_else(|| bad("it has no description, so it is no plugin".to_owned()))?;
    Ok(Plugin { path: path.to_owned(), description: description.map_err(bad)? })
}

/// Shared libraries in `folder` itself, sorted.
fn libraries(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| PluginError::Io { path: folder.to_owned(), source };
    let entries = std::fs::read_dir(folder).map_err(io)?.collect::<std::io::Result<Vec<_>>>().map_err(io)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    let ending = OsStr::new(std::env::consts::DLL_EXTENSION);
    paths.retain(|path| path.extension() == Some(ending) && path.is_file());
    paths.sort();
    Ok(paths)
}

/// What comes with a model is never loaded, by whatever name or link it is reached.
fn outside_models(path: &Path) -> Result<()> {
    let real = path.canonicalize().map_err(|source| PluginError::Io { path: path.to_owned(), source })?;
    let is_model =
        |folder: &&Path| ["clearform.toml", "model_index.json"].iter().any(|file| folder.join(file).is_file());
    match real.ancestors().find(is_model) {
        None => Ok(()),
        Some(model) => {
            let reason = format!(
                "it lies inside the model {}, and nothing that comes with a model is loaded. If you trust it, copy it to a \
                 folder of its own",
                model.display()
            );
            Err(PluginError::BadPlugin { path: path.to_owned(), reason })
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use clearform_plugin_abi::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE, DESCRIPTION_BEGIN, DESCRIPTION_END};
    use clearform_weights::InMemoryTensors;
    use std::collections::BTreeMap;

    fn write_plugin(folder: &Path, id: &str, interface: &str, claim: &str) {
        let text = format!(
            "id = {id:?}\nversion = \"1\"\ninterface = {interface:?}\nabi = 1\nsummary = \"\"\n[[claims]]\nany = [{claim:?}]\n"
        );
        let name = format!("lib{id}.{}", std::env::consts::DLL_EXTENSION);
        std::fs::write(folder.join(name), format!("{DESCRIPTION_BEGIN}{text}{DESCRIPTION_END}")).unwrap();
    }

    fn adapter(folder: &Path, tensor: &str) -> Checkpoint {
        let path = folder.join("adapter.safetensors");
        let source =
            InMemoryTensors::from_iter([(tensor.to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap())]);
        clearform_weights::save(&path, &source, &BTreeMap::new()).unwrap();
        Checkpoint::open(&path).unwrap()
    }

    fn reason(result: Result<&Plugin>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn the_one_that_claims_a_file_is_chosen() {
        let folder = tempfile::tempdir().unwrap();
        write_plugin(folder.path(), "lora", ADAPTER_INTERFACE, "*.down");
        write_plugin(folder.path(), "net", CONTROLNET_INTERFACE, "*.net");
        std::fs::write(folder.path().join("libother.so"), "no plugin").unwrap();
        let registry = PluginRegistry::look(&[folder.path().to_owned()]).unwrap();
        assert_eq!(registry.plugins().len(), 2);
        let adapter = adapter(folder.path(), "a.down");
        let choice = |interface, id: Option<&str>| PluginChoice { interface, id: id.map(str::to_owned) };
        assert_eq!(registry.choose(&adapter, &choice(None, None)).unwrap().description.id, "lora");
        assert_eq!(registry.choose(&adapter, &choice(None, Some("net"))).unwrap().description.id, "net");
        assert!(
            reason(registry.choose(&adapter, &choice(Some(CONTROLNET_INTERFACE), None)))
                .contains("give it with --adapter")
        );
        assert!(reason(registry.choose(&adapter, &choice(None, Some("x")))).contains("the plugins are lora, net"));
        assert!(reason(PluginRegistry::off().choose(&adapter, &choice(None, None))).contains("--no-plugins"));
    }

    #[test]
    fn two_claimants_are_an_error_that_lists_them() {
        let folder = tempfile::tempdir().unwrap();
        write_plugin(folder.path(), "one", ADAPTER_INTERFACE, "*.down");
        write_plugin(folder.path(), "two", ADAPTER_INTERFACE, "a.*");
        let registry = PluginRegistry::look(&[folder.path().to_owned()]).unwrap();
        let error = reason(registry.choose(&adapter(folder.path(), "a.down"), &PluginChoice::default()));
        assert!(error.contains("one, two; choose one with ,plugin=ID"), "{error}");
        assert!(
            reason(registry.choose(&adapter(folder.path(), "b"), &PluginChoice::default()))
                .contains("tensors such as [\"b\"]")
        );
    }

    #[test]
    fn a_folder_inside_a_model_is_refused() {
        let model = tempfile::tempdir().unwrap();
        std::fs::write(model.path().join("model_index.json"), "{}").unwrap();
        let inside = model.path().join("transformer");
        std::fs::create_dir(&inside).unwrap();
        write_plugin(&inside, "lora", ADAPTER_INTERFACE, "*");
        assert!(
            PluginRegistry::look(std::slice::from_ref(&inside)).unwrap_err().to_string().contains("inside the model")
        );
        let path = inside.join(format!("liblora.{}", std::env::consts::DLL_EXTENSION));
        assert!(plugin_at(&path).unwrap_err().to_string().contains("inside the model"));
        let outside = tempfile::tempdir().unwrap();
        let link = outside.path().join(path.file_name().unwrap());
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(plugin_at(&link).unwrap_err().to_string().contains("inside the model"));
        assert!(
            PluginRegistry::look(&[outside.path().to_owned()]).unwrap_err().to_string().contains("inside the model")
        );
    }
}
