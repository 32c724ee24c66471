//! [`ProgressBars`]: shows the library's progress on stderr, one bar per stage.

use crate::output::print_message;
use clearform::{Observer, Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};
use std::ops::ControlFlow;

/// One bar at a time; hidden when stderr is not a terminal.
#[derive(Default)]
pub struct ProgressBars {
    current: Option<(&'static str, ProgressBar)>,
}

impl ProgressBars {
    /// The bar `label`; a bar of another label is removed first.
    fn bar(&mut self, label: &'static str, length: usize) -> &ProgressBar {
        if self.current.as_ref().is_some_and(|(current, _)| *current != label) {
            self.clear();
        }
        let (_, bar) = self.current.get_or_insert_with(|| (label, new_bar(label)));
        // Stages that are not counted leave the bar as it is.
        if length > 0 {
            bar.set_length(length as u64);
        }
        bar
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.current.take() {
            bar.finish_and_clear();
        }
    }
}

impl Observer for ProgressBars {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        let (label, message) = texts(progress.stage);
        let bar = self.bar(label, progress.total);
        if progress.total > 0 {
            bar.set_position(progress.done as u64);
        }
        bar.set_message(progress.loss.map_or(message.to_owned(), |loss| training_message(loss, progress.held_out)));
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

fn training_message(loss: f64, held_out: Option<f64>) -> String {
    let left = held_out.map(|share| format!(", {:.0}% of the held-out error left", 100.0 * share)).unwrap_or_default();
    format!("loss {loss:.4}{left}")
}

/// The label of a stage's bar, and what is said beside it.
fn texts(stage: Stage) -> (&'static str, &'static str) {
    match stage {
        Stage::Writing => ("writing", ""),
        Stage::Samples => ("samples", ""),
        Stage::Distilling => ("distilling", ""),
        Stage::Encoding => ("generating", "encoding the prompt"),
        Stage::Loading => ("generating", "loading the transformer"),
        Stage::Denoising | Stage::Comparing => ("generating", ""),
        Stage::Decoding => ("generating", "decoding"),
    }
}

fn new_bar(label: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_prefix(label);
    match ProgressStyle::with_template("{prefix:>12} {bar:32} {pos}/{len} {eta:>5} {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
