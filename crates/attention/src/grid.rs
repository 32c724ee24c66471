//! [`TokenGrid`] and [`TileShape`]: rectangles of image tokens.

use crate::AttentionError;

/// A grid of image tokens, created by [`TokenGrid::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TokenGrid {
    /// Rows of tokens.
    pub height: usize,
    /// Tokens per row.
    pub width: usize,
}

impl TokenGrid {
    /// The most tokens along a side, so that squared distances fit in 32 bits.
    pub const LIMIT: usize = 1 << 14;

    /// A grid of `height` rows of `width` tokens.
    ///
    /// # Errors
    /// A side of 0 or above [`Self::LIMIT`].
    pub fn new(height: usize, width: usize) -> Result<Self, AttentionError> {
        let fits = |side| (1..=Self::LIMIT).contains(&side);
        if fits(height) && fits(width) {
            Ok(Self { height, width })
        } else {
            Err(AttentionError::BadGrid { height, width, limit: Self::LIMIT })
        }
    }

    /// Number of tokens.
    pub fn tokens(self) -> usize {
        self.height * self.width
    }
}

/// A rectangle of tokens that a kernel processes together, created by [`TileShape::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TileShape {
    /// Rows of tokens.
    pub height: usize,
    /// Tokens per row.
    pub width: usize,
}

impl TileShape {
    /// A tile of `height` rows of `width` tokens.
    ///
    /// # Errors
    /// A side of 0 or above [`TokenGrid::LIMIT`].
    pub fn new(height: usize, width: usize) -> Result<Self, AttentionError> {
        let fits = |side| (1..=TokenGrid::LIMIT).contains(&side);
        if fits(height) && fits(width) {
            Ok(Self { height, width })
        } else {
            Err(AttentionError::BadTile { height, width, expected: "1 to 16384 tokens each way" })
        }
    }

    /// Number of tokens.
    pub fn tokens(self) -> usize {
        self.height * self.width
    }
}
