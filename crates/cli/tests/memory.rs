//! Memory: streamed blocks draw the same, what does not fit is refused with figures, and a limit ends no command in an
//! abort.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use clearform_testkit::assemble_pipeline;
use common::forms::pixels;
use common::{program, repository, run, stderr_of, text};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

const QUICK: [&str; 6] = ["--steps", "2", "--width", "64", "--height", "64"];

fn generated(model: &Path, prompt: &[&str], more: &[&str]) -> (Vec<u8>, String) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("out.png");
    let said = stderr_of(0, &[&["generate", text(model), "-o", text(&image)], prompt, more].concat());
    (pixels(&image), said)
}

/// Transformers of every family, and T5, whose blocks are streamed too.
#[test]
fn streamed_blocks_draw_the_same_image() {
    let flux = repository("assets/mini-flux/base");
    let (resident, said) = generated(&flux, &["cat face"], &QUICK);
    assert!(!said.contains("streamed"), "{said}");
    let (streamed, said) = generated(&flux, &["cat face"], &[&QUICK[..], &["--offload", "always"]].concat());
    assert!(said.contains("transformer") && said.contains("its blocks streamed"), "{said}");
    assert!(streamed == resident);
    for family in ["dit", "pixart", "sd3"] {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        assemble_pipeline(&repository(""), family, &model);
        let prompt: &[&str] = if family == "dit" { &["--class", "3"] } else { &["a red apple"] };
        let (resident, _) = generated(&model, prompt, &["--steps", "2"]);
        let (streamed, _) = generated(&model, prompt, &["--steps", "2", "--offload", "always"]);
        assert!(streamed == resident, "{family}");
    }
}

#[test]
fn an_adapter_acts_on_streamed_blocks() {
    let [base, lora] = ["base", "lora"].map(|name| repository("assets/mini-flux").join(name));
    let with_lora = |more: &[&str]| generated(&base, &["cat face", "--lora", text(&lora)], &[&QUICK, more].concat()).0;
    let streamed = with_lora(&["--offload", "always"]);
    assert!(streamed == with_lora(&[]));
    assert!(streamed != generated(&base, &["cat face"], &QUICK).0);
}

#[test]
fn what_does_not_fit_is_refused_with_figures() {
    let folder = tempfile::tempdir().unwrap();
    let (base, image) = (repository("assets/mini-flux/base"), folder.path().join("out.png"));
    let generate = ["generate", text(&base), "cat face", "-o", text(&image)];
    let large = ["--width", "2048", "--height", "2048", "--max-memory", "300M"];
    let said = stderr_of(1, &[&generate[..], &large].concat());
    assert!(said.contains("not enough memory: transformer") && said.contains("--max-memory leaves 315 MB"), "{said}");
    assert!(said.contains("pass a smaller --width and --height, or take a file in a smaller format"), "{said}");
    assert!(!image.exists());
    run(0, &[&generate[..], &QUICK, &["--max-memory", "2G"]].concat());
    let said = stderr_of(2, &[&generate[..], &["--max-memory", "2"]].concat());
    assert!(said.contains("as 8G or 512M, or auto"), "{said}");
}

/// Under `ulimit -v` a command is done or exits with 1 and words; it is never aborted.
#[test]
fn a_limit_of_the_address_space_ends_in_words() {
    let base = repository("assets/mini-flux/base");
    let folder = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for megabytes in [200, 300, 400, 600, 800, 1200, 2000, 4000] {
        let image = folder.path().join(format!("{megabytes}.png"));
        let script = format!("ulimit -v {}; exec \"$0\" \"$@\"", megabytes * 1024);
        let output = Command::new("sh")
            .args(["-c", &script, text(&program()), "generate", text(&base), "cat", "-o", text(&image)])
            .args(["--steps", "1", "--width", "512", "--height", "512", "--threads", "2"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), None, "{megabytes} MB: {said}");
        match output.status.code() {
            Some(0) => assert!(image.exists(), "{megabytes} MB"),
            Some(1) => {
                refused += 1;
                assert!(said.contains("memory") && !image.exists(), "{megabytes} MB: {said}");
            }
            other => panic!("{megabytes} MB: {other:?} {said}"),
        }
    }
    assert!((1..8).contains(&refused), "{refused} of 8");
}

/// The other commands, on small models.
#[test]
fn no_command_is_aborted_under_a_limit() {
    let folder = tempfile::tempdir().unwrap();
    let [flux, dit] = ["assets/mini-flux/base", "assets/mini-dit/model"].map(repository);
    let commands: [&[&str]; 5] = [
        &["inspect", text(&flux)],
        &["convert", text(&flux), "--no-distill", "--radius", "4", "-o", "OUT"],
        &[
            "convert",
            text(&dit),
            "--radius",
            "4",
            "--steps",
            "2",
            "--sample-count",
            "4",
            "--held-out",
            "2",
            "-o",
            "OUT",
        ],
        &["bench", "step", "--width", "256", "--grid", "16x16", "--repeat", "0"],
        &["generate", text(&dit), "--class", "3", "--steps", "2", "-o", "OUT.png"],
    ];
    let limits = [200, 205, 210, 215, 220, 225, 230, 240, 250, 260, 280, 300, 320, 350, 400, 500, 650, 800, 1200, 4000];
    for (index, command) in commands.iter().enumerate() {
        let mut finished = 0;
        for megabytes in limits {
            let output = folder.path().join(format!("{index}-{megabytes}"));
            let arguments = command.iter().map(|argument| argument.replace("OUT", text(&output)));
            let script = format!("ulimit -v {}; exec \"$0\" \"$@\"", megabytes * 1024);
            let run = Command::new("sh").args(["-c", &script, text(&program())]).args(arguments).output().unwrap();
            let said = String::from_utf8_lossy(&run.stderr);
            match run.status.code() {
                Some(0) => finished += 1,
                Some(1) => assert!(said.contains("memory"), "{command:?}, {megabytes} MB: {said}"),
                _ => panic!("{command:?}, {megabytes} MB: {} {said}", run.status),
            }
        }
        assert!(finished > 0, "{command:?}");
    }
}
