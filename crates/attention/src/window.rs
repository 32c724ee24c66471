//! [`Window`] and [`Radius`]: the part of the image that image tokens attend to.

use crate::AttentionError;
use candle_core::Tensor;
use std::fmt;

/// Radius of the CLEAR window in tokens: a token attends to those at dx² + dy² < r² (CLEAR, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Radius(f64);

impl Radius {
    /// A radius in tokens, which may be fractional.
    ///
    /// # Errors
    /// A radius that is not finite or not above 0, or so small that its square rounds to 0: a token must attend to
    /// itself.
    pub fn new(tokens: f64) -> Result<Self, AttentionError> {
        let sees_itself = tokens > 0.0 && tokens * tokens > 0.0;
        if tokens.is_finite() && sees_itself { Ok(Self(tokens)) } else { Err(AttentionError::BadRadius(tokens)) }
    }

    /// The radius in tokens.
    pub fn tokens(self) -> f64 {
        self.0
    }

    /// r² rounded up: squared distances are integers, so d² < r² exactly if d² < ⌈r²⌉.
    pub(crate) fn limit(self) -> i32 {
        (self.0 * self.0).ceil() as i32
    }
}

impl fmt::Display for Radius {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The keys of the image that an image token attends to besides the text, with the learned tensor of a layer.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// The radius of the disc; none for the whole image.
    pub radius: Option<Radius>,
    /// Weights of a pooled cell, (1, 1, 1, d, 1, d, 1), if image tokens also attend to the image averaged over d × d
    /// cells.
    pub pool: Option<Tensor>,
}
