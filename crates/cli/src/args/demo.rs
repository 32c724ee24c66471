//! The arguments of `clearform demo`.

use super::headings::{ATTENTION, DISTILLATION, OUTPUT};
use super::{PluginSearchArgs, at_least_one};
use clap::Args;
use std::path::PathBuf;

/// `clearform demo`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  clearform demo -o demo")]
pub struct DemoArgs {
    /// The last student also attends to the whole image, averaged over D x D cells.
    #[arg(long, default_value_t = 4, value_name = "D", help_heading = ATTENTION)]
    pub pool: usize,
    /// Distillation steps per student.
    #[arg(long, default_value_t = 1000, value_parser = at_least_one, value_name = "N", help_heading = DISTILLATION)]
    pub steps: usize,
    /// Where plugins are; without any the demo leaves out the adapters.
    #[command(flatten)]
    pub plugins: PluginSearchArgs,
    /// Folder to write the models and the report to.
    #[arg(short, long, default_value = "demo", value_name = "DIR", help_heading = OUTPUT)]
    pub output: PathBuf,
}
