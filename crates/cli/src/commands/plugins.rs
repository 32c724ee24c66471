//! `clearform plugins`: lists plugins, and checks that a plugin does what it declares.

use crate::args::{PluginsAction, PluginsArgs};
use crate::output::{CommandOutcome, Output};
use clearform::plugin_registry;
use clearform_plugin_host::{ExampleResults, Plugin, check_plugin, plugin_at};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// Lists the plugins, or checks one.
pub fn run(args: &PluginsArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PluginsAction::List(search) => {
            let registry = plugin_registry(&search.into())?;
            let plugins = registry.plugins().iter().map(ListedPlugin::new).collect();
            let broken: Vec<_> = registry.broken().to_vec();
            let none_broken = broken.is_empty();
            output.result(&PluginListing { plugins, broken })?;
            Ok(CommandOutcome::complete_if(none_broken))
        }
        PluginsAction::Check { path } => run_check(path, output),
    }
}

/// Loads a plugin and runs its examples; the outcome is partial if one of them fails.
fn run_check(path: &Path, output: &Output) -> anyhow::Result<CommandOutcome> {
    let plugin = plugin_at(path)?;
    let examples = check_plugin(&plugin)?;
    let none_failed = examples.failures().next().is_none();
    output.result(&PluginCheck { plugin: ListedPlugin::new(&plugin), examples })?;
    Ok(CommandOutcome::complete_if(none_failed))
}

#[derive(Debug, Serialize)]
struct PluginListing {
    plugins: Vec<ListedPlugin>,
    /// Libraries whose description cannot be read, with the reason.
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
    examples: ExampleResults,
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
