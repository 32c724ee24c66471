//! What can go wrong before attention runs.

/// What can be wrong with a plan or a geometry.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AttentionError {
    /// The text is not a plan.
    #[error("attention {text:?}: {reason}")]
    BadPlan {
        /// What was given.
        text: String,
        /// What was expected.
        reason: String,
    },
    /// No radius.
    #[error("radius {0}: expected a finite number above 0, in tokens, whose square is above 0 too")]
    BadRadius(f64),
    /// No grid.
    #[error("token grid of {height} x {width}: expected 1 to {limit} tokens each way")]
    BadGrid {
        /// Rows asked for.
        height: usize,
        /// Columns asked for.
        width: usize,
        /// The most there may be.
        limit: usize,
    },
    /// No tile, or none that this kernel takes.
    #[error("tile of {height} x {width} tokens: expected {expected}")]
    BadTile {
        /// Rows asked for.
        height: usize,
        /// Columns asked for.
        width: usize,
        /// What there may be.
        expected: &'static str,
    },
    /// A file of plans cannot be read.
    #[error("attention plan: {0}")]
    BadToml(String),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
