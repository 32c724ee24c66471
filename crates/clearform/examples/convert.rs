//! Converts a checkpoint to a linear model and says how close it comes to the original.
//! `cargo run --release -p clearform --example convert -- assets/mini-flux/base /tmp/mini-flux-clear`
#![allow(clippy::print_stdout, clippy::print_stderr)]

use clearform::{CompareOptions, ConvertOptions, TrainingOptions, compare, convert};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

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
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(source), Some(output)) = (arguments.next(), arguments.next()) else {
        return Err("usage: convert SOURCE OUTPUT [STEPS]".into());
    };
    let steps = arguments.next().map_or(Ok(1000), |steps| steps.to_string_lossy().parse())?;

    let options = ConvertOptions {
        attention: "clear:r=8".parse()?,
        training: Some(TrainingOptions {
            steps: Some(steps),
            sample_count: Some(16),
            held_out: 4,
            ..TrainingOptions::default()
        }),
        ..ConvertOptions::new(&source, &output)
    };
    let converted = convert(&options, &mut ())?;
    println!("{}", converted.model);

    let report = output.with_extension("report");
    println!("{}", compare(&CompareOptions::new(&source, &output, report), &mut ())?);
    Ok(())
}
