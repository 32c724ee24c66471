//! [`LiveReport`]: a page about a training while it runs.

use crate::Result;
use crate::error::WithContext as _;
use crate::judge::Judge;
use crate::observer::Observer;
use crate::page::Page;
use crate::training_page::{add_curves, add_images};
use clearform_distill::{TeacherStudent, TrainingProgress};
use clearform_runtime::RgbImage;
use std::path::{Path, PathBuf};

/// How often the page is written during a training, besides the steps at which something is measured.
const PAGES: usize = 20;

/// Seconds after which a browser reads the page again.
const REFRESH: usize = 15;

/// Images of the student on the page.
const IMAGES: usize = 4;

/// The page, and what it shows besides the curves.
pub struct LiveReport<'a> {
    path: PathBuf,
    judge: Option<&'a Judge<'a>>,
    /// Steps between images; 0 for none.
    images_every: usize,
    /// The step after which images were generated, and the images.
    images: Option<(usize, Vec<RgbImage>)>,
}

impl<'a> LiveReport<'a> {
    /// A page in `folder`, with images of the student of `judge` every `images_every` steps; 0 for none.
    pub fn new(folder: &Path, judge: Option<&'a Judge<'a>>, images_every: usize) -> Self {
        Self { path: folder.join("report.html"), judge, images_every, images: None }
    }

    /// Where the page is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the page anew if the step has something to show.
    ///
    /// # Errors
    /// The student fails, or the page cannot be written.
    pub fn update(
        &mut self,
        models: &TeacherStudent,
        progress: &TrainingProgress<'_>,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let step = progress.entry.step;
        let is_due = |every: usize| every > 0 && step.is_multiple_of(every);
        let judge = self.judge.filter(|_| is_due(self.images_every));
        if let Some(judge) = judge {
            self.images = Some((step, judge.images_of(models.student(), IMAGES, observer)?));
        }
        if judge.is_some() || progress.entry.held_out.is_some() || is_due(progress.steps.div_ceil(PAGES)) {
            std::fs::write(&self.path, self.page(progress)?.render()).context(self.path.display())?;
        }
        Ok(())
    }

    fn page(&self, progress: &TrainingProgress<'_>) -> Result<Page> {
        let mut page = Page::new("Distillation under way");
        page.refresh(REFRESH);
        let entry = progress.entry;
        let minutes = |seconds: f64| format!("{:.1} minutes", seconds / 60.0);
        page.paragraph(&format!(
            "Step {} of {}, after {}; about {} to go. Loss {:.5}.",
            entry.step,
            progress.steps,
            minutes(entry.seconds),
            minutes(progress.left.as_secs_f64()),
            entry.losses.total
        ));
        if let (Some(judge), Some((step, images))) = (self.judge, &self.images) {
            let [teacher, before] = judge.images_before();
            let caption = format!(
                "From the same noise. From top: the teacher, the student before training, and after {step} steps."
            );
            add_images(&mut page, [&teacher[..images.len()], &before[..images.len()], images], &caption)?;
        }
        add_curves(&mut page, progress.entries);
        Ok(page)
    }
}
