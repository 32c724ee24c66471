//! [`FlopCount`]: how much a model computes, counted from the shapes of its weights. It knows no picture.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::FamilyManifest;
use crate::manifest::shape::{AppliedPer, AttendsTo, ExpectedTensor};

/// Multiplications with weights for each of what they act on, and the widths of all layers of attention added up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct FlopCount {
    pub image_token: f64,
    pub text_token: f64,
    pub pixel: f64,
    pub picture: f64,
    pub attends_all: f64,
    pub attends_image: f64,
    pub attends_text: f64,
}

impl FlopCount {
    /// What one evaluation of a model of `sizes` computes.
    pub fn of(manifest: &FamilyManifest, sizes: &ConfigValues) -> Self {
        let mut work = Self::default();
        for (tensor, per, attends) in manifest.weights(sizes) {
            work.add(&tensor, per, attends);
        }
        work
    }

    /// Counts `tensor` in; vectors multiply nothing worth counting.
    fn add(&mut self, tensor: &ExpectedTensor, per: Option<AppliedPer>, attends: Option<AttendsTo>) {
        if tensor.shape.len() < 2 {
            return;
        }
        let extents = tensor.shape.iter().map(|extent| extent.unwrap_or(0) as f64);
        let width = extents.clone().next().unwrap_or(0.0);
        let weights: f64 = extents.product();
        match per {
            Some(AppliedPer::ImageToken) => self.image_token += weights,
            Some(AppliedPer::TextToken) => self.text_token += weights,
            Some(AppliedPer::Token) => {
                (self.image_token, self.text_token) = (self.image_token + weights, self.text_token + weights)
            }
            Some(AppliedPer::Pixel) => self.pixel += weights,
            Some(AppliedPer::Picture) => self.picture += weights,
            None => {}
        }
        match attends {
            Some(AttendsTo::All) => self.attends_all += width,
            Some(AttendsTo::Image) => self.attends_image += width,
            Some(AttendsTo::Text) => self.attends_text += width,
            None => {}
        }
    }

    /// Whether the manifest says of any weight what it acts on.
    pub fn is_known(&self) -> bool {
        *self != Self::default()
    }
}
