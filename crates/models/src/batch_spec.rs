//! [`BatchSpec`]: what the images of a batch have in common.

/// Height and width in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSize {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

/// What the images of a batch have in common, and what a transformer may be told of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchSpec {
    /// Size of each image.
    pub size: ImageSize,
    /// Number of images.
    pub batch: usize,
    /// Guidance scale, for transformers that take it as an input.
    pub guidance: f64,
}
