//! The `clearform` command: parses arguments, prints results, messages and progress, and sets the exit code. The
//! libraries do the work; no other crate prints.
#![allow(clippy::print_stdout)]

mod allocator;
mod args;
mod commands;
#[cfg(feature = "demo")]
mod demo;
mod huge_pages;
mod image_names;
mod interrupt;
mod options;
mod output;
mod progress;
mod progress_log;
mod stage_clock;
mod usage_tips;

use allocator::ProgramAllocator;
use args::{Cli, Command, ThreadCount};
use clearform::ClearformError;
use output::{CommandOutcome, Format, Output};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: ProgramAllocator = ProgramAllocator;

/// Exit codes are a contract: 0 done; 1 failed, or done with something missing; 2 wrong usage (set by clap); 130
/// interrupted.
fn main() -> ExitCode {
    use_one_thread_pool();
    let cli =
        Cli::parse_from_arguments(std::env::args_os()).unwrap_or_else(|error| usage_tips::corrected(error).exit());
    match run(&cli) {
        Ok(CommandOutcome::Complete) => ExitCode::SUCCESS,
        Ok(CommandOutcome::Partial) => ExitCode::FAILURE,
        // Where it stopped was said when it did.
        Err(error) if matches!(error.downcast_ref::<ClearformError>(), Some(ClearformError::Cancelled)) => {
            interrupt::EXIT_CODE.into()
        }
        Err(error) => {
            output::print_message(format_args!("error: {}", error_message(&error)));
            ExitCode::FAILURE
        }
    }
}

/// candle divides element-wise operations among threads of its own, which spin for a while after each of them and take
/// the processors from ours.
fn use_one_thread_pool() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: the process has one thread so far, so nothing reads the environment at the same time.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}

/// An error and its causes, without causes that the text before already ends with, and without the backtraces that candle
/// puts into its messages.
fn error_message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let without_backtrace = |text: String| text.split("\n   0: ").next().unwrap_or_default().to_owned();
    let causes = error.chain().map(ToString::to_string).map(without_backtrace);
    for cause in causes.filter(|cause| !cause.is_empty()) {
        match text.as_str() {
            "" => text = cause,
            before if before.ends_with(&cause) => {}
            _ => text = format!("{text}: {cause}"),
        }
    }
    text
}

fn run(cli: &Cli) -> anyhow::Result<CommandOutcome> {
    if let Some(ThreadCount(threads)) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let output = Output::new(if cli.json { Format::Json } else { Format::Text });
    match &cli.command {
        Command::Inspect(args) => commands::inspect::run(args, &output),
        Command::Convert(args) => commands::convert::run(args, &output),
        Command::Distill(args) => commands::distill::run(args, &output),
        Command::Patch(args) => commands::patch::run(args, &output),
        Command::Generate(args) => commands::generate::run(args, &output),
        Command::Forward(args) => commands::forward::run(args, &output),
        Command::Compare(args) => commands::compare::run(args, &output),
        Command::Transfer(args) => commands::transfer::run(args, &output),
        Command::Bench(args) => commands::bench::run(args, &output),
        Command::Plugins(args) => commands::plugins::run(args, &output),
        Command::Export(args) => commands::export::run(args, &output),
        Command::Verify(args) => commands::verify::run(args, &output),
        #[cfg(feature = "demo")]
        Command::Demo(args) => commands::demo::run(args, &output),
    }
}
