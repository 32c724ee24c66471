//! [`AttentionError`].

/// Errors in plans and geometries.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AttentionError {
    /// A text that is not an attention plan.
    #[error("attention {text:?}: {reason}")]
    BadPlan {
        /// The text.
        text: String,
        /// What is wrong with it, and what was expected.
        reason: String,
    },
    /// An attention plan that names a layer which the model does not have.
    #[error("attention plan: the model has no layer {layer:?}; it has {count}, such as {example:?}")]
    UnknownLayer {
        /// The layer.
        layer: String,
        /// How many layers the model has.
        count: usize,
        /// One of them.
        example: String,
    },
    /// An invalid radius.
    #[error("radius {0}: expected a finite number above 0, in tokens, whose square is above 0 too")]
    BadRadius(f64),
    /// An invalid token grid.
    #[error("token grid of {height} x {width}: expected 1 to {limit} tokens each way")]
    BadGrid {
        /// Requested rows.
        height: usize,
        /// Requested columns.
        width: usize,
        /// The most tokens along a side.
        limit: usize,
    },
    /// An invalid tile, or one that the kernel does not support.
    #[error("tile of {height} x {width} tokens: expected {expected}")]
    BadTile {
        /// Requested rows.
        height: usize,
        /// Requested columns.
        width: usize,
        /// What was expected.
        expected: &'static str,
    },
    /// An attention plan that is not valid TOML.
    #[error("attention plan: {0}")]
    BadToml(String),
    /// An error of candle.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
