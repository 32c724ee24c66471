//! [`list_plugins`] and [`check_plugin`]: the plugins that open adapters, and whether one does what it declares.

use crate::adapters::{PluginOptions, plugin_registry};
use crate::{ClearformError, Result};
use clearform_plugin_host::{
    Description, ExampleResults, Plugin, PluginOrigin, PluginRegistry, check_plugin as run_examples, plugin_at,
};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// The plugins in the folders of `options`, next to the program, and linked into it. None is loaded.
///
/// # Errors
/// A folder cannot be read, or is inside a model.
pub fn list_plugins(options: &PluginOptions) -> Result<PluginListing> {
    Ok(PluginListing::new(&plugin_registry(options)?))
}

/// Loads the plugin `plugin`, a shared library or, if there is no such file, the id of a listed plugin, and runs the examples
/// that it declares.
///
/// # Errors
/// There is no such plugin, or it cannot be loaded.
pub fn check_plugin(plugin: &Path, options: &PluginOptions) -> Result<PluginCheck> {
    let plugin = find_plugin(plugin, options)?;
    Ok(PluginCheck { plugin: ListedPlugin::new(&plugin, &[]), examples: run_examples(&plugin)? })
}

fn find_plugin(wanted: &Path, options: &PluginOptions) -> Result<Plugin> {
    if wanted.is_file() {
        return Ok(plugin_at(wanted)?);
    }
    let registry = plugin_registry(options)?;
    let id = |plugin: &Plugin| plugin.description.id.clone();
    registry.plugins().iter().find(|plugin| Path::new(&id(plugin)) == wanted).cloned().ok_or_else(|| {
        let ids: Vec<String> = registry.plugins().iter().map(id).collect();
        let available = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
        ClearformError::BadOption(format!(
            "{}: expected a plugin's library, or the id of a plugin: found neither; available plugins: {available}",
            wanted.display()
        ))
    })
}

/// The plugins that a program has.
#[derive(Debug, Serialize)]
pub struct PluginListing {
    /// Those that are used, sorted by id.
    pub plugins: Vec<ListedPlugin>,
    /// Plugins whose description cannot be read, with the reason.
    pub broken: Vec<(String, String)>,
}

/// A plugin, and where it comes from.
#[derive(Debug, Serialize)]
pub struct ListedPlugin {
    /// Its id, as in `plugin=ID`.
    pub id: String,
    /// Its version.
    pub version: String,
    /// Its interface with the revision.
    pub interface: String,
    /// Its purpose, in one line.
    pub summary: String,
    /// The library, or the package that is linked into the program.
    pub origin: String,
    /// The library; none if the plugin is linked into the program.
    pub path: Option<PathBuf>,
    /// Origins of the plugins with the same id that are not used because of this one.
    pub in_place_of: Vec<String>,
}

/// What came of a plugin's examples.
#[derive(Debug, Serialize)]
pub struct PluginCheck {
    /// The plugin.
    pub plugin: ListedPlugin,
    /// Its examples.
    pub examples: ExampleResults,
}

impl PluginListing {
    fn new(registry: &PluginRegistry) -> Self {
        let plugins = registry.plugins().iter().map(|plugin| ListedPlugin::new(plugin, registry.shadowed()));
        let broken = registry.broken().iter().map(|(origin, reason)| (origin.to_string(), reason.clone()));
        Self { plugins: plugins.collect(), broken: broken.collect() }
    }
}

impl ListedPlugin {
    /// `shadowed` are plugins that are not used, of any id.
    fn new(plugin: &Plugin, shadowed: &[Plugin]) -> Self {
        let Description { id, version, interface, summary, .. } = plugin.description.clone();
        let path = match &plugin.origin {
            PluginOrigin::Library(path) => Some(path.clone()),
            PluginOrigin::Linked(_) => None,
        };
        let replaced = shadowed.iter().filter(|other| other.description.id == id);
        let in_place_of = replaced.map(|other| other.origin.to_string()).collect();
        Self { id, version, interface, summary, origin: plugin.origin.to_string(), path, in_place_of }
    }
}

impl fmt::Display for PluginListing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plugins = self.plugins.iter().map(ToString::to_string);
        let broken = self.broken.iter().map(|(origin, reason)| format!("{origin}: {reason}"));
        let lines: Vec<String> = plugins.chain(broken).collect();
        f.write_str(if lines.is_empty() { "no plugins" } else { "" })?;
        f.write_str(&lines.join("\n"))
    }
}

impl fmt::Display for ListedPlugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, version, interface, summary, origin, in_place_of, .. } = self;
        write!(f, "{id} {version} ({interface}): {summary:?}\n  {origin}")?;
        in_place_of.iter().try_for_each(|origin| write!(f, "\n  in place of {origin}"))
    }
}

impl fmt::Display for PluginCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.plugin, self.examples)
    }
}
