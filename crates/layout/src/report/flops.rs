//! [`FlopCount`]: how much a model computes per token, pixel and image, counted from the shapes of its weights.

use crate::manifest::config_values::ConfigValues;
use crate::manifest::family::FamilyManifest;
use crate::manifest::shape::{AppliedPer, AttendsTo, ExpectedTensor};

/// Numbers of weights by what they are applied to, each of them a multiplication and an addition, and the summed widths
/// of attention layers by what they attend to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct FlopCount {
    /// Weights applied to each image token.
    pub image_token: f64,
    /// Weights applied to each text token.
    pub text_token: f64,
    /// Weights applied to each pixel.
    pub pixel: f64,
    /// Weights applied once per image.
    pub image: f64,
    /// Width of joint attention of image and text.
    pub attends_all: f64,
    /// Width of self-attention of the image.
    pub attends_image: f64,
    /// Width of cross-attention from image to text.
    pub attends_text: f64,
}

impl FlopCount {
    /// Counts a model of `sizes`.
    pub fn of(manifest: &FamilyManifest, sizes: &ConfigValues) -> Self {
        let mut flops = Self::default();
        for (tensor, per, attends) in manifest.weights(sizes) {
            flops.add(&tensor, per, attends);
        }
        flops
    }

    /// Adds `tensor`. Vectors (biases and norms) are not worth counting.
    fn add(&mut self, tensor: &ExpectedTensor, per: Option<AppliedPer>, attends: Option<AttendsTo>) {
        if tensor.shape.len() < 2 {
            return;
        }
        let dimensions = tensor.shape.iter().map(|size| size.unwrap_or(0) as f64);
        let width = dimensions.clone().next().unwrap_or(0.0);
        let weights: f64 = dimensions.product();
        match per {
            Some(AppliedPer::ImageToken) => self.image_token += weights,
            Some(AppliedPer::TextToken) => self.text_token += weights,
            Some(AppliedPer::Token) => {
                self.image_token += weights;
                self.text_token += weights;
            }
            Some(AppliedPer::Pixel) => self.pixel += weights,
            Some(AppliedPer::Image) => self.image += weights,
            None => {}
        }
        match attends {
            Some(AttendsTo::All) => self.attends_all += width,
            Some(AttendsTo::Image) => self.attends_image += width,
            Some(AttendsTo::Text) => self.attends_text += width,
            None => {}
        }
    }

    /// Whether the manifest states what any weight is applied to.
    pub fn is_known(&self) -> bool {
        *self != Self::default()
    }
}
