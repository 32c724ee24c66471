//! [`BatchSpec`]: what the images of a batch have in common.

/// Height and width in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSize {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

/// Size and number of the images of a batch, and the guidance scale. Some transformers take these as inputs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchSpec {
    /// Size of each image.
    pub size: ImageSize,
    /// Number of images.
    pub batch: usize,
    /// Guidance scale, for transformers that embed it (FLUX.1-dev).
    pub guidance: f64,
}
