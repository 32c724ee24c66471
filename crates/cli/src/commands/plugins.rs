//! `clearform plugins`: what adapters this installation can load.

use crate::args::{Plugins, PluginsAction};
use crate::output::{Outcome, Output};
use serde::Serialize;
use std::fmt;

pub fn run(args: &Plugins, output: &Output) -> anyhow::Result<Outcome> {
    let PluginsAction::List = args.action;
    let plugins =
        clearform_plugins::available().iter().map(|plugin| format!("{} ({})", plugin.id, plugin.interface)).collect();
    output.result(&Listing { plugins })?;
    Ok(Outcome::Whole)
}

#[derive(Debug, Serialize)]
struct Listing {
    plugins: Vec<String>,
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.plugins.is_empty() {
            return f.write_str("no plugins");
        }
        f.write_str(&self.plugins.join("\n"))
    }
}
