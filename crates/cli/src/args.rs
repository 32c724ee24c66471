//! The command line as data. Flag names follow diffusers and stable-diffusion.cpp where they have one.

mod adapters;
mod bench;
mod compare;
mod component_files;
mod convert;
#[cfg(feature = "demo")]
mod demo;
mod device;
mod files;
mod generate;
mod headings;
mod memory;
mod numbers;
mod patch;
mod vae;

pub use adapters::{
    AdapterArg, AdapterArgs, ApplyMode, PluginSearchArgs, PluginsAction, PluginsArgs, WeightAdapterArgs,
};
pub use bench::{
    AttentionBenchArgs, BenchArgs, BenchCommand, ModelBenchArgs, StepBenchArgs, TilesBenchArgs, TimingArgs,
    VaeBenchArgs,
};
pub use compare::{CompareArgs, SamplingArgs, TransferArgs};
pub use component_files::ComponentFileArgs;
pub use convert::{ConvertArgs, DistillArgs, Duration, LossWeights, PrecisionArg, Steps, TrainingArgs};
#[cfg(feature = "demo")]
pub use demo::DemoArgs;
pub use device::{DeviceArgs, DtypeArg};
pub use files::{ExportArgs, InspectArgs, VerifyArgs};
pub use generate::{ForwardArgs, GenerateArgs};
pub use memory::MemoryArgs;
pub use numbers::{SeedArg, ThreadCount, at_least_one, finite, not_negative};
pub use patch::{PatchAction, PatchApplyArgs, PatchArgs, PatchExtractArgs, PatchModeArg};
pub use vae::VaeArgs;

use clap::{Arg, ArgAction, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use headings::{GENERAL, INPUT};
use std::path::PathBuf;

/// Make pre-trained diffusion transformers linear: read a checkpoint, replace its attention, distil it, run it.
#[derive(Debug, Parser)]
#[command(name = "clearform", version, disable_help_flag = true, disable_version_flag = true)]
#[command(propagate_version = true, after_help = format!("Examples:\n{DEMO_EXAMPLE}{EXAMPLES}"))]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print one JSON object on stdout, and nothing else there.
    #[arg(long, global = true, help_heading = GENERAL)]
    pub json: bool,
    /// Worker threads [default: one per core].
    #[arg(long, global = true, value_name = "N", help_heading = GENERAL)]
    pub threads: Option<ThreadCount>,
    // clap's own flags would come first, in a group without a heading.
    /// Print help.
    #[arg(short, long, global = true, action = ArgAction::Help, help_heading = GENERAL)]
    help: Option<bool>,
    /// Print the version.
    #[arg(short = 'V', long, global = true, action = ArgAction::Version, help_heading = GENERAL)]
    version: Option<bool>,
}

impl Cli {
    /// Parses the command line `arguments`, the program's name first. A negative number after an option is its value, as
    /// in `--seed -1`, and never a flag.
    ///
    /// # Errors
    /// The arguments are not those of a command, or help is asked for.
    pub fn parse_from_arguments(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> clap::error::Result<Self> {
        let mut command = with_negative_numbers(Self::command());
        let matches = command.try_get_matches_from_mut(arguments)?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let takes_value = |arg: &Arg| !arg.is_positional() && arg.get_action().takes_values();
    let allow = |arg: Arg| if takes_value(&arg) { arg.allow_negative_numbers(true) } else { arg };
    command.mut_args(allow).mut_subcommands(with_negative_numbers)
}

const DEMO_EXAMPLE: &str = if cfg!(feature = "demo") { "  clearform demo -o demo\n" } else { "" };

const EXAMPLES: &str = "  clearform inspect FLUX.1-dev
  clearform convert FLUX.1-dev -o FLUX.1-dev-clear --radius 16
  clearform convert flux1-dev.safetensors -o flux-clear --components FLUX.1-dev
  clearform generate flux-clear \"a lighthouse at dawn\" --width 2048 --height 2048 -o out.png";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Identify a checkpoint, check that it is complete, and estimate what it costs to run.
    Inspect(InspectArgs),
    /// Convert a checkpoint: replace its attention, distil it, and write a portable model.
    Convert(Box<ConvertArgs>),
    /// Distil a converted model further.
    Distill(Box<DistillArgs>),
    /// Extract the distilled attention of a model, or apply it to another.
    Patch(PatchArgs),
    /// Generate images from a prompt or a class.
    Generate(Box<GenerateArgs>),
    /// Run the transformer once on given tensors.
    Forward(ForwardArgs),
    /// Generate images with teacher and student from the same seeds and compare them.
    Compare(CompareArgs),
    /// Measure what carries over to the linear model: a fine-tune's weights, LoRAs, ControlNets.
    Transfer(Box<TransferArgs>),
    /// Time attention, a step or a model.
    Bench(BenchArgs),
    /// List or check plugins.
    Plugins(PluginsArgs),
    /// Write the transformer to one file, with the tensor names of another layout.
    Export(ExportArgs),
    /// Check every recorded file against its size and hash.
    Verify(VerifyArgs),
    /// Convert, distil and compare an embedded model, and write a report.
    #[cfg(feature = "demo")]
    Demo(DemoArgs),
}

/// How a source is read.
#[derive(Debug, Clone, Default, Args)]
pub struct SourceArgs {
    /// Diffusers config.json, for a single file whose tensors do not determine every size.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub config: Option<PathBuf>,
    /// Read the source as this family, instead of detecting it.
    #[arg(long, value_name = "FAMILY", help_heading = INPUT)]
    pub family: Option<String>,
    /// Read the source as this variant, instead of detecting it.
    #[arg(long, value_name = "VARIANT", help_heading = INPUT)]
    pub variant: Option<String>,
    /// Additional manifest of families, layouts and variants.
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub manifest: Option<PathBuf>,
    /// Continue although tensors of the source are not understood.
    #[arg(long, help_heading = INPUT)]
    pub allow_unmatched: bool,
}

#[cfg(test)]
mod tests {
    use super::headings::{ADAPTERS, ATTENTION, DEVICE, DISTILLATION, GENERAL, INPUT, OUTPUT, SAMPLING, TIMING};
    use super::*;

    /// Commands that have no subcommands.
    const COMMANDS: usize = if cfg!(feature = "demo") { 19 } else { 18 };

    const ORDER: [&str; 9] = [INPUT, ATTENTION, DISTILLATION, SAMPLING, ADAPTERS, TIMING, OUTPUT, DEVICE, GENERAL];

    /// Every command that has no subcommands.
    fn leaves(command: &clap::Command) -> Vec<clap::Command> {
        let below: Vec<_> = command.get_subcommands().filter(|below| below.get_name() != "help").collect();
        if below.is_empty() { vec![command.clone()] } else { below.into_iter().flat_map(leaves).collect() }
    }

    fn built() -> clap::Command {
        let mut command = Cli::command();
        command.build();
        command
    }

    #[test]
    fn option_groups_come_in_the_same_order_everywhere() {
        let commands = leaves(&built());
        assert_eq!(commands.len(), COMMANDS);
        for command in commands {
            let options = command.get_arguments().filter(|arg| !arg.is_positional());
            let groups = options.map(|arg| {
                let heading = arg.get_help_heading();
                heading.unwrap_or_else(|| panic!("{}: {} has no heading", command.get_name(), arg.get_id()))
            });
            let mut first = Vec::new();
            groups.for_each(|group| {
                if !first.contains(&group) {
                    first.push(group)
                }
            });
            let known: Vec<_> = ORDER.into_iter().filter(|group| first.contains(group)).collect();
            assert_eq!(first, known, "{}", command.get_name());
        }
    }

    /// Every flag that takes a number, alone or in a list.
    #[test]
    fn numbers_that_are_none_are_refused() {
        let mut flags = 0;
        for command in leaves(&built()) {
            for arg in command.get_arguments().filter(|arg| is_number(arg)) {
                flags += 1;
                for value in ["nan", "NaN", "inf", "-inf", "infinity", "1e999"] {
                    let flag = format!("--{}={value}", arg.get_long().unwrap());
                    let error = command.clone().try_get_matches_from([command.get_name(), &flag]).unwrap_err();
                    let text = error.to_string();
                    assert!(text.contains("invalid value") && text.contains(value), "{flag}: {text}");
                }
            }
        }
        assert!(flags >= 8, "{flags}");
    }

    fn is_number(arg: &clap::Arg) -> bool {
        use std::any::TypeId;
        let types = [TypeId::of::<f64>(), TypeId::of::<LossWeights>(), TypeId::of::<Duration>()];
        types.iter().any(|number| arg.get_value_parser().type_id() == *number)
    }

    #[test]
    fn every_command_has_an_example() {
        for command in leaves(&built()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("{} ", command.get_name())), "{}: {help:?}", command.get_name());
            assert!(help.contains("Example:\n  clearform "), "{}: {help:?}", command.get_name());
        }
    }

    /// The examples of every `--help`, parsed as they are printed.
    #[test]
    fn examples_are_accepted() {
        let lines = |command: &clap::Command| -> Vec<String> {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            help.lines().filter_map(|line| line.strip_prefix("  clearform ")).map(str::to_owned).collect()
        };
        let mut examples = lines(&built());
        examples.extend(leaves(&built()).iter().flat_map(lines));
        let general = if cfg!(feature = "demo") { 5 } else { 4 };
        assert_eq!(examples.len(), general + COMMANDS);
        for example in examples {
            assert_is_accepted(&example);
        }
    }

    fn assert_is_accepted(example: &str) {
        // Only prompts are quoted, and they hold several words.
        let quoted = example
            .split('"')
            .enumerate()
            .flat_map(|(at, text)| if at % 2 == 1 { vec![text] } else { text.split_whitespace().collect() });
        let parsed = Cli::try_parse_from(std::iter::once("clearform").chain(quoted));
        assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
    }

    /// The commands of README.md and the guide.
    #[test]
    fn the_guide_shows_commands_that_are_accepted() {
        let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let pages = repository.join("docs").read_dir().unwrap().map(|page| page.unwrap().path());
        let pages = pages.filter(|page| page.extension().is_some_and(|extension| extension == "md"));
        let mut commands = 0;
        for page in pages.chain([repository.join("README.md"), repository.join("plugins/README.md")]) {
            let text = std::fs::read_to_string(&page).unwrap();
            let blocks = text.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix("sh\n"));
            for line in blocks.flat_map(str::lines).filter_map(|line| line.strip_prefix("clearform ")) {
                commands += 1;
                assert_is_accepted(line.split(" #").next().unwrap_or(line).trim());
            }
        }
        assert!(commands >= 35, "{commands}");
    }
}
