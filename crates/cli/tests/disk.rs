//! If the disk is full or read-only, the command reports it and leaves nothing behind.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Tiny, repository, stderr_of, text};
use std::path::Path;
use std::process::{Command, Output};

/// Runs the command with a limit on file sizes: 100 blocks of 512 or 1024 bytes.
fn on_full_disk(arguments: &[&str]) -> Output {
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$@\"";
    let command = ["-c", script, "sh", env!("CARGO_BIN_EXE_clearform")];
    Command::new("sh").args(command).args(arguments).output().unwrap()
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), Tiny::new());
    let (model, output) = (text(tiny.path()), folder.path().join("out"));
    let file = folder.path().join("out.safetensors");
    let cases = repository("tests/fixtures/flux/head24/cases.safetensors");
    let large = [
        vec!["convert", model, "--no-distill", "-o", text(&output)],
        vec!["convert", model, "--no-distill", "--dtype", "bf16", "-o", text(&output)],
        vec!["export", model, "--to", "bfl", "-o", text(&file)],
        vec!["convert", model, "--samples", text(&cases), "-o", text(&output)],
    ];
    for arguments in &large {
        let done = on_full_disk(arguments);
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert_eq!(entries(folder.path()), 0, "{arguments:?}: {stderr}");
    }
    for arguments in &large[..3] {
        let stderr = String::from_utf8(on_full_disk(arguments).stderr).unwrap();
        assert!(stderr.contains("bytes are needed") && stderr.contains("free some space"), "{arguments:?}: {stderr}");
        assert!(stderr.contains(text(&output)), "{arguments:?}: {stderr}");
    }
}

#[test]
fn an_existing_model_survives_a_full_disk() {
    let (folder, tiny) = (tempfile::tempdir().unwrap(), Tiny::new());
    let (model, output) = (text(tiny.path()), folder.path().join("out"));
    common::run(0, &["convert", model, "--no-distill", "-o", text(&output)]);
    let done = on_full_disk(&["convert", model, "--no-distill", "--overwrite", "-o", text(&output)]);
    assert_eq!(done.status.code(), Some(1));
    common::run(0, &["verify", text(&output)]);
    assert_eq!(entries(folder.path()), 1);
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let tiny = Tiny::new();
    let folder = "/sys/clearform";
    for arguments in [["convert", "--no-distill"], ["export", "--to=bfl"]] {
        let target = format!("{folder}/out.safetensors");
        let stderr = stderr_of(1, &[arguments[0], text(tiny.path()), arguments[1], "-o", &target]);
        assert!(stderr.contains(folder), "{stderr}");
        assert!(["denied", "permitted", "Read-only"].iter().any(|reason| stderr.contains(reason)), "{stderr}");
    }
}
