//! Draws an image with a progress bar of its own, and cancels on request.
//! `cargo run --release -p clearform --example progress -- assets/mini-flux/base "cat face" cat.png [CANCEL_AFTER]`
#![allow(clippy::print_stdout, clippy::print_stderr)]

use clearform::{ClearformError, GenerateOptions, Observer, Progress, Prompt, Stage, generate};
use std::error::Error;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::process::ExitCode;

/// Characters of the bar.
const WIDTH: usize = 32;

/// Draws a bar.
struct Bar {
    /// Steps after which it cancels.
    cancel_after: usize,
}

impl Observer for Bar {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        let Progress { stage, done, total, .. } = *progress;
        let filled = (WIDTH * done).checked_div(total).unwrap_or(0);
        eprint!("\r{stage:?} [{}{}]", "#".repeat(filled), ".".repeat(WIDTH - filled));
        let _ = std::io::stderr().flush();
        match stage == Stage::Denoising && done >= self.cancel_after {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, prompt, output, rest @ ..] = &arguments[..] else {
        return Err("usage: progress MODEL PROMPT OUTPUT.png [CANCEL_AFTER]".into());
    };
    let cancel_after = rest.first().map_or(Ok(usize::MAX), |steps| steps.parse())?;
    let options = GenerateOptions::new(model, Prompt::Text(prompt.clone()));
    match generate(&options, &mut Bar { cancel_after }) {
        Ok(generated) => generated.save(&[output.into()])?,
        Err(ClearformError::Cancelled) => println!("cancelled"),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
