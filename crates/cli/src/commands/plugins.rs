//! `clearform plugins`: what adapters this installation can load, and whether a plugin keeps to the boundary.

use crate::adapters::registry;
use crate::args::{PluginsAction, PluginsArgs};
use crate::output::{CommandOutcome, Output};
use clearform_plugin_host::{ExampleResult, Plugin, check, plugin_at};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

pub fn run(args: &PluginsArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PluginsAction::List(search) => {
            let registry = registry(search)?;
            let plugins = registry.plugins().iter().map(ListedPlugin::new).collect();
            let broken: Vec<_> = registry.broken().to_vec();
            let whole = broken.is_empty();
            output.result(&PluginListing { plugins, broken })?;
            Ok(CommandOutcome::whole_if(whole))
        }
        PluginsAction::Check { path } => run_check(path, output),
    }
}

/// Loads the plugin; examples that it does not do as it says make the outcome partial.
fn run_check(path: &Path, output: &Output) -> anyhow::Result<CommandOutcome> {
    let plugin = plugin_at(path)?;
    let checked = check(&plugin)?;
    let whole = checked.failures().next().is_none();
    output.result(&PluginCheck { plugin: ListedPlugin::new(&plugin), examples: checked })?;
    Ok(CommandOutcome::whole_if(whole))
}

#[derive(Debug, Serialize)]
struct PluginListing {
    plugins: Vec<ListedPlugin>,
    /// Libraries whose description cannot be read.
    broken: Vec<(PathBuf, String)>,
}

#[derive(Debug, Serialize)]
struct ListedPlugin {
    id: String,
    version: String,
    interface: String,
    summary: String,
    path: PathBuf,
}

#[derive(Debug, Serialize)]
struct PluginCheck {
    plugin: ListedPlugin,
    examples: ExampleResult,
}

impl ListedPlugin {
    fn new(plugin: &Plugin) -> Self {
        let description = &plugin.description;
        Self {
            id: description.id.clone(),
            version: description.version.clone(),
            interface: description.interface.clone(),
            summary: description.summary.clone(),
            path: plugin.path.clone(),
        }
    }
}

impl fmt::Display for PluginListing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plugins = self.plugins.iter().map(ToString::to_string);
        let broken = self.broken.iter().map(|(path, reason)| format!("{}: {reason}", path.display()));
        let lines: Vec<String> = plugins.chain(broken).collect();
        f.write_str(if lines.is_empty() { "no plugins" } else { "" })?;
        f.write_str(&lines.join("\n"))
    }
}

impl fmt::Display for ListedPlugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, version, interface, summary, path } = self;
        write!(f, "{id} {version} ({interface}): {summary:?}\n  {}", path.display())
    }
}

impl fmt::Display for PluginCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.plugin, self.examples)
    }
}
