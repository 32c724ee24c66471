//! [`Window`]: what a layer's image tokens see of the image. Knows no tile and no kernel.

use crate::AttentionError;
use candle_core::Tensor;
use std::fmt;

/// Radius of the CLEAR window in tokens: a token sees those at dx² + dy² < r², strictly (CLEAR, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Radius(f64);

impl Radius {
    /// A radius in tokens; it need not be whole.
    ///
    /// # Errors
    /// One that is not finite or not above 0, or so small that its square is rounded to 0: a token sees itself.
    pub fn new(tokens: f64) -> Result<Self, AttentionError> {
        let sees_itself = tokens > 0.0 && tokens * tokens > 0.0;
        if tokens.is_finite() && sees_itself { Ok(Self(tokens)) } else { Err(AttentionError::BadRadius(tokens)) }
    }

    /// The radius in tokens.
    pub fn tokens(self) -> f64 {
        self.0
    }

    /// The least whole number that is not below r²: squared distances are whole, so d² < r² exactly if d² < this.
    pub(crate) fn limit(self) -> i32 {
        (self.0 * self.0).ceil() as i32
    }
}

impl fmt::Display for Radius {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an image token sees of the image besides the text, with a layer's learned tensor.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// The disc, or the whole image.
    pub radius: Option<Radius>,
    /// Weights of a pooled cell, (1, 1, 1, d, 1, d, 1), if image tokens see the image averaged over d × d cells too.
    pub pool: Option<Tensor>,
}
