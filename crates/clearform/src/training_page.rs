//! What the live report and the final report on a training both show.

use crate::Result;
use crate::chart::{Series, chart};
use crate::page::Page;
use clearform_distill::LossEntry;
use clearform_runtime::image_metrics::contact_sheet;
use clearform_runtime::{RgbImage, png};

/// Rows of images, the teacher's first.
pub fn add_images(page: &mut Page, rows: [&[RgbImage]; 3], caption: &str) -> Result<()> {
    let sheet = contact_sheet(&rows.map(|row| row.iter().collect::<Vec<_>>()));
    page.image(&png::encode(&sheet, None)?, caption);
    Ok(())
}

/// Loss and held-out error over the steps.
pub fn add_curves(page: &mut Page, entries: &[LossEntry]) {
    let losses: Vec<f64> = entries.iter().map(|entry| entry.losses.total).collect();
    // A point that is not measured is no number, which the chart leaves out.
    let held_out: Vec<f64> = entries.iter().map(|entry| entry.held_out.unwrap_or(f64::NAN)).collect();
    let curves = [Series { name: "loss", values: &losses }, Series { name: "held-out error left", values: &held_out }];
    page.heading("Training").svg(&chart(&curves), "Per step; the held-out error as a share of that before training.");
}
