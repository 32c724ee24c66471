//! [`PluginRegistry`]: the available plugins, and the choice of the one that opens an adapter. Nothing is loaded here.

use crate::{Description, PluginError, PluginOrigin, Result};
use clearform_plugin_abi::{ADAPTER_INTERFACE, CONTROLNET_INTERFACE, PluginEntry};
use clearform_weights::{Checkpoint, TensorSource};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What the files of each interface are, and the option that takes them.
const KINDS: [(&str, (&str, &str)); 2] = [
    (ADAPTER_INTERFACE, ("an edit of weights, such as a LoRA", "--lora")),
    (CONTROLNET_INTERFACE, ("a ControlNet", "--controlnet")),
];
const UNKNOWN_KIND: (&str, &str) = ("another kind of adapter", "--adapter");

/// A plugin with its description.
#[derive(Debug, Clone)]
pub struct Plugin {
    /// Its library, or the program.
    pub origin: PluginOrigin,
    /// Its description.
    pub description: Description,
}

/// The plugins in some folders, and those that are linked into the program.
#[derive(Debug, Clone, Default)]
pub struct PluginRegistry {
    plugins: Vec<Plugin>,
    /// Plugins with the id of an earlier one, which is used in their place.
    shadowed: Vec<Plugin>,
    /// Plugins whose description is not valid, with reasons.
    broken: Vec<(PluginOrigin, String)>,
    disabled: bool,
}

/// Restricts which plugin may open an adapter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginChoice {
    /// Only plugins of this interface.
    pub interface: Option<&'static str>,
    /// Only the plugin with this id, whatever it claims.
    pub id: Option<String>,
}

impl PluginRegistry {
    /// A registry without plugins, linked ones included, for `--no-plugins`.
    pub fn disabled() -> Self {
        Self { disabled: true, ..Self::default() }
    }

    /// Finds the plugins in `folders`. Of several with the same id, the first is used.
    ///
    /// # Errors
    /// A folder cannot be read, or is inside a model: code that comes with a model is never loaded.
    pub fn scan(folders: &[PathBuf]) -> Result<Self> {
        let mut registry = Self::default();
        for folder in folders {
            check_outside_models(folder)?;
            for path in libraries(folder)? {
                registry.add_library(path)?;
            }
        }
        Ok(registry)
    }

    /// Adds plugins that are linked into the program. A library with the same id takes precedence; a disabled registry
    /// stays empty.
    #[must_use]
    pub fn with_linked(mut self, entries: &[PluginEntry]) -> Self {
        let used = if self.disabled { &[] } else { entries };
        for entry in used {
            self.add(PluginOrigin::Linked(*entry), Description::parse(entry.description));
        }
        self
    }

    /// The plugins that are used, sorted by id.
    pub fn plugins(&self) -> &[Plugin] {
        &self.plugins
    }

    /// Plugins that are not used because an earlier one has the same id, in the order of precedence.
    pub fn shadowed(&self) -> &[Plugin] {
        &self.shadowed
    }

    /// Plugins whose description is not valid, with reasons.
    pub fn broken(&self) -> &[(PluginOrigin, String)] {
        &self.broken
    }

    /// The plugin that opens `adapter`.
    ///
    /// # Errors
    /// No plugin opens it, or several do: the error lists them.
    pub fn choose(&self, adapter: &Checkpoint, choice: &PluginChoice) -> Result<&Plugin> {
        let no_plugin = |reason: String| PluginError::NoPlugin { adapter: adapter.path().to_owned(), reason };
        if self.disabled {
            return Err(no_plugin("plugins are disabled (--no-plugins), but this adapter needs one".to_owned()));
        }
        let infos = adapter.tensors();
        let names: BTreeSet<&str> = infos.iter().map(|info| info.name.as_str()).collect();
        let opens = |plugin: &&Plugin| match &choice.id {
            Some(id) => plugin.description.id == *id,
            None => plugin.description.claims(&names, adapter.metadata()),
        };
        let candidates: Vec<&Plugin> = self.plugins.iter().filter(opens).collect();
        let fitting: Vec<&Plugin> = candidates.iter().copied().filter(|plugin| choice.allows(plugin)).collect();
        match fitting[..] {
            [plugin] => Ok(plugin),
            [] => Err(no_plugin(self.why_none_fits(&candidates, choice, &names))),
            _ => Err(no_plugin(format!("several plugins claim it: {}; choose one with ,plugin=ID", ids(&fitting)))),
        }
    }

    /// Why no plugin fits. `candidates` would open the file, but have another interface.
    fn why_none_fits(&self, candidates: &[&Plugin], choice: &PluginChoice, names: &BTreeSet<&str>) -> String {
        if let [plugin, ..] = candidates {
            let Description { id, interface, .. } = &plugin.description;
            let (kind, flag) = KINDS.iter().find(|(known, ..)| interface == known).map_or(UNKNOWN_KIND, |kind| kind.1);
            return format!("the plugin {id:?} opens it as {kind}: give it with {flag}");
        }
        if let Some(reason) = self.refusal(names) {
            return reason.to_owned();
        }
        let available = match self.plugins.is_empty() {
            true => "there are no plugins: pass their folder with --plugin-dir".to_owned(),
            false => format!("available plugins: {}", ids(&self.plugins.iter().collect::<Vec<_>>())),
        };
        match &choice.id {
            Some(id) => format!("there is no plugin {id:?}; {available}"),
            None => {
                let first: Vec<&&str> = names.iter().take(3).collect();
                format!("no plugin recognises this file, with tensors such as {first:?}; {available}")
            }
        }
    }

    /// What a file with the tensors `names` is that a plugin knows and does not open.
    fn refusal<'a>(&'a self, names: &BTreeSet<&str>) -> Option<&'a str> {
        let refusal = |plugin: &'a Plugin| names.iter().find_map(|name| plugin.description.refusal(name));
        self.plugins.iter().find_map(refusal)
    }

    fn add_library(&mut self, path: PathBuf) -> Result<()> {
        check_outside_models(&path)?;
        let bytes = std::fs::read(&path).map_err(|source| PluginError::Io { path: path.clone(), source })?;
        if let Some(description) = Description::find(&bytes) {
            self.add(PluginOrigin::Library(path), description);
        }
        Ok(())
    }

    fn add(&mut self, origin: PluginOrigin, description: std::result::Result<Description, String>) {
        let description = match description {
            Ok(description) => description,
            Err(reason) => return self.broken.push((origin, reason)),
        };
        match self.plugins.binary_search_by(|known| known.description.id.cmp(&description.id)) {
            Ok(_) => self.shadowed.push(Plugin { origin, description }),
            Err(place) => self.plugins.insert(place, Plugin { origin, description }),
        }
    }
}

impl Plugin {
    /// An error about the plugin itself.
    pub(crate) fn error(&self, reason: impl Into<String>) -> PluginError {
        PluginError::BadPlugin { plugin: self.origin.clone(), reason: reason.into() }
    }
}

impl PluginChoice {
    fn allows(&self, plugin: &Plugin) -> bool {
        self.interface.is_none_or(|interface| plugin.description.interface == interface)
    }
}

fn ids(plugins: &[&Plugin]) -> String {
    let ids: Vec<&str> = plugins.iter().map(|plugin| plugin.description.id.as_str()).collect();
    ids.join(", ")
}

/// The plugin in the library at `path`, which may be anywhere but inside a model.
///
/// # Errors
/// The library is not a plugin, or is inside a model.
pub fn plugin_at(path: &Path) -> Result<Plugin> {
    let origin = PluginOrigin::Library(path.to_owned());
    let bad_plugin = |reason: String| PluginError::BadPlugin { plugin: origin.clone(), reason };
    check_outside_models(path)?;
    let bytes = std::fs::read(path).map_err(|source| PluginError::Io { path: path.to_owned(), source })?;
    let found = Description::find(&bytes);
    let description = found.ok_or_else(|| bad_plugin("it is not a plugin: it contains no description".to_owned()))?;
    Ok(Plugin { description: description.map_err(bad_plugin)?, origin })
}

/// Shared libraries directly in `folder`, sorted.
fn libraries(folder: &Path) -> Result<Vec<PathBuf>> {
    let io_error = |source| PluginError::Io { path: folder.to_owned(), source };
    let entries = std::fs::read_dir(folder).map_err(io_error)?;
    let entries = entries.collect::<std::io::Result<Vec<_>>>().map_err(io_error)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    let extension = OsStr::new(std::env::consts::DLL_EXTENSION);
    paths.retain(|path| path.extension() == Some(extension) && path.is_file());
    paths.sort();
    Ok(paths)
}

/// Rejects paths inside a model folder, whatever links lead there: a downloaded model must not bring code along.
fn check_outside_models(path: &Path) -> Result<()> {
    let real = path.canonicalize().map_err(|source| PluginError::Io { path: path.to_owned(), source })?;
    match real.ancestors().find(|folder| is_model(folder)) {
        None => Ok(()),
        Some(model) => {
            let reason = format!(
                "it is inside the model {}, and code that comes with a model is never loaded. If you trust it, copy it \
                 to a folder of its own",
                model.display()
            );
            Err(PluginError::BadPlugin { plugin: PluginOrigin::Library(path.to_owned()), reason })
        }
    }
}

fn is_model(folder: &Path) -> bool {
    ["clearform.toml", "model_index.json"].iter().any(|file| folder.join(file).is_file())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use clearform_plugin_abi::{ClearformHost, ClearformPlugin, DESCRIPTION_BEGIN, DESCRIPTION_END};
    use clearform_weights::InMemoryTensors;
    use std::collections::BTreeMap;

    fn description(id: &str, interface: &str, claim: &str) -> String {
        format!(
            "id = {id:?}\nversion = \"1\"\ninterface = {interface:?}\nabi = 1\nsummary = \"\"\n\
             [[claims]]\nany = [{claim:?}]\n"
        )
    }

    fn write_plugin(folder: &Path, id: &str, interface: &str, claim: &str) {
        let text = description(id, interface, claim);
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

    fn choice(interface: Option<&'static str>, id: Option<&str>) -> PluginChoice {
        PluginChoice { interface, id: id.map(str::to_owned) }
    }

    #[test]
    fn the_plugin_that_claims_a_file_is_chosen() {
        let folder = tempfile::tempdir().unwrap();
        write_plugin(folder.path(), "lora", ADAPTER_INTERFACE, "*.down");
        write_plugin(folder.path(), "net", CONTROLNET_INTERFACE, "*.net");
        std::fs::write(folder.path().join("libother.so"), "not a plugin").unwrap();
        let registry = PluginRegistry::scan(&[folder.path().to_owned()]).unwrap();
        assert_eq!(registry.plugins().len(), 2);
        let adapter = adapter(folder.path(), "a.down");
        let chosen =
            |choice: PluginChoice| registry.choose(&adapter, &choice).map(|plugin| plugin.description.id.clone());
        assert_eq!(chosen(choice(None, None)).unwrap(), "lora");
        assert_eq!(chosen(choice(None, Some("net"))).unwrap(), "net");
        let error = |choice: PluginChoice| chosen(choice).unwrap_err().to_string();
        let lora = error(choice(Some(CONTROLNET_INTERFACE), None));
        assert!(lora.ends_with("opens it as an edit of weights, such as a LoRA: give it with --lora"), "{lora}");
        let net = error(choice(Some(ADAPTER_INTERFACE), Some("net")));
        assert!(net.ends_with("opens it as a ControlNet: give it with --controlnet"), "{net}");
        assert!(error(choice(None, Some("x"))).contains("there is no plugin \"x\"; available plugins: lora, net"));
        let disabled = PluginRegistry::disabled().choose(&adapter, &choice(None, None)).unwrap_err();
        assert!(disabled.to_string().contains("--no-plugins"));
    }

    #[test]
    fn a_file_that_two_plugins_claim_is_an_error_that_lists_them() {
        let folder = tempfile::tempdir().unwrap();
        write_plugin(folder.path(), "one", ADAPTER_INTERFACE, "*.down");
        write_plugin(folder.path(), "two", ADAPTER_INTERFACE, "a.*");
        let registry = PluginRegistry::scan(&[folder.path().to_owned()]).unwrap();
        let error = |tensor: &str| {
            registry.choose(&adapter(folder.path(), tensor), &PluginChoice::default()).unwrap_err().to_string()
        };
        let several = error("a.down");
        assert!(several.contains("one, two; choose one with ,plugin=ID"), "{several}");
        assert!(error("b").contains("tensors such as [\"b\"]"));
    }

    /// A plugin that the tests list but never load.
    fn linked(id: &str) -> PluginEntry {
        extern "C" fn null(_: *const ClearformHost) -> *const ClearformPlugin {
            std::ptr::null()
        }
        let description = description(id, ADAPTER_INTERFACE, "*.down").leak();
        PluginEntry { package: "clearform-linked", description, function: null }
    }

    #[test]
    fn a_library_takes_precedence_over_a_linked_plugin() {
        let [first, second] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        write_plugin(first.path(), "lora", ADAPTER_INTERFACE, "*.down");
        write_plugin(second.path(), "lora", ADAPTER_INTERFACE, "*.down");
        let scanned = PluginRegistry::scan(&[first.path().to_owned(), second.path().to_owned()]).unwrap();
        let registry = scanned.with_linked(&[linked("lora"), linked("an-other")]);
        let shown = |plugins: &[Plugin]| -> Vec<String> {
            plugins.iter().map(|plugin| format!("{}: {}", plugin.description.id, plugin.origin)).collect()
        };
        let library =
            |folder: &Path| folder.join(format!("liblora.{}", std::env::consts::DLL_EXTENSION)).display().to_string();
        let program = "clearform-linked (linked into the program)";
        let used = [format!("an-other: {program}"), format!("lora: {}", library(first.path()))];
        assert_eq!(shown(registry.plugins()), used);
        assert_eq!(
            shown(registry.shadowed()),
            [format!("lora: {}", library(second.path())), format!("lora: {program}")]
        );
        let adapter = adapter(first.path(), "a.down");
        let chosen = registry.choose(&adapter, &choice(None, Some("lora"))).unwrap();
        assert_eq!(chosen.origin.to_string(), library(first.path()));
    }

    #[test]
    fn linked_plugins_are_chosen_by_their_claims_and_listed_if_they_are_broken() {
        let folder = tempfile::tempdir().unwrap();
        let broken = PluginEntry { package: "clearform-broken", description: "id = 3", ..linked("x") };
        let registry = PluginRegistry::default().with_linked(&[linked("lora"), broken]);
        let chosen = registry.choose(&adapter(folder.path(), "a.down"), &PluginChoice::default()).unwrap();
        assert_eq!(chosen.description.id, "lora");
        let [(origin, reason)] = registry.broken() else { panic!("{:?}", registry.broken()) };
        assert_eq!(origin.to_string(), "clearform-broken (linked into the program)");
        assert!(reason.starts_with("its description: "), "{reason}");
        assert!(PluginRegistry::disabled().with_linked(&[linked("lora")]).plugins().is_empty());
        let registry = PluginRegistry::default();
        let none = registry.choose(&adapter(folder.path(), "a.down"), &PluginChoice::default());
        let message = none.unwrap_err().to_string();
        assert!(message.ends_with("there are no plugins: pass their folder with --plugin-dir"), "{message}");
    }

    #[test]
    fn plugins_inside_a_model_are_rejected() {
        let model = tempfile::tempdir().unwrap();
        std::fs::write(model.path().join("model_index.json"), "{}").unwrap();
        let inside = model.path().join("transformer");
        std::fs::create_dir(&inside).unwrap();
        write_plugin(&inside, "lora", ADAPTER_INTERFACE, "*");
        let scan_error = |folder: &Path| PluginRegistry::scan(&[folder.to_owned()]).unwrap_err().to_string();
        assert!(scan_error(&inside).contains("inside the model"));
        let path = inside.join(format!("liblora.{}", std::env::consts::DLL_EXTENSION));
        assert!(plugin_at(&path).unwrap_err().to_string().contains("inside the model"));
        let outside = tempfile::tempdir().unwrap();
        let link = outside.path().join(path.file_name().unwrap());
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(plugin_at(&link).unwrap_err().to_string().contains("inside the model"));
        assert!(scan_error(outside.path()).contains("inside the model"));
    }
}
