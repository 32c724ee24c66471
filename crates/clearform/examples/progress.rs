//! Draws an image with a progress bar of its own, and cancels on request.
//! `cargo run --release -p clearform --example progress -- assets/mini-flux/base "cat face" cat.png [CANCEL_AFTER]`
#![allow(clippy::print_stdout)]

use clearform::{ClearformError, GenerateOptions, Observer, Progress, Prompt, Stage, generate};
use std::error::Error;
use std::io::Write as _;
use std::ops::ControlFlow;

/// A bar of as many characters as there are steps.
struct Bar {
    /// Steps after which it cancels.
    cancel_after: usize,
}

impl Observer for Bar {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        let Progress { stage, done, total, .. } = *progress;
        eprint!("\r{stage:?} [{}{}]", "#".repeat(done), ".".repeat(total.saturating_sub(done)));
        let _ = std::io::stderr().flush();
        match stage == Stage::Denoising && done >= self.cancel_after {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
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
