//! The report on a training, as a page and as a section of the model's README.md.

use crate::Result;
use crate::error::WithContext as _;
use crate::page::Page;
use crate::training::TrainedStudent;
use crate::training_page::{add_curves, add_images};
use clearform_portable_model::{LevelErrors, StagingDir, VerdictRecord};

/// The page's name in the model's folder.
const FILE: &str = "distillation.html";

impl TrainedStudent {
    /// Writes the page into the model, and what was trained and the verdict into its README.md.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_report(&self, staging: &StagingDir) -> Result<()> {
        staging.write(FILE, self.page()?.render().as_bytes())?;
        let path = staging.folder().join("README.md");
        let readme = std::fs::read_to_string(&path).context(path.display())?;
        let verdict = match &self.verdict {
            Some(verdict) => format!("\n## How near it is to its teacher\n\n{}\n", verdict.record),
            None => String::new(),
        };
        let prompts: Vec<String> = self.prompts.iter().map(|prompt| format!("{prompt:?}")).collect();
        let text = format!(
            "{readme}\n## How it was distilled\n\n{} The samples show, among others: {}.\n{verdict}",
            self.summary(),
            prompts.join(", ")
        );
        Ok(staging.write("README.md", text.as_bytes())?)
    }

    fn summary(&self) -> String {
        let record = &self.record;
        let earlier = match record.earlier_steps {
            0 => String::new(),
            steps => format!(" They follow {steps} steps of earlier trainings."),
        };
        format!(
            "{} steps of {} samples at a peak learning rate of {:e}, on {} samples that the teacher generated.{earlier}",
            record.steps, record.batch, record.learning_rate, record.samples
        )
    }

    fn page(&self) -> Result<Page> {
        let mut page = Page::new("Distillation");
        page.paragraph(&self.summary());
        if let Some(verdict) = &self.verdict {
            for line in verdict.record.to_string().lines() {
                page.paragraph(line);
            }
            page.table(
                &["noise level", "error before", "after", "left", "of the teacher's power"],
                &rows(&verdict.record),
            );
            let rows = verdict.images.each_ref().map(Vec::as_slice);
            add_images(&mut page, rows, "From the same noise. From top: the teacher, the student before and after.")?;
        }
        add_curves(&mut page, &self.distilled.entries);
        Ok(page)
    }
}

fn rows(verdict: &VerdictRecord) -> Vec<Vec<String>> {
    let row = |level: &LevelErrors| {
        vec![
            format!("{:.1}", level.noise),
            format!("{:.5}", level.before),
            format!("{:.5}", level.after),
            format!("{:.1}%", 100.0 * level.after / level.before),
            format!("{:.2}%", 100.0 * level.after / level.power),
        ]
    };
    verdict.level.iter().map(row).collect()
}
