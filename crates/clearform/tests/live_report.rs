//! The page about a training while it runs.
#![allow(clippy::unwrap_used)]

use clearform::{ConvertOptions, Observer, Progress, Stage, TrainingOptions, convert};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Reads the page after each step. While images are drawn the step is shown several times, and the page comes last.
struct Reader {
    page: PathBuf,
    pages: BTreeMap<usize, String>,
    notes: Vec<String>,
}

impl Observer for Reader {
    fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
        if progress.stage == Stage::Distilling {
            self.pages.insert(progress.done, std::fs::read_to_string(&self.page).unwrap());
        }
        ControlFlow::Continue(())
    }

    fn note(&mut self, message: &str) {
        self.notes.push(message.to_owned());
    }
}

#[test]
fn the_page_follows_the_training_and_shows_what_the_student_draws() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let training = TrainingOptions {
        steps: Some(5),
        sample_count: Some(4),
        sample_steps: Some(2),
        held_out: 2,
        images_every: Some(3),
        ..TrainingOptions::default()
    };
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/mini-dit/model");
    let attention = "clear:r=3".parse().unwrap();
    let options = ConvertOptions { attention, training: Some(training), ..ConvertOptions::new(teacher, &model) };
    let page = folder.path().join("model.work/training/report.html");
    let mut reader = Reader { page: page.clone(), pages: BTreeMap::new(), notes: Vec::new() };
    convert(&options, &mut reader).unwrap();
    assert!(reader.notes.contains(&format!("what the training does is shown in {}", page.display())));
    let reach = "6 blocks of clear:r=3 carry information over 18 tokens, less than the diagonal of the image (23)";
    assert!(reader.notes.iter().any(|note| note.contains(reach) && note.contains("--radius 4")), "{:?}", reader.notes);
    assert_eq!(reader.pages.len(), 5);
    for (&step, page) in &reader.pages {
        assert!(page.contains(&format!("Step {step} of 5")) && page.contains("http-equiv=refresh"), "step {step}");
        assert_eq!(page.contains("data:image/png"), step >= 3, "step {step}");
    }
    assert!(reader.pages[&5].contains("after 3 steps") && reader.pages[&5].contains("held-out error left"));
    assert!(!page.exists(), "the finished model has a report of its own");
}
