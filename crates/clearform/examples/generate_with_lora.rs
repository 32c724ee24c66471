//! Draws an image with a LoRA.
//! `cargo run --release -p clearform --example generate_with_lora -- assets/mini-flux/base assets/mini-flux/lora "cat face" cat.png`
#![allow(clippy::print_stdout, clippy::print_stderr)]

use clearform::{AdapterKind, AdapterOptions, AdapterSpec, GenerateOptions, Observer, Prompt, generate};
use std::error::Error;
use std::process::ExitCode;

/// Prints messages, among them how many tensors of the LoRA were applied.
struct Messages;

impl Observer for Messages {
    fn note(&mut self, message: &str) {
        eprintln!("{message}");
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
    let [model, lora, prompt, output] = &arguments[..] else {
        return Err("usage: generate_with_lora MODEL LORA PROMPT OUTPUT.png".into());
    };
    let lora = AdapterSpec::new(lora, AdapterKind::Lora).with_strength(0.8);
    let options = GenerateOptions {
        adapters: AdapterOptions::new([lora]),
        seed: 7,
        ..GenerateOptions::new(model, Prompt::Text(prompt.clone()))
    };
    let generated = generate(&options, &mut Messages)?;
    generated.save(&[output.into()])?;
    println!("{output}: attention {}", generated.attention);
    Ok(())
}
