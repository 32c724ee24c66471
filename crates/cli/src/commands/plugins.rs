//! `clearform plugins`: lists plugins, and checks that a plugin does what it declares.

use crate::args::{PluginCheckArgs, PluginsAction, PluginsArgs};
use crate::output::{CommandOutcome, Output};
use anyhow::bail;
use clearform::plugin_registry;
use clearform_plugin_host::{
    Description, ExampleResults, Plugin, PluginOrigin, PluginRegistry, check_plugin, plugin_at,
};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// Lists the plugins, or checks one.
pub fn run(args: &PluginsArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PluginsAction::List(search) => {
            let listing = PluginListing::new(&plugin_registry(&search.into())?);
            output.result(&listing)?;
            Ok(CommandOutcome::complete_if(listing.broken.is_empty()))
        }
        PluginsAction::Check(args) => run_check(args, output),
    }
}

/// Loads a plugin and runs its examples; the outcome is partial if one of them fails.
fn run_check(args: &PluginCheckArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    let plugin = find_plugin(args)?;
    let examples = check_plugin(&plugin)?;
    let none_failed = examples.failures().next().is_none();
    output.result(&PluginCheck { plugin: ListedPlugin::new(&plugin, &[]), examples })?;
    Ok(CommandOutcome::complete_if(none_failed))
}

/// The plugin in a library or, if there is no such file, the one with this id.
fn find_plugin(args: &PluginCheckArgs) -> anyhow::Result<Plugin> {
    if args.plugin.exists() {
        return Ok(plugin_at(&args.plugin)?);
    }
    let registry = plugin_registry(&(&args.search).into())?;
    let id = |plugin: &Plugin| plugin.description.id.clone();
    match registry.plugins().iter().find(|plugin| Path::new(&id(plugin)) == args.plugin) {
        Some(plugin) => Ok(plugin.clone()),
        None => {
            let ids: Vec<String> = registry.plugins().iter().map(id).collect();
            let available = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            bail!(
                "{}: expected a plugin's library, or the id of a plugin: found neither; available plugins: {available}",
                args.plugin.display()
            )
        }
    }
}

#[derive(Debug, Serialize)]
struct PluginListing {
    plugins: Vec<ListedPlugin>,
    /// Plugins whose description cannot be read, with the reason.
    broken: Vec<(String, String)>,
}

#[derive(Debug, Serialize)]
struct ListedPlugin {
    id: String,
    version: String,
    interface: String,
    summary: String,
    /// The library, or the package that is linked into the program.
    origin: String,
    /// The library; none if the plugin is linked into the program.
    path: Option<PathBuf>,
    /// Origins of the plugins with the same id that are not used because of this one.
    in_place_of: Vec<String>,
}

#[derive(Debug, Serialize)]
struct PluginCheck {
    plugin: ListedPlugin,
    examples: ExampleResults,
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
