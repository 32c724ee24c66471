//! `clearform plugins`: lists plugins, and checks that a plugin does what it declares.

use crate::args::{PluginsAction, PluginsArgs};
use crate::output::{CommandOutcome, Output};
use clearform::{check_plugin, list_plugins};

/// Lists the plugins, or runs the examples of one; the outcome is partial if one of them is broken or fails.
pub fn run(args: &PluginsArgs, output: &Output) -> anyhow::Result<CommandOutcome> {
    match &args.action {
        PluginsAction::List(search) => {
            let listing = list_plugins(&search.into())?;
            output.result(&listing)?;
            Ok(CommandOutcome::complete_if(listing.broken.is_empty()))
        }
        PluginsAction::Check(args) => {
            let check = check_plugin(&args.plugin, &(&args.search).into())?;
            output.result(&check)?;
            Ok(CommandOutcome::complete_if(check.examples.failures().next().is_none()))
        }
    }
}
