//! [`ProgressBars`]: shows the library's progress on stderr: one bar per stage on a terminal, else a line now and then.

use crate::interrupt;
use crate::output::print_message;
use crate::progress_log::ProgressLog;
use crate::stage_clock::{StageClock, minutes};
use clearform::{Observer, Progress, Stage, StageNumber};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal as _;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Length of a bar: units may be finished in part.
const LENGTH: u64 = 1000;

const MEBIBYTE: f64 = (1 << 20) as f64;

/// One bar at a time, or lines.
pub struct ProgressBars {
    current: Option<(String, ProgressBar)>,
    clock: StageClock,
    /// Where stderr is no terminal.
    log: Option<ProgressLog>,
    can_resume: bool,
    is_interrupted: bool,
}

impl Default for ProgressBars {
    fn default() -> Self {
        Self::new(false)
    }
}

impl ProgressBars {
    fn new(can_resume: bool) -> Self {
        let log = (!std::io::stderr().is_terminal()).then(ProgressLog::default);
        Self { current: None, clock: StageClock::default(), log, can_resume, is_interrupted: false }
    }

    /// For a command that goes on with `--resume` after an interrupt.
    pub fn resumable() -> Self {
        Self::new(true)
    }

    /// The bar `label`; a bar of another label is removed first.
    fn bar(&mut self, label: &str) -> &ProgressBar {
        if self.current.as_ref().is_some_and(|(current, _)| current != label) {
            self.clear();
        }
        let (_, bar) = self.current.get_or_insert_with(|| (label.to_owned(), new_bar(label)));
        bar
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.current.take() {
            bar.finish_and_clear();
        }
    }

    fn show(&mut self, progress: &Progress) {
        let label = numbered_label(progress);
        let now = Instant::now();
        let left = self.clock.left(&label, progress, now);
        let text = text(progress, left);
        if let Some(log) = &mut self.log {
            if let Some(line) = log.line(&label, &text, now) {
                print_message(line);
            }
            return;
        }
        let bar = self.bar(&label);
        // Stages that are not counted leave the bar as it is.
        if progress.total > 0 {
            bar.set_position((progress.fraction * LENGTH as f64) as u64);
        }
        bar.set_message(text);
    }

    /// Says once where the command stops.
    fn stop(&mut self, progress: &Progress) -> ControlFlow<()> {
        if !self.is_interrupted {
            self.is_interrupted = true;
            self.clear();
            let advice = if self.can_resume { "continue with --resume" } else { "nothing was written" };
            print_message(format_args!("interrupted {}; {advice}", place(progress)));
        }
        ControlFlow::Break(())
    }
}

impl Observer for ProgressBars {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        interrupt::watch();
        if interrupt::is_requested() {
            return self.stop(progress);
        }
        self.show(progress);
        ControlFlow::Continue(())
    }

    fn note(&mut self, message: &str) {
        match &self.current {
            Some((_, bar)) => bar.suspend(|| print_message(message)),
            None => print_message(message),
        }
    }
}

impl Drop for ProgressBars {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Where a command was interrupted.
fn place(Progress { stage, done, total, .. }: &Progress) -> String {
    match stage {
        Stage::Distilling | Stage::Denoising => format!("at step {done} of {total}"),
        Stage::Samples => format!("after {done} of {total} samples"),
        Stage::Comparing => format!("after {done} of {total} images"),
        Stage::Writing => "while writing".to_owned(),
        Stage::Encoding | Stage::Loading | Stage::Decoding => {
            format!("while {}", text(&Progress::of_stage(*stage), None))
        }
    }
}

/// The label of a stage's bar.
fn label(stage: Stage) -> &'static str {
    match stage {
        Stage::Writing => "writing",
        Stage::Samples => "samples",
        Stage::Distilling => "distilling",
        Stage::Encoding | Stage::Loading | Stage::Denoising | Stage::Comparing | Stage::Decoding => "generating",
    }
}

/// The label of a stage with its number among those of the command, if they are numbered.
fn numbered_label(progress: &Progress) -> String {
    let label = label(progress.stage);
    match progress.number {
        Some(StageNumber { number, total }) => format!("{label} (stage {number} of {total})"),
        None => label.to_owned(),
    }
}

/// What is said beside the bar: how much is done, the time that is left, and the figures of a training. Samples and
/// images are finished many at a time, so their share is said.
fn text(progress: &Progress, left: Option<Duration>) -> String {
    let Progress { stage, done, total, loss, held_out, .. } = progress;
    let mebibytes = |bytes: usize| bytes as f64 / MEBIBYTE;
    let counted = match stage {
        Stage::Encoding => "encoding the prompt".to_owned(),
        Stage::Loading => "loading the transformer".to_owned(),
        Stage::Decoding if *total > 0 => format!("decoding, tile {done} of {total}"),
        Stage::Decoding => "decoding".to_owned(),
        Stage::Writing => format!("{:.1} of {:.1} MiB", mebibytes(*done), mebibytes(*total)),
        Stage::Samples => format!("{:.0}% of {total} samples", 100.0 * progress.fraction),
        Stage::Comparing => format!("{:.0}% of {total} images", 100.0 * progress.fraction),
        Stage::Distilling | Stage::Denoising => format!("{done}/{total}"),
    };
    let time = left.map(|left| format!(", {} left", minutes(left))).unwrap_or_default();
    let loss = loss.map(|loss| format!(", loss {loss:.4}")).unwrap_or_default();
    let error = held_out.map(|share| format!(", {:.0}% of the held-out error left", 100.0 * share)).unwrap_or_default();
    format!("{counted}{time}{loss}{error}")
}

fn new_bar(label: &str) -> ProgressBar {
    let bar = ProgressBar::new(LENGTH).with_prefix(label.to_owned());
    match ProgressStyle::with_template("{prefix:>12} {bar:24} {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(stage: Stage, done: usize, total: usize) -> Progress {
        Progress { done, total, ..Progress::of_stage(stage) }
    }

    #[test]
    fn an_interrupt_names_its_place() {
        assert_eq!(place(&progress(Stage::Distilling, 85, 4000)), "at step 85 of 4000");
        assert_eq!(place(&progress(Stage::Samples, 16, 128)), "after 16 of 128 samples");
        assert_eq!(place(&progress(Stage::Decoding, 0, 0)), "while decoding");
    }

    #[test]
    fn stages_of_a_command_are_numbered() {
        let training = progress(Stage::Distilling, 3, 9);
        assert_eq!(numbered_label(&training), "distilling");
        let number = Some(StageNumber { number: 3, total: 5 });
        assert_eq!(numbered_label(&Progress { number, ..training }), "distilling (stage 3 of 5)");
    }

    #[test]
    fn what_is_written_is_said_in_mebibytes() {
        assert_eq!(text(&progress(Stage::Writing, 3 << 19, 4 << 20), None), "1.5 of 4.0 MiB");
        let samples = Progress { fraction: 0.07, ..progress(Stage::Samples, 0, 128) };
        assert_eq!(text(&samples, None), "7% of 128 samples");
        let training = Progress { loss: Some(0.5), held_out: Some(0.25), ..progress(Stage::Distilling, 3, 9) };
        let left = Some(Duration::from_secs(7));
        assert_eq!(text(&training, left), "3/9, 7 s left, loss 0.5000, 25% of the held-out error left");
    }
}
